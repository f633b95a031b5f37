"""GPU nodes by name (`h100:8`), described without hardware, and properties of their GPUs."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import topologies

from qwen_jax.errors import UserError
from qwen_jax.train.flops import PEAK_FLOPS

GPUS_PER_NODE = 8
"""Number of GPUs that share an NVLink switch (HGX and DGX, H100 and H200)."""

COMPILERS = ("jax-cuda13-plugin", "nvidia-cuda-nvcc")
"""Packages that compile for GPUs."""

MEMORY_FRACTION = 0.9
"""Share of a GPU's memory that XLA may use, as NVIDIA recommends (docs.nvidia.com/jax-toolbox, GPU
performance). The rest is for the CUDA context, NCCL's buffers and code. JAX's default is 0.75, set
by XLA_CLIENT_MEM_FRACTION (XLA_PYTHON_CLIENT_MEM_FRACTION)."""

DEVICELESS_OPTIONS = {
    # With a GPU, the compiler times cuBLAS and its own Triton kernels for each product and uses the
    # faster one. Without a GPU it uses Triton with the smallest tiles.
    "xla_gpu_enable_triton_gemm": False,
}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Properties of a GPU.

    Bandwidths are in bytes/s, from the data sheets (H100 and H200 SXM, DGX H100).

    Attributes:
      name: model, as in topology names.
      kind: JAX's `device_kind`.
      peak_flops: dense bf16 FLOP/s of the data sheet.
      memory_bytes: memory that the driver reports; XLA may use `hbm_bytes` of it.
      hbm_bandwidth: memory bandwidth.
      clock: highest clock frequency in Hz.
      link_bandwidth: bandwidth of all NVLinks in one direction.
      network_bandwidth: bandwidth of its network card in one direction (400 Gbit/s each).
      host_bandwidth: bandwidth of PCIe in one direction.
      kernel_efficiency: share of the peak that Pallas calls are assumed to reach; 1, since no GPU
        was measured.
    """

    name: str
    kind: str
    peak_flops: float
    memory_bytes: int
    hbm_bandwidth: float
    clock: float = 1.98e9
    link_bandwidth: float = 4.5e11
    network_bandwidth: float = 5e10
    host_bandwidth: float = 6.4e10
    kernel_efficiency: float = 1.0

    @property
    def hbm_bytes(self) -> int:
        """Returns the bytes of memory that a program may use."""
        return int(self.memory_bytes * MEMORY_FRACTION)


# Memory and its bandwidth as their drivers report them: openxla/xla,
# xla/backends/gpu/target_config/specs, h100_sxm.txtpb and h200.txtpb.
GPUS = {
    "h100": Gpu(
        name="h100",
        kind="NVIDIA H100 80GB HBM3",
        peak_flops=PEAK_FLOPS["H100"],
        memory_bytes=84_942_979_072,
        hbm_bandwidth=3_352_320_000_000,
    ),
    "h200": Gpu(
        name="h200",
        kind="NVIDIA H200",
        peak_flops=PEAK_FLOPS["H200"],
        memory_bytes=151_397_597_184,
        hbm_bandwidth=4_800_000_000_000,
    ),
}
"""Supported GPUs, by the first part of a topology's name."""

# Other properties of a GPU that the compiler needs, the same for both; from the files above.
_HOPPER = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "shared_memory_per_block_optin": 232448,
    "shared_memory_per_core": 233472,
    "threads_per_core_limit": 2048,
    "core_count": 132,
    "fpus_per_core": 128,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "device_address_bits": 64,
    "l2_cache_size": 52_428_800,
    "device_vendor": '"NVIDIA Corporation"',
    "dnn_version": '"9.12.0"',
    "platform_version": '"Compute Capability 9.0a"',
    "driver_version": '"13.0.0"',
    "runtime_version": '"13.0.0"',
    "compile_time_toolkit_version": '"13.0.0"',
}


