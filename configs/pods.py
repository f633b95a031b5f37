"""Pretraining recipes for named slices: the report's run, laid out for the hardware.

    python -m launch.pretrain --config=configs/pods.py:7b,v5e-256 --workdir=DIR …
    python -m launch.aot --config=configs/pods.py:7b,v5e-256 --topology=v5e:16x16

The argument is SIZE,SLICE. Sizes are those of the report and the released 72B; slices are TPUs
(`v5e-16` and so on, by the names they are sold under: those of v5p count cores, two per chip) and
nodes of eight GPUs. The training itself is that of `configs/pretrain.py`; this file adds the mesh,
the rows per device and step, and the remat policy.

The report's batch of 2,048 rows of 2,048 tokens is used everywhere: rows per device × devices ×
microbatches = 2,048, so a run can move between slices without changing its training.
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
class PodSlice:
    """Hardware that a recipe is laid out for.

    Attributes:
      devices: number of devices.
      device_bytes: bytes of device memory that a program may use.
      topology: name of the topology for `launch.aot`.
    """

    devices: int
    device_bytes: float
    topology: str | None = None


# HBM of TPUs: what the compiler allows (aot/topology.py); of GPUs: what XLA may use
# (aot/nodes.py).
SLICES = {
    "v5e-16": PodSlice(16, 16.9e9, "v5e:4x4"),
    "v5e-256": PodSlice(256, 16.9e9, "v5e:16x16"),
    "v6e-64": PodSlice(64, 33.5e9, "v6e:8x8"),
    "v6e-256": PodSlice(256, 33.5e9, "v6e:16x16"),
    "v5p-128": PodSlice(64, 102.8e9, "v5p:4x4x4"),
    "v5p-1024": PodSlice(512, 102.8e9, "v5p:8x8x8"),
    "h100-8": PodSlice(8, 76.4e9, "h100:8"),
    "h200-8": PodSlice(8, 136.3e9, "h200:8"),
}

# Float32 weights and Adam's two moments, and the gradients' float32 sums.
STATE_BYTES, GRADIENT_BYTES = 12, 4


@dataclasses.dataclass(frozen=True)
class RecipeLayout:
    """Layout of a recipe on a slice.

    Attributes:
      rows: rows of 2,048 tokens per step and group of `tensor` devices.
      remat: remat policy.
      tensor: devices that split a layer.
      data: replicas of the weights; each is sharded (fsdp) over the remaining devices.
    """

    rows: int
    remat: str
    tensor: int = 1
    data: int = 1


# Rows were chosen first, since gathering a layer costs the same for one row as for eight; then the
# remat policy, by the sum of 16 bytes per parameter over the chips that share it, the residual
# stream and what the policy saves (bytes per layer and token in model/options.py), and 2 to 5 GB
# for a gathered layer, its gradients and the loss (7B on v5e-256, compiled: 2.2). All have been
# compiled (results in docs/log.md); `python -m launch.aot --search` tries alternatives.
#
# Weights are sharded over all chips of the slice. On v5p the compiler (libtpu 0.0.51) then gathers
# them by all-reduces, at twice the bytes, but on the SparseCores and overlapped with compute;
# sharded along two of the torus' three axes (fsdp=16, data=4) they are all-gathered, but the step
# waits for it: 83 ms of 2,638 on v5p-128.
#
# On GPUs there is enough memory to save every product; all layouts fit the three quarters of memory
# that JAX uses by default. 14B would fit with more rows, but near the limit of memory XLA no longer
# overlaps collectives with compute (docs/log.md).
LAYOUTS = {
    ("1.8b", "v5e-16"): RecipeLayout(4, "attention"),
    ("1.8b", "v5e-256"): RecipeLayout(8, "attention"),
    # With 2,048 channels, HBM bandwidth limits it on v6e: saving less is faster (predicted MFU 0.34
    # with "gate", 0.37 with "out_mid", 0.39 with "full").
    ("1.8b", "v6e-64"): RecipeLayout(8, "full"),
    ("1.8b", "v6e-256"): RecipeLayout(8, "full"),
    ("1.8b", "v5p-128"): RecipeLayout(8, "products"),
    ("1.8b", "v5p-1024"): RecipeLayout(4, "products"),
    ("1.8b", "h100-8"): RecipeLayout(16, "products"),
    ("1.8b", "h200-8"): RecipeLayout(16, "products"),
    ("7b", "v5e-16"): RecipeLayout(2, "full"),
    ("7b", "v5e-256"): RecipeLayout(4, "attention"),
    ("7b", "v6e-64"): RecipeLayout(8, "out_mid"),
    ("7b", "v6e-256"): RecipeLayout(8, "qkv_out"),
    ("7b", "v5p-128"): RecipeLayout(8, "products"),
    ("7b", "v5p-1024"): RecipeLayout(4, "products"),
    ("7b", "h100-8"): RecipeLayout(4, "products"),
    ("7b", "h200-8"): RecipeLayout(8, "products"),
    # 5,120 rows of a weight over 256 chips are 20 each, which is not a multiple of a tile's 8 rows,
    # so they are copied for every product: a seventh of the step. Over 128 chips they are 40.
    ("14b", "v5e-256"): RecipeLayout(4, "out_mid", data=2),
    ("14b", "v6e-64"): RecipeLayout(8, "out_mid"),
    ("14b", "v6e-256"): RecipeLayout(8, "out_mid", data=2),
    ("14b", "v5p-128"): RecipeLayout(4, "products"),
    ("14b", "v5p-1024"): RecipeLayout(4, "products"),
    ("14b", "h100-8"): RecipeLayout(2, "products"),
    ("14b", "h200-8"): RecipeLayout(4, "products"),
    # A gathered layer of 72B is 1.8 GB in bf16, and its float32 gradient twice that: on small or
    # few chips, two of them split it. Split over four, with a row per four chips, the interconnect
    # limits the step: predicted MFU is 0.39 instead of 0.51 on v5e-256, and 0.24 instead of 0.32 on
    # v6e-64.
    ("72b", "v5e-256"): RecipeLayout(2, "full", tensor=2),
    ("72b", "v6e-64"): RecipeLayout(2, "full", tensor=2),
    ("72b", "v6e-256"): RecipeLayout(4, "full"),
    ("72b", "v5p-128"): RecipeLayout(2, "attention"),
    ("72b", "v5p-1024"): RecipeLayout(4, "attention"),
}


def get_config(name: str = "7b,v5e-256") -> ml_collections.ConfigDict:
    """Returns the recipe of SIZE,SLICE as a config whose keys the command line may override.

    Raises:
      UserError: size or slice are unknown, or the training state does not fit the slice.
    """
    size, _, slice_name = name.partition(",")
    for part, value, known in (("size", size, pretrain.TOKENS), ("slice", slice_name, SLICES)):
        if value not in known:
            raise UserError(
                f"{part} {value!r} of recipe {name!r} is unknown{nearest(value, known)}; give "
                f"SIZE,SLICE, one of {', '.join(pretrain.TOKENS)} and one of {', '.join(SLICES)}"
            )
    return to_config_dict(recipe(size, slice_name))


def check_fits(size: str, slice_name: str) -> None:
    """Checks that the training state leaves room for activations on a slice.

    Raises:
      UserError: it does not; the message has the arithmetic and the slices that are large enough.
    """
    parameters = count_params(preset(f"qwen-{size}"))

    def share(target):
        """Returns the bytes of state and gradients per device."""
        return parameters * (STATE_BYTES + GRADIENT_BYTES) / target.devices

    if share(SLICES[slice_name]) < 0.75 * SLICES[slice_name].device_bytes:
        return
    roomy = [name for name, s in SLICES.items() if share(s) < 0.75 * s.device_bytes]
    raise UserError(
        f"{size} does not fit {slice_name}: weights, Adam's moments and gradients take "
        f"{STATE_BYTES + GRADIENT_BYTES} bytes × {parameters / 1e9:.1f}B parameters / "
        f"{SLICES[slice_name].devices} devices = {share(SLICES[slice_name]) / 1e9:.1f} GB of "
        f"{SLICES[slice_name].device_bytes / 1e9:.1f} GB, which leaves no room for activations; "
        f"choose one of {', '.join(roomy)}"
    )


def recipe(size: str, slice_name: str) -> PretrainJob:
    """Returns the report's job for this size, laid out for a slice.

    Raises:
      UserError: as `check_fits`.
    """
    check_fits(size, slice_name)
    layout = LAYOUTS[size, slice_name]
    job = pretrain.report(size)
    groups = SLICES[slice_name].devices // layout.tensor
    return dataclasses.replace(
        job,
        mesh=MeshConfig(data=layout.data, fsdp=-1, context=1, tensor=layout.tensor),
        options=dataclasses.replace(job.options, remat=layout.remat),
        train=dataclasses.replace(
            job.train, microbatches=job.data.global_batch // (layout.rows * groups)
        ),
    )
