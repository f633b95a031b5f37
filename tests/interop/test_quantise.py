"""Quantised folders: writing, reading back, and quantising while loading."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qwen_jax.errors import UserError
from qwen_jax.interop import load_params, read_config
from qwen_jax.interop.quantise import bits_per_weight, folder_bytes, quantise_folder
from qwen_jax.kernels.quantised import dequantise
from qwen_jax.model import abstract_params
from qwen_jax.model.quantised import QuantFormat, quantise_params
from tests.interop.folders import random_tensors, toy_mesh, write
from tests.interop.test_gptq import V1, V2, gptq_tensors, quantisation
from tests.interop.test_gptq import write as write_packed

FORMATS = {
    "v1 int4 in groups": (V1, QuantFormat(4, 32)),
    "v2 int8 in groups, head": (V2, QuantFormat(8, 16, head=True)),
    "v2 int4": (V2, QuantFormat(4, None)),
    "v1 int8, head": (V1, QuantFormat(8, None, head=True)),
}


def assert_same(a, b):
    """Checks that two parameter trees have the same structure, dtypes and values."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.parametrize("name", FORMATS)
def test_written_loaded_and_in_memory_quantisation_agree(tmp_path, name):
    """Quantising via a folder, while loading, and of a loaded tree gives identical weights."""
    cfg, fmt = FORMATS[name]
    src = write(tmp_path / "src", cfg, random_tensors(cfg, "bfloat16"), shards=2)
    (src / "tokenizer.json").write_text("{}")
    abstract = abstract_params(cfg)
    expected = quantise_params(load_params(src, cfg, abstract), fmt)
    assert quantise_folder(src, tmp_path / "out", fmt, max_shard_bytes=30_000) == cfg
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert read_config(tmp_path / "out") == cfg
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert_same(load_params(tmp_path / "out", cfg, abstract), expected)
    assert_same(load_params(src, cfg, abstract, quantise=fmt), expected)
    assert folder_bytes(tmp_path / "out") < folder_bytes(src)
    scale_bits = 16 * 1 / (fmt.group or 64) if fmt.group else 0.25
    assert bits_per_weight(tmp_path / "out") == pytest.approx(fmt.bits + scale_bits, abs=0.6)


@pytest.mark.parametrize("fmt", [QuantFormat(4, 16), QuantFormat(8, None, head=True)])
def test_quantising_while_loading_on_a_mesh_matches_a_single_device(tmp_path, fmt):
    src = write(tmp_path, V2, random_tensors(V2))
    expected = load_params(src, V2, abstract_params(V2), quantise=fmt)
    mesh = toy_mesh(data=1, fsdp=2, tensor=2)
    got = load_params(src, V2, abstract_params(V2, mesh), quantise=fmt)
    assert_same(got, expected)
    down = got["layers"]["mlp"]["down"].codes
    assert down.addressable_shards[0].data.shape[1] * 2 == down.shape[1]


def test_written_folder_has_the_gptq_layout(tmp_path):
    """Dequantises each matrix in plain torch by the formula that other engines use."""
    src = write(tmp_path / "src", V2, random_tensors(V2))
    quantise_folder(src, tmp_path / "out", QuantFormat(4, 16))
    stored, plain = load_file(tmp_path / "out" / "model.safetensors"), random_tensors(V2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("gptq", 4, 16)
    assert config["desc_act"] is False and config["sym"] is True
    shifts = torch.arange(0, 32, 4)
    params = load_params(tmp_path / "out", V2, abstract_params(V2))
    for layer in range(V2.n_layers):
        base = f"model.layers.{layer}.mlp.gate_proj"
        q = (stored[base + ".qweight"][:, None] >> shifts[:, None]) & 15
        q = q.reshape(64, 128)
        zeros = ((stored[base + ".qzeros"][..., None] >> shifts) & 15).reshape(4, 128) + 1
        groups = stored[base + ".g_idx"].long()
        w = (q - zeros[groups]) * stored[base + ".scales"].float()[groups]
        assert stored[base + ".scales"].dtype == torch.float16
        ours = dequantise(jax.tree.map(lambda x, l=layer: x[l], params["layers"]["mlp"]["gate"]))
        np.testing.assert_allclose(np.asarray(ours), w.numpy(), rtol=1e-6)
        wanted = plain[base + ".weight"].T
        assert (w - wanted).norm() < 0.12 * wanted.norm()
    assert stored["model.embed_tokens.weight"].dtype == torch.float32


def test_quantise_program_writes_a_folder_and_rejects_an_existing_one(tmp_path):
    src = write(tmp_path / "src", V2, random_tensors(V2))

    def launch(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "launch.quantise", *arguments],
            capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu", "PATH": ""},
        )  # fmt: skip

    done = launch(f"--src={src}", f"--out={tmp_path / 'out'}", "--bits=8", "--group=-1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "int8, 8.3" in done.stdout and "MB instead of" in done.stdout
    load_params(tmp_path / "out", V2, abstract_params(V2))
    again = launch(f"--src={src}", f"--out={tmp_path / 'out'}", "--group=16")
    assert again.returncode == 2 and "already exists" in again.stderr


def test_quantise_folder_rejects_unsupported_input(tmp_path):
    src = write(tmp_path / "src", V2, random_tensors(V2))
    with pytest.raises(UserError, match=r"64 inputs.*groups of 40"):
        quantise_folder(src, tmp_path / "out", QuantFormat(4, 40))
    stored, _ = gptq_tensors(V2, 4, 16)
    packed = write_packed(tmp_path / "packed", V2, stored, quantisation(4, 16))
    with pytest.raises(UserError, match="already quantised, to int4-g16"):
        quantise_folder(packed, tmp_path / "out", QuantFormat(4, 16))
    bad = random_tensors(V2)
    bad["model.layers.1.mlp.up_proj.weight"][3, 4] = float("inf")
    write(tmp_path / "bad", V2, bad)
    with pytest.raises(UserError, match=r"up_proj.weight has values that are not finite"):
        quantise_folder(tmp_path / "bad", tmp_path / "out", QuantFormat(4, 16))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "packed", "src"]
    assert jnp.isinf(bad["model.layers.1.mlp.up_proj.weight"].numpy()).sum() == 1
