"""Recipes for named slices: equal batches, meshes that divide them, and errors with arithmetic."""

import dataclasses
import itertools
import re

import pytest

from configs import pods, pretrain
from qwen_jax.aot.topology import CHIPS
from qwen_jax.config import from_config_dict
from qwen_jax.errors import UserError
from qwen_jax.kernels.dispatch import AttentionCall, choose_attention
from qwen_jax.model import count_params
from qwen_jax.model.presets import preset
from qwen_jax.parallel import MeshConfig
from qwen_jax.train.job import PretrainJob

PAIRS = list(itertools.product(pretrain.TOKENS, pods.SLICES))


@pytest.mark.parametrize(("size", "where"), pods.LAYOUTS)
def test_slice_changes_layout_but_not_training(size, where):
    job = from_config_dict(PretrainJob, pods.get_config(f"{size},{where}"))
    report = from_config_dict(PretrainJob, pretrain.get_config(size))
    same = dataclasses.replace(
        job,
        mesh=report.mesh,
        options=report.options,
        train=dataclasses.replace(job.train, microbatches=report.train.microbatches),
    )
    assert same == report
    layout, devices = pods.LAYOUTS[size, where], pods.SLICES[where].devices
    assert job.mesh == MeshConfig(data=layout.data, fsdp=-1, context=1, tensor=layout.tensor)
    groups = devices // layout.tensor
    assert layout.rows * groups * job.train.microbatches == job.data.global_batch == 2048
    for width in (job.model.n_heads, job.model.d_ff, job.model.vocab_size):
        assert width % layout.tensor == 0
    assert job.model.d_model % devices == 0


# As jax spells the chips of the slices; those of GPUs as their driver does.
KINDS = {chip.name: chip.kind for chip in CHIPS.values()}
KINDS |= {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}


@pytest.mark.parametrize(("size", "where"), pods.LAYOUTS)
def test_every_recipe_uses_this_packages_attention_kernel(size, where):
    """What `auto` takes for the rows that the recipe trains on: never plain jnp."""
    job = pods.recipe(size, where)
    kind = where.partition("-")[0]
    platform = "gpu" if kind.startswith("h") else "tpu"
    call = AttentionCall(
        q_len=job.data.seq_len,
        k_len=job.data.seq_len,
        head_dim=job.model.head_dim,
        dtype=job.options.dtype,
        segments=job.data.packing == "masked",
        platform=platform,
        device=KINDS[kind],
    )
    assert choose_attention(job.options.attention, call) == f"pallas_{platform}"


@pytest.mark.parametrize(("size", "where"), PAIRS)
def test_every_size_and_slice_has_a_recipe_or_does_not_fit(size, where):
    if (size, where) in pods.LAYOUTS:
        pods.check_fits(size, where)
        return
    with pytest.raises(UserError) as refused:
        pods.get_config(f"{size},{where}")
    text = str(refused.value)
    parameters = count_params(preset(f"qwen-{size}"))
    found = re.search(r"/ (\d+) devices = ([\d.]+) GB of ([\d.]+) GB", text)
    devices, share, there = int(found[1]), float(found[2]), float(found[3])
    assert share == pytest.approx(16 * parameters / devices / 1e9, abs=0.05)
    assert share > 0.75 * there - 0.1
    named = text.rsplit("one of ", 1)[1].split(", ")
    assert named and all((size, name) in pods.LAYOUTS for name in named)


@pytest.mark.parametrize(
    ("which", "sentence"),
    [
        ("7b,v5e-265", "slice 'v5e-265' of recipe '7b,v5e-265' is unknown (did you mean 'v5e-2"),
        ("8b,v5e-256", "size '8b' of recipe"),
        ("7b", "slice '' of recipe '7b' is unknown; give SIZE,SLICE"),
    ],
)
def test_unknown_sizes_and_slices_are_refused(which, sentence):
    with pytest.raises(UserError) as refused:
        pods.get_config(which)
    assert sentence in str(refused.value)
