"""TPU slices by name (`v5e:16x16`), described without hardware, and properties of their chips."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from qwen_jax.aot.nodes import GPUS
from qwen_jax.errors import UserError, nearest
from qwen_jax.train.flops import PEAK_FLOPS

# libtpu reads these once, when it is loaded. Without the first it queries a metadata server for the
# host's TPU; without the second, two compiling processes conflict over a lock file.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


COMPILERS = ("libtpu",)
"""Packages that compile for TPUs."""


@dataclasses.dataclass(frozen=True)
class TpuChip:
    """Properties of a TPU chip, which is one JAX device.

    Bandwidths are in bytes/s, from "How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus:
    tables of TPU specs and interconnect figures, and the paragraph on PCIe).

    Attributes:
      name: generation, as in topology names.
      kind: JAX's `device_kind`.
      peak_flops: dense bf16 FLOP/s of the data sheet.
      clock: frequency in Hz that converts the compiler's cycles to seconds. On v5p, cycles are
        those of both TensorCores together (a large product reaches 82 % of the chip's peak by them,
        not 41 %).
      hbm_bytes: bytes of HBM that a program may use, as in the compiler's out-of-memory error.
      hbm_bandwidth: HBM bandwidth of the chip.
      link_bandwidth: bandwidth of one ICI link in one direction.
      host_bandwidth: bandwidth to the host's memory (PCIe).
      torus_axes: number of dimensions of the interconnect.
      ring: an axis is a ring if its length is a multiple of this, else a line (scaling book: 16 for
        inference chips, 4 for training chips).
      kernel_efficiency: share of peak_flops that Pallas calls with a cost estimate are assumed to
        reach. From libtpu's static cycle profile of this package's attention, causal, 4,096 tokens
        of one head of 128, forward and backward (`benchmarks/attention_cycles.py`; estimates).
    """

    name: str
    kind: str
    peak_flops: float
    clock: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    host_bandwidth: float
    torus_axes: int
    ring: int
    kernel_efficiency: float


_GIB = 2**30
# FLOPs of that attention: two products forward and five backward, half of the square.
_ATTENTION = 7 * 2 * 4096**2 / 2 * 128

CHIPS = {
    "v5e": TpuChip(
        name="v5e",
        kind="TPU v5 lite",
        peak_flops=PEAK_FLOPS["TPU v5e"],
        clock=1.5e9,
        hbm_bytes=int(15.75 * _GIB),
        hbm_bandwidth=8.1e11,
        link_bandwidth=4.5e10,
        host_bandwidth=1.6e10,
        torus_axes=2,
        ring=16,
        kernel_efficiency=_ATTENTION / ((49_745 + 100_385) / 1.5e9) / PEAK_FLOPS["TPU v5e"],
    ),
    "v5p": TpuChip(
        name="v5p",
        kind="TPU v5",
        peak_flops=PEAK_FLOPS["TPU v5p"],
        clock=1.75e9,
        hbm_bytes=int(95.73 * _GIB),
        hbm_bandwidth=2.8e12,
        link_bandwidth=9e10,
        host_bandwidth=1.6e10,
        torus_axes=3,
        ring=4,
        kernel_efficiency=_ATTENTION / ((48_270 + 98_293) / 1.75e9) / (PEAK_FLOPS["TPU v5p"] / 2),
    ),
    "v6e": TpuChip(
        name="v6e",
        kind="TPU v6 lite",
        peak_flops=PEAK_FLOPS["TPU v6e"],
        clock=1.75e9,
        hbm_bytes=int(31.24 * _GIB),
        hbm_bandwidth=1.6e12,
        link_bandwidth=9e10,
        host_bandwidth=3.2e10,
        torus_axes=2,
        ring=16,
        kernel_efficiency=_ATTENTION / ((28_065 + 50_524) / 1.75e9) / PEAK_FLOPS["TPU v6e"],
    ),
}
"""Supported chips, by the first part of a topology's name."""


@dataclasses.dataclass(frozen=True)
class Pod:
    """A TPU slice.

    Attributes:
      name: topology name, such as "v5e:16x16".
      chip: its chips.
      shape: length of each torus axis.
      devices: its devices, without hardware behind them.
    """

    name: str
    chip: TpuChip
    shape: tuple[int, ...]
    devices: Sequence[jax.Device]

    @property
    def rings(self) -> tuple[bool, ...]:
        """Returns, for each torus axis, whether its ends are connected."""
        return tuple(n % self.chip.ring == 0 and n > 1 for n in self.shape)


def parse(name: str) -> tuple[TpuChip, tuple[int, ...]]:
    """Parses a topology name: `v5e:16x16` is its chip and (16, 16).

    Raises:
      UserError: the generation is unknown, or the lengths have another form.
    """
    kind, _, lengths = name.partition(":")
    if kind not in CHIPS:
        raise UserError(
            f"topology {name!r} is not of a known TPU or GPU{nearest(kind, [*CHIPS, *GPUS])}; give "
            f"one of {', '.join(CHIPS)}, then the slice, such as v5e:16x16 or v5p:4x4x4, or one of "
            f"{', '.join(GPUS)}, then the number of GPUs, such as h100:8"
        )
    chip = CHIPS[kind]
    example = "x".join(["4"] * chip.torus_axes)
    if (
        not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", lengths)
        or lengths.count("x") + 1 != chip.torus_axes
    ):
        raise UserError(
            f"topology {name!r} needs {chip.torus_axes} lengths after the colon, such as "
            f"{kind}:{example}"
        )
    return chip, tuple(int(n) for n in lengths.split("x"))


def describe(name: str) -> Pod:
    """Returns the TPU slice of this name, with devices made by libtpu; no TPU is needed or used.

    Raises:
      UserError: libtpu is not installed, or has no such slice.
    """
    chip, shape = parse(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compiling for a TPU needs the package libtpu, which is not installed; "
            "pip install libtpu"
        )
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # jaxlib raises several types; their text has the reason
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"libtpu has no slice {name} ({reason}); give one that Cloud TPU offers, such as "
            f"{chip.name}:{'16x16' if chip.torus_axes == 2 else '4x4x8'}"
        ) from error
    return Pod(name, chip, shape, found.devices)