def target_config(gpu: Gpu) -> str:
    """Returns the properties of a GPU for the compiler, in text format.

    The message type is GpuTargetConfigProto of XLA.
    """
    numbers = _HOPPER | {
        "name": f'"{gpu.kind}"',
        "clock_rate_ghz": gpu.clock / 1e9,
        "memory_bandwidth": int(gpu.hbm_bandwidth),
        "device_memory_size": gpu.memory_bytes,
    }
    fields = [f"{name}: {value}" for name, value in numbers.items()]
    # The extension selects sm_90a, which has wgmma.
    fields.append("cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }")
    return (
        f'gpu_device_info {{ {" ".join(fields)} }} platform_name: "CUDA" '
        "dnn_version_info { major: 9 minor: 12 patch: 0 } "
        f'device_description_str: "{gpu.kind}"'
    )


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Nodes of one kind of GPU, each with an NVLink switch, connected by a network.

    Attributes:
      name: topology name, such as "h100:2x8".
      chip: the GPU.
      shape: (1, nodes, GPUs per node), the axes of a device's `coords`.
      devices: the devices, without hardware behind them.
    """

    name: str
    chip: Gpu
    shape: tuple[int, int, int]
    devices: Sequence[jax.Device]

    def transfer_seconds(self, kind: str, size: int, coordinates: np.ndarray) -> float:
        """Returns the least time of a collective.

        Switch and network are used at full bandwidth, concurrently. All-reduces within a node are
        assumed to be summed in the switch (NVLink SHARP), which halves what a ring sends; between
        nodes they are not.

        Args:
          kind: as in `collectives.KINDS`.
          size: bytes, as in `collectives.Collective`.
          coordinates: coordinates of the participating devices, int [members, 3].
        """
        members = len(coordinates)
        if members < 2:
            return 0.0
        nodes = len(np.unique(coordinates[:, 1]))
        here = members // nodes  # members of a node, each with a network card
        link, network = self.chip.link_bandwidth, self.chip.network_bandwidth
        if kind in ("collective-permute", "collective-broadcast"):
            return size / (network if nodes > 1 else link)
        if kind in ("all-to-all", "ragged-all-to-all"):
            inside, outside = size * (here - 1) / members, size * (members - here) / members
        else:
            inside, outside = size * (here - 1) / here, size * (nodes - 1) / nodes / here
        if kind == "all-reduce":
            inside, outside = size * (here > 1), 2 * outside
        return max(inside / link, outside / network)


def is_gpu(name: str) -> bool:
    """Returns whether a topology's name begins with a supported GPU."""
    return name.partition(":")[0] in GPUS


def parse(name: str) -> tuple[Gpu, tuple[int, int, int]]:
    """Parses a topology name: `h100:8` is its GPU and (1, 1, 8), `h200:2x8` has (1, 2, 8).

    Raises:
      UserError: the numbers have another form, or there are more GPUs than a node has.
    """
    kind, _, sizes = name.partition(":")
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", sizes)
    if not found:
        raise UserError(
            f"topology {name!r} needs the number of GPUs after the colon, such as {kind}:8 for a "
            f"node or {kind}:2x8 for two"
        )
    nodes, gpus = int(found[1] or 1), int(found[2])
    if gpus > GPUS_PER_NODE:
        raise UserError(
            f"topology {name!r} has {gpus} GPUs per node, but a node has {GPUS_PER_NODE}; write "
            f"NODESxGPUS, such as {kind}:2x8"
        )
    return GPUS[kind], (1, nodes, gpus)


def _missing_compiler() -> UserError:
    """Returns the error for a missing plugin or assembler."""
    return UserError(
        "compiling for a GPU needs JAX's CUDA plugin and NVIDIA's assembler, which are not "
        "installed; pip install -r requirements/aot-gpu.txt"
    )


def _add_assembler_to_path() -> None:
    """Adds the folder of NVIDIA's assembler to PATH, where XLA searches for it.

    Raises:
      UserError: the assembler is not installed.
    """
    # Where the wheel nvidia-cuda-nvcc installs them.
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        programs = pathlib.Path(folder, "cu13", "bin")
        if (programs / "ptxas").exists():
            os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ.get('PATH', '')}"
    if shutil.which("ptxas") is None:
        raise _missing_compiler()


def describe(name: str) -> Nodes:
    """Returns the GPU nodes of this name, with devices made by JAX's CUDA plugin; needs no GPU.

    Raises:
      UserError: the plugin or the assembler is not installed, or the plugin reports an error.
    """
    gpu, shape = parse(name)
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise _missing_compiler()
    _add_assembler_to_path()
    try:
        found = topologies.get_topology_desc(
            platform="cuda",
            topology_name="",
            topology="x".join(map(str, shape)),
            target_config=target_config(gpu),
        )
    except Exception as error:  # jaxlib raises several types; their text has the reason
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"JAX's CUDA plugin cannot describe {name} ({reason}); its version must be that of "
            "jax: pip install -r requirements/aot-gpu.txt"
        ) from error
    return Nodes(name, gpu, shape, found.devices)
