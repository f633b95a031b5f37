"""Pretraining recipes for named slices: the report's run, laid out for the hardware.

    python -m launch.pretrain --config=configs/pods.py:7b,v5e-256 --workdir=DIR …
    python -m launch.aot --config=configs/pods.py:7b,v5e-256 --topology=v5e:16x16

The argument is SIZE,SLICE. Sizes are those of the report and the released 72B; slices are TPUs
(`v5e-16`, … by their sold names: those of v5p count cores, two to a chip) and nodes of eight GPUs.
Everything about the training itself is `configs/pretrain.py`'s; here stand the mesh, the rows per
device and step, and what is recomputed.

The report's batch of 2,048 rows of 2,048 tokens is kept everywhere: rows per device × devices ×
microbatches = 2,048, so a run may move between slices and stays the same run.
"""

import dataclasses

import ml_collections

from configs import pretrain
from qwen_jax.config import to_config_dict
from qwen_jax.errors import UserError, nearest
from qwen_jax.model import count_params
from qwen_jax.model.presets import preset
from qwen_jax.parallel import MeshConfig
from qwen_jax.train.job import PretrainJob


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice: its devices, the bytes one of them has for a program, its topology for aot."""

    devices: int
    device_bytes: float
    topology: str | None = None


# HBM of TPUs: what their compiler allows (aot/topology.py); of GPUs: what XLA may be given
# (aot/nodes.py).
SLICES = {
    "v5e-16": Slice(16, 16.9e9, "v5e:4x4"),
    "v5e-256": Slice(256, 16.9e9, "v5e:16x16"),
    "v6e-64": Slice(64, 33.5e9, "v6e:8x8"),
    "v6e-256": Slice(256, 33.5e9, "v6e:16x16"),
    "v5p-128": Slice(64, 102.8e9, "v5p:4x4x4"),
    "v5p-1024": Slice(512, 102.8e9, "v5p:8x8x8"),
    "h100-8": Slice(8, 76.4e9, "h100:8"),
    "h200-8": Slice(8, 136.3e9, "h200:8"),
}

# Float32 weights and Adam's two moments, and the gradients' float32 sums.
STATE_BYTES, GRADIENT_BYTES = 12, 4


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a recipe lies on a slice.

    rows: of 2,048 tokens per step and group of `tensor` devices. remat: what is recomputed. tensor:
    devices that split a layer. data: copies of the weights; each is shared (fsdp) by all devices
    that are left.
    """

    rows: int
    remat: str
    tensor: int = 1
    data: int = 1


