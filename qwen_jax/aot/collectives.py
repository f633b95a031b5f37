"""Collectives in HLO: participating devices, bytes, and time on the interconnect.

Times follow from bandwidth only, for the best algorithm on the links that the group spans. On a
TPU's torus, each device has two links along an axis that is a ring, and devices at the ends of a
line have one ("How to Scale Your Model", jax-ml.github.io/scaling-book/sharding); for GPUs see
`nodes.Nodes`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import numpy as np

from qwen_jax.aot.hlo import Instruction, Shape
from qwen_jax.aot.nodes import Nodes
from qwen_jax.aot.topology import Pod

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)


def kind_of(opcode: str) -> str | None:
    """Returns the kind of collective of an opcode, without `-start` or `-done`; None for others."""
    base = opcode.removesuffix("-start").removesuffix("-done")
    return base if base in KINDS else None


def _iota_groups(text: str) -> np.ndarray | None:
    """Parses replica groups such as `[64,4]<=[2,4,8,4]T(3,0,2,1)`.

    Returns:
      Device numbers, int [groups, members]; None for other forms.
    """
    match = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not match:
        return None
    shape, dims, order = ([int(n) for n in (part or "").split(",") if n] for part in match.groups())
    ids = np.arange(math.prod(dims)).reshape(dims)
    return (ids.transpose(order) if order else ids).reshape(shape)


def _mesh_groups(text: str) -> np.ndarray | None:
    """Parses replica groups such as `mesh['a'=64,'b'=4] {'b'}`: groups along the named mesh axes.

    The devices may be in another order: `mesh[…], device_ids=([4,2]T(1,0)) {'b'}` means 0, 1, …
    arranged as [4,2] and transposed.

    Returns:
      Device numbers, int [groups, members]; None for other forms.
    """
    ids = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    match = re.match(rf"mesh\[([^\]]*)\]{ids}\s*\{{([^}}]*)\}}", text)
    if not match:
        return None
    axes = dict((name, int(n)) for name, n in re.findall(r"'(\w+)'=(\d+)", match[1]))
    chosen = re.findall(r"'(\w+)'", match[4])
    if re.search(r"'\w+':\(", match[4]) or not chosen:
        return None
    devices = np.arange(math.prod(axes.values()))
    if match[2]:
        devices = devices.reshape([int(n) for n in match[2].split(",")])
        order = [int(n) for n in match[3].split(",")] if match[3] else None
        devices = devices.transpose(order) if order else devices
    names = list(axes)
    rest = [names.index(a) for a in names if a not in chosen]
    order = rest + [names.index(a) for a in chosen]
    members = math.prod(axes[a] for a in chosen)
    return devices.reshape(list(axes.values())).transpose(order).reshape(-1, members)


def groups(i: Instruction, n_devices: int) -> list[list[int]]:
    """Returns the devices that participate together, as row-major positions in the mesh.

    For a permute these are (source, target) pairs.

    Args:
      i: the collective.
      n_devices: number of devices of the mesh.

    Raises:
      ValueError: the form of `replica_groups` is not supported.
    """
    match = re.search(r"(?:replica_groups|source_target_pairs)=", i.attributes)
    if not match:
        return [list(range(n_devices))]
    text = i.attributes[match.end() :]
    if text.startswith("{"):
        braces = re.match(r"\{(?:\{[\d,]*\},?)*\}", text)
        sets = re.findall(r"\{([\d,]+)\}", braces[0]) if braces else []
        listed = [[int(n) for n in g.split(",") if n] for g in sets]
        return listed or [list(range(n_devices))]
    found = _iota_groups(text)
    if found is None:
        found = _mesh_groups(text)
    if found is None:
        raise ValueError(f"replica groups of {i.name} have an unsupported form: {text[:80]}")
    return found.tolist()


@dataclasses.dataclass(frozen=True)
class Collective:
    """Bytes and time of one collective on one device.

    Attributes:
      kind: one of `KINDS`.
      bytes: bytes of the array over the group: what an all-gather returns, what an all-reduce or a
        reduce-scatter takes, what an all-to-all or a permute takes and returns per device.
      seconds: time on links that nothing else uses.
    """

    kind: str
    bytes: int
    seconds: float


def _torus_spans(pod: Pod, coordinates: np.ndarray) -> list[tuple[int, bool]]:
    """Returns (length, is a ring) of each torus axis that a group of devices covers.

    Args:
      pod: the TPU slice.
      coordinates: coordinates of the devices, int [devices, axes].
    """
    spans = []
    for axis, length in enumerate(pod.shape):
        n = len(np.unique(coordinates[:, axis]))
        if n > 1:
            spans.append((n, n == length and pod.rings[axis]))
    return spans


def _torus_seconds(pod: Pod, kind: str, size: int, coordinates: np.ndarray) -> float:
    """Returns the seconds of a collective on a TPU torus.

    Args:
      pod: the TPU slice.
      kind: one of `KINDS`.
      size: bytes, as in `Collective`.
      coordinates: coordinates of the participating devices, int [members, axes].
    """
    spans = _torus_spans(pod, coordinates)
    if not spans:
        return 0.0
    link = pod.chip.link_bandwidth
    members = len(coordinates)
    if kind in ("all-to-all", "ragged-all-to-all"):
        # The middle of each axis carries a quarter (line) or an eighth (ring) of its length in
        # shards; axes are crossed at the same time.
        return max(size * n / (8 if ring else 4) / link for n, ring in spans)
    # A device at the end of a line has one link along it, on a ring two.
    bandwidth = link * sum(2 if ring else 1 for _, ring in spans)
    once = size * (members - 1) / members / bandwidth
    return 2 * once if kind == "all-reduce" else once


def _hops(pod: Pod, a: np.ndarray, b: np.ndarray) -> int:
    """Returns the number of links on the shortest path between two devices of a torus."""
    total = 0
    for axis, ring in enumerate(pod.rings):
        d = abs(int(a[axis]) - int(b[axis]))
        total += min(d, pod.shape[axis] - d) if ring else d
    return total


def estimate(
    pod: Pod | Nodes, coordinates: np.ndarray, i: Instruction, result: tuple[Shape, ...]
) -> Collective:
    """Returns bytes and seconds of one collective.

    Args:
      pod: TPU slice or GPU nodes.
      coordinates: coordinates of the mesh's devices, row-major, int [devices, axes].
      i: the collective, or its start.
      result: what it returns (for a start, what its done returns).
    """
    kind = kind_of(i.opcode)
    if kind is None:
        raise ValueError(f"HLO instruction {i.name} is not a collective")
    device_groups = groups(i, len(coordinates))
    size = sum(s.bytes for s in result)
    if isinstance(pod, Nodes):
        # Of a permute the farthest pair counts: two nodes, if any pair has two.
        group = max(device_groups, key=lambda g: len(np.unique(coordinates[g][:, 1])))
        size *= len(group) if kind == "reduce-scatter" else 1
        return Collective(kind, size, pod.transfer_seconds(kind, size, coordinates[group]))
    if kind in ("collective-permute", "collective-broadcast"):
        pairs = [g for g in device_groups if len(g) > 1]
        hops = [
            _hops(pod, coordinates[a], coordinates[b])
            for g in pairs
            for a, b in itertools.pairwise(g)
        ]
        return Collective(kind, size, size * max(hops, default=0) / pod.chip.link_bandwidth)
    members = device_groups[0]
    if kind == "reduce-scatter":
        size *= len(members)
    return Collective(kind, size, _torus_seconds(pod, kind, size, coordinates[members]))


def coordinates(pod: Pod | Nodes, mesh) -> np.ndarray:
    """Returns the coordinates of a mesh's devices, in the order programs number them.

    Args:
      pod: TPU slice or GPU nodes.
      mesh: anything with `devices`, an array of devices with `coords`.

    Returns:
      int [devices, axes].
    """
    axes = len(pod.shape)
    return np.array([device.coords[:axes] for device in mesh.devices.flat])
