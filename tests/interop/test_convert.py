"""Conversion programs: Hugging Face folder to native checkpoint and back, byte for byte; errors."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from launch import convert
from qwen_jax.errors import UserError
from qwen_jax.interop import load_params, read_config
from qwen_jax.model import abstract_params
from qwen_jax.train.checkpoint import Checkpoints, restore_params
from tests.interop.folders import V3, random_tensors, toy_mesh, write


def test_hf_to_checkpoint_to_hf_reproduces_the_file(qwen1_small, tmp_path):
    cfg = convert.to_native(str(qwen1_small), str(tmp_path / "native"))
    want = load_params(qwen1_small, cfg, abstract_params(cfg))
    got = restore_params(str(tmp_path / "native"), abstract_params(cfg, toy_mesh(1, 2, 1)))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    convert.to_hf(
        str(tmp_path / "native"), str(tmp_path / "hf"), dtype="float32", assets=str(qwen1_small)
    )
    for name in ("model.safetensors", "generation_config.json"):
        ours, theirs = (tmp_path / "hf" / name).read_bytes(), (qwen1_small / name).read_bytes()
        if name.endswith(".json"):
            ours, theirs = json.loads(ours), json.loads(theirs)
        assert ours == theirs, name
    assert read_config(tmp_path / "hf") == cfg
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == 287


def test_interrupted_conversion_can_be_rerun(tmp_path):
    write(tmp_path / "in", V3, random_tensors(V3))
    (tmp_path / "native" / "step_00000000.orbax-checkpoint-tmp").mkdir(parents=True)
    convert.to_native(str(tmp_path / "in"), str(tmp_path / "native"))
    restore_params(str(tmp_path / "native"), abstract_params(V3, toy_mesh(1, 1, 1)))


def test_bfloat16_checkpoint_preserves_bits(tmp_path):
    tensors = random_tensors(V3, "bfloat16")
    write(tmp_path / "in", V3, tensors)
    convert.to_native(str(tmp_path / "in"), str(tmp_path / "native"), dtype="bfloat16")
    convert.to_hf(str(tmp_path / "native"), str(tmp_path / "out"))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(saved[name].view(torch.int16), tensor.view(torch.int16)), name


def test_training_checkpoint_exports_parameters_of_the_chosen_step(tmp_path):
    """The newest or the given step is exported; the moments in the checkpoint are not read."""
    write(tmp_path / "in", V3, random_tensors(V3))
    params = load_params(tmp_path / "in", V3, abstract_params(V3, toy_mesh(1, 8, 1)))
    fingerprint = {"model": dataclasses.asdict(V3), "tokenizer_sha256": "0", "seed": 1}
    with Checkpoints(
        str(tmp_path / "run"), keep_last=2, keep_every=None, fingerprint=fingerprint
    ) as checkpoints:
        for step, scale in ((5, 1.0), (10, 2.0)):
            state = {"params": jax.tree.map(lambda x, s=scale: x * s, params), "mu": params}
            checkpoints.save(step, state, {"loss": 1.0}, wait=True)
    for step, scale in ((5, 1.0), (None, 2.0)):
        out = tmp_path / f"hf-{step}"
        convert.to_hf(str(tmp_path / "run"), str(out), step=step, dtype="float32")
        saved = load_file(out / "model.safetensors")
        name = "model.embed_tokens.weight"
        np.testing.assert_array_equal(saved[name], scale * random_tensors(V3)[name])


def test_convert_rejects_invalid_arguments(tmp_path, qwen1_small):
    with pytest.raises(UserError, match=r"'float8'.*float32"):
        convert.to_native(str(qwen1_small), str(tmp_path / "x"), dtype="float8")
    with pytest.raises(UserError, match="holds no checkpoint"):
        convert.to_hf(str(tmp_path / "none"), str(tmp_path / "x"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(UserError, match="not an empty folder"):
        convert.to_native(str(qwen1_small), str(tmp_path / "full"))
    with pytest.raises(UserError, match="does not exist"):
        convert.to_hf(str(tmp_path / "none"), str(tmp_path / "x"), assets=str(tmp_path / "gone"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("program", "flags", "message"),
    [
        ("convert", ["--out=x"], "--hf_dir"),
        ("convert", ["--out=x", "--hf_dir=gone"], "gone does not exist"),
        ("logits", ["--out=x", "--hf_dir=gone", "--ids=y"], "gone does not exist"),
        ("logits", ["extra", "--out=x", "--hf_dir=gone", "--ids=y"], "extra"),
    ],
)
def test_programs_print_a_one_line_error_and_exit_with_status_2(program, flags, message):
    command = [sys.executable, "-m", f"launch.{program}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