# Rows first: gathering a layer costs the same for one row as for eight. Then the rung, by the sum
# of 16 bytes per parameter over the chips that share it; the residual stream and what the rung
# keeps (bytes per layer and token in model/options.py); and 2 to 5 GB for a gathered layer, its
# gradients and the loss (7B on v5e-256, compiled: 2.2). All have been compiled (docs/pods.md has
# what came out); `python -m launch.aot --search` tries the neighbours.
#
# Weights are shared by the whole slice. On v5p that makes the compiler (libtpu 0.0.51) gather them
# by all-reduces, at twice the bytes, but on the SparseCores and hidden; shared along two of the
# torus' three axes (fsdp=16, data=4) they are gathered, but waited for: 83 ms of 2,638 on v5p-128.
#
# On GPUs memory is left over for keeping every product; all of them fit the three quarters that JAX
# takes by itself. More rows would fit 14B, but near the end of memory XLA gives up running
# collectives beside anything (docs/pods.md).
LAYOUTS = {
    ("1.8b", "v5e-16"): Layout(4, "attention"),
    ("1.8b", "v5e-256"): Layout(8, "attention"),
    # 2,048 wide, it waits for memory on v6e more than for products: the less is kept, the faster
    # (predicted MFU 0.34 with "gate", 0.37 with "out_mid", 0.39 with "full").
    ("1.8b", "v6e-64"): Layout(8, "full"),
    ("1.8b", "v6e-256"): Layout(8, "full"),
    ("1.8b", "v5p-128"): Layout(8, "products"),
    ("1.8b", "v5p-1024"): Layout(4, "products"),
    ("1.8b", "h100-8"): Layout(16, "products"),
    ("1.8b", "h200-8"): Layout(16, "products"),
    ("7b", "v5e-16"): Layout(2, "full"),
    ("7b", "v5e-256"): Layout(4, "attention"),
    ("7b", "v6e-64"): Layout(8, "out_mid"),
    ("7b", "v6e-256"): Layout(8, "qkv_out"),
    ("7b", "v5p-128"): Layout(8, "products"),
    ("7b", "v5p-1024"): Layout(4, "products"),
    ("7b", "h100-8"): Layout(4, "products"),
    ("7b", "h200-8"): Layout(8, "products"),
    # 5,120 rows of a weight over 256 chips are 20 each, no multiple of a tile's 8, and are laid out
    # anew for every product: a seventh of the step. Over 128 chips they are 40.
    ("14b", "v5e-256"): Layout(4, "out_mid", data=2),
    ("14b", "v6e-64"): Layout(8, "out_mid"),
    ("14b", "v6e-256"): Layout(8, "out_mid", data=2),
    ("14b", "v5p-128"): Layout(4, "products"),
    ("14b", "v5p-1024"): Layout(4, "products"),
    ("14b", "h100-8"): Layout(2, "products"),
    ("14b", "h200-8"): Layout(4, "products"),
    # A gathered layer of 72B is 1.8 GB in bf16, and its float32 gradient twice that: where chips
    # are small or few, two split it. Split over four, with a row for each four, they would wait for
    # the interconnect: predicted MFU 0.39 for 0.51 on v5e-256, 0.24 for 0.32 on v6e-64.
    ("72b", "v5e-256"): Layout(2, "full", tensor=2),
    ("72b", "v6e-64"): Layout(2, "full", tensor=2),
    ("72b", "v6e-256"): Layout(4, "full"),
    ("72b", "v5p-128"): Layout(2, "attention"),
    ("72b", "v5p-1024"): Layout(4, "attention"),
}


def get_config(which: str = "7b,v5e-256") -> ml_collections.ConfigDict:
    """The recipe of SIZE,SLICE, as a tree of keys that the command line may override."""
    size, _, where = which.partition(",")
    for name, value, known in (("size", size, pretrain.TOKENS), ("slice", where, SLICES)):
        if value not in known:
            raise UserError(
                f"{name} {value!r} of recipe {which!r} is unknown{nearest(value, known)}; give "
                f"SIZE,SLICE, one of {', '.join(pretrain.TOKENS)} and one of {', '.join(SLICES)}"
            )
    return to_config_dict(recipe(size, where))


def check_fits(size: str, where: str) -> None:
    """Refuses a slice whose memory the training state alone fills.

    Raises:
      UserError: with the arithmetic, and the slices that hold it.
    """
    parameters = count_params(preset(f"qwen-{size}"))

    def share(slice_):
        return parameters * (STATE_BYTES + GRADIENT_BYTES) / slice_.devices

    if share(SLICES[where]) < 0.75 * SLICES[where].device_bytes:
        return
    roomy = [name for name, s in SLICES.items() if share(s) < 0.75 * s.device_bytes]
    raise UserError(
        f"{size} does not fit {where}: weights, Adam's moments and gradients take "
        f"{STATE_BYTES + GRADIENT_BYTES} bytes × {parameters / 1e9:.1f}B parameters / "
        f"{SLICES[where].devices} devices = {share(SLICES[where]) / 1e9:.1f} GB of "
        f"{SLICES[where].device_bytes / 1e9:.1f} GB, which leaves no room for activations; take "
        f"one of {', '.join(roomy)}"
    )


def recipe(size: str, where: str) -> PretrainJob:
    """The report's job for this size, laid out for the slice."""
    check_fits(size, where)
    layout = LAYOUTS[size, where]
    job = pretrain.report(size)
    groups = SLICES[where].devices // layout.tensor
    return dataclasses.replace(
        job,
        mesh=MeshConfig(data=layout.data, fsdp=-1, context=1, tensor=layout.tensor),
        options=dataclasses.replace(job.options, remat=layout.remat),
        train=dataclasses.replace(
            job.train, microbatches=job.data.global_batch // (layout.rows * groups)
        ),
    )
