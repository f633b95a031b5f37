"""Collectives in HLO: which devices take part, how many bytes, and how long the torus needs.

Times are bandwidth alone, of the best algorithm on the links that the group spans. On a TPU's torus
each device has two links along an axis that is a ring and, at the ends, one along a line ("How to
Scale Your Model", jax-ml.github.io/scaling-book/sharding); for GPUs see `nodes.Nodes`.
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
    """`all-gather-start` and `all-gather` are `all-gather`; None for anything else."""
    base = opcode.removesuffix("-start").removesuffix("-done")
    return base if base in KINDS else None


def _iota_groups(text: str) -> np.ndarray | None:
    """`[64,4]<=[2,4,8,4]T(3,0,2,1)`: groups × members."""
    match = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not match:
        return None
    shape, dims, order = ([int(n) for n in part.split(",")] if part else None
                          for part in match.groups())  # fmt: skip
    ids = np.arange(math.prod(dims)).reshape(dims)
    return (ids.transpose(order) if order else ids).reshape(shape)


def _mesh_groups(text: str) -> np.ndarray | None:
    """`mesh['a'=64,'b'=4] {'b'}`: groups along the named axes of a mesh of devices 0, 1, …

    Its devices may lie in another order: `mesh[…], device_ids=([4,2]T(1,0)) {'b'}` is 0, 1, …,
    laid out as [4,2], transposed.
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
    """Devices (places in the mesh, row-major) that take part together; pairs for a permute.

    Raises:
      ValueError: a form of `replica_groups` that is not known.
    """
    match = re.search(r"(?:replica_groups|source_target_pairs)=", i.attributes)
    if not match:
        return [list(range(n_devices))]
    text = i.attributes[match.end() :]
    if text.startswith("{"):
        text = re.match(r"\{(?:\{[\d,]*\},?)*\}", text)[0]
        listed = [[int(n) for n in g.split(",") if n] for g in re.findall(r"\{([\d,]+)\}", text)]
        return listed or [list(range(n_devices))]
    found = _iota_groups(text)
    if found is None:
        found = _mesh_groups(text)
    if found is None:
        raise ValueError(f"replica groups of {i.name} are not understood: {text[:80]}")
    return found.tolist()


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of one device.

    Attributes:
      bytes: of the whole array over the group: what an all-gather returns, what an all-reduce or a
        reduce-scatter takes, what an all-to-all or a permute takes and returns per device.
      seconds: on links that nothing else uses.
    """

    kind: str
    bytes: int
    seconds: float


def _span(pod: Pod, coordinates: np.ndarray) -> list[tuple[int, bool]]:
    """(length, is a ring) of each torus axis that a group of devices [n,axes] covers."""
    spans = []
    for axis, length in enumerate(pod.shape):
        n = len(np.unique(coordinates[:, axis]))
        if n > 1:
            spans.append((n, n == length and pod.rings[axis]))
    return spans


def _seconds(pod: Pod, kind: str, size: int, coordinates: np.ndarray) -> float:
    spans = _span(pod, coordinates)
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
    total = 0
    for axis, ring in enumerate(pod.rings):
        d = abs(int(a[axis]) - int(b[axis]))
        total += min(d, pod.shape[axis] - d) if ring else d
    return total


def measure(
    pod: Pod | Nodes, places: np.ndarray, i: Instruction, result: tuple[Shape, ...]
) -> Collective:
    """Bytes and seconds of one collective.

    Args:
      places: coordinates [devices, axes] of the mesh's devices, row-major.
      i: the collective, or its start. result: what it returns (for a start, what its done returns).
    """
    kind = kind_of(i.opcode)
    taking_part = groups(i, len(places))
    size = sum(s.bytes for s in result)
    if isinstance(pod, Nodes):
        # Of a permute the farthest pair counts: two nodes, if any pair has two.
        group = max(taking_part, key=lambda g: len(np.unique(places[g][:, 1])))
        size *= len(group) if kind == "reduce-scatter" else 1
        return Collective(kind, size, pod.transfer_seconds(kind, size, places[group]))
    if kind in ("collective-permute", "collective-broadcast"):
        pairs = [g for g in taking_part if len(g) > 1]
        hops = [_hops(pod, places[a], places[b]) for g in pairs for a, b in itertools.pairwise(g)]
        return Collective(kind, size, size * max(hops, default=0) / pod.chip.link_bandwidth)
    members = taking_part[0]
    if kind == "reduce-scatter":
        size *= len(members)
    return Collective(kind, size, _seconds(pod, kind, size, places[members]))


def coordinates(pod: Pod | Nodes, mesh) -> np.ndarray:
    """Coordinates [devices, axes] of a mesh's devices in the order programs number them."""
    axes = len(pod.shape)
    return np.array([device.coords[:axes] for device in mesh.devices.flat])
