"""Predicted seconds of a compiled step: its schedule played through, operation by operation.

One device runs its operations in the order the compiler scheduled. An operation takes the larger of
the compiler's own estimate (`estimated_cycles`), its FLOPs at peak and its HBM traffic at full
bandwidth; a Pallas call, which the compiler doesn't estimate, its declared FLOPs at the chip's
`kernel_efficiency` or its declared bytes (what a foreign kernel does not declare, the caller may
say: `KernelCost`). Asynchronous transfers run beside it, one at a time per
resource (interconnect, host link, DMA, SparseCore), and hold the schedule up only where it waits
for one that is not done. A loop is its body's time, times its trips.

For GPUs there is neither an estimate of the compiler nor a kernel that was timed: what comes out is
the roofline, the least that the schedule can take.

Nothing here was measured on hardware: latencies, launch overheads, contention between HBM traffic
and DMA, and input are left out.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable

from qwen_jax.aot import collectives, work
from qwen_jax.aot.hlo import HOST, Computation, Instruction, Module, trip_count
from qwen_jax.aot.nodes import Nodes
from qwen_jax.aot.topology import Pod


@dataclasses.dataclass
class Cost:
    """Totals of a computation on one device, loops multiplied out.

    Attributes:
      seconds: until its last operation is done. compute: seconds of operations on the cores.
      waiting: seconds held up, by resource. flops: executed. kernel_flops: those of Pallas calls.
      counts, bytes, busy: of collectives, by kind; busy in seconds. synchronous: how many of them
        GPUs wait for on the spot, by kind.
      by_name: seconds on the cores by op_name, for finding what is slow.
    """

    seconds: float = 0.0
    compute: float = 0.0
    flops: float = 0.0
    kernel_flops: float = 0.0
    unpriced_kernels: int = 0
    waiting: Counter = dataclasses.field(default_factory=Counter)
    counts: Counter = dataclasses.field(default_factory=Counter)
    bytes: Counter = dataclasses.field(default_factory=Counter)
    busy: Counter = dataclasses.field(default_factory=Counter)
    synchronous: Counter = dataclasses.field(default_factory=Counter)
    host_bytes: int = 0
    by_name: Counter = dataclasses.field(default_factory=Counter)

    def add(self, other: Cost, times: int = 1) -> None:
        """Adds everything of `other` but its seconds, `times` over."""
        for name in ("compute", "flops", "kernel_flops", "unpriced_kernels", "host_bytes"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for name in ("waiting", "counts", "bytes", "busy", "synchronous", "by_name"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] += times * value


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """What a Pallas call does: flops, and the share of the chip's peak at which it does them."""

    flops: float
    efficiency: float


Kernels = Callable[[Instruction], KernelCost | None]
"""What is known of a Pallas call that declares nothing; None: it is priced by its bytes alone."""

_ASYNC_FUSION = re.compile(r"AsyncCollective(Start|Done)")


class Timeline:
    """Costs the computations of one module for one pod and mesh."""

    def __init__(self, module: Module, pod: Pod | Nodes, mesh, kernels: Kernels | None = None):
        self.module, self.pod = module, pod
        self.kernels = kernels or (lambda call: None)
        self.places = collectives.coordinates(pod, mesh)
        self._costs: dict[str, Cost] = {}

    def entry(self) -> Cost:
        """The whole step."""
        return self.cost(self.module.entry)

    def cost(self, name: str) -> Cost:
        """One computation, run once from start to end."""
        if name not in self._costs:
            self._costs[name] = _Run(self, self.module.computations[name]).play()
        return self._costs[name]

    def collective_in(self, computation: str) -> Instruction | None:
        """The collective that a computation does, itself or in what it calls."""
        for i in self.module.computations[computation].instructions:
            if collectives.kind_of(i.opcode):
                return i
            for key in ("to_apply", "calls", "called_computations"):
                if (called := i.called(key)) and (found := self.collective_in(called)):
                    return found
        return None

    @functools.cache  # noqa: B019  (a timeline lives as long as its report)
    def fused_collective(self, computation: str) -> tuple[str, Instruction] | None:
        """(Start, Step, Done or Whole; the collective) of a fusion that drives a transfer.

        A transfer may be started in one fusion, driven on from inside products that have nothing to
        do with it (Step, also in a loop's body) and awaited in a third; or be fused whole.
        """
        inner = self.module.computations[computation]
        role, found = "Whole", None
        for i in inner.instructions:
            if i.opcode == "custom-call":
                match = _ASYNC_FUSION.match(i.text("custom_call_target") or "")
                role = match[1] if match else role
            elif collectives.kind_of(i.opcode):
                found = i
                if role == "Whole" and "async_collective_fusion_config" in i.attributes:
                    role = "Step"
        return (role, found) if found else None


class _Run:
    """One pass through one computation."""

    def __init__(self, timeline: Timeline, scope: Computation):
        self.timeline, self.scope = timeline, scope
        self.module, self.chip = timeline.module, timeline.pod.chip
        self.total = Cost()
        self.now = 0.0
        self.free: dict[str, float] = defaultdict(float)  # when a resource is idle again
        self.pending: dict[str, tuple[str, float]] = {}  # what was started: resource, end
        self.armed: dict[str, Instruction] = {}  # started without its operands

    def play(self) -> Cost:
        for i in self.scope.instructions:
            self._one(i)
        self.total.seconds = self.now
        return self.total

    def _one(self, i: Instruction) -> None:
        if work.is_free(i):
            return
        if i.opcode == "while":
            body = self.timeline.cost(i.called("body"))
            self._nested(body, trip_count(self.module, self.scope, i))
        elif i.opcode == "call":
            self._nested(self.timeline.cost(i.called("to_apply")), 1)
        elif i.opcode == "conditional":
            self._nested(self._longest_branch(i), 1)
        elif i.opcode.endswith("-done"):
            self._wait(i)
        elif i.opcode.endswith("-update"):
            self._update(i)
        elif i.opcode.endswith("-start"):
            self._start(i)
        elif collectives.kind_of(i.opcode):
            self._transfer(i, i.shapes, "")
            self._until("interconnect", self.free["interconnect"])
        elif i.opcode == "fusion" and (fused := self.timeline.fused_collective(i.called("calls"))):
            self._fused(i, *fused)
        else:
            self._compute(i)

    def _nested(self, cost: Cost, times: int) -> None:
        self.total.add(cost, times)
        self.now += times * cost.seconds

    def _longest_branch(self, i: Instruction) -> Cost:
        listed = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
        names = re.findall(r"%?([\w.\-]+)", listed[1]) if listed else []
        names = names or [i.called("true_computation"), i.called("false_computation")]
        return max((self.timeline.cost(name) for name in names), key=lambda c: c.seconds)

    def _compute(self, i: Instruction) -> None:
        flops = work.flops(self.module, self.scope, i)
        moved = work.hbm_bytes(self.module, self.scope, i)
        seconds = max(
            (i.number("estimated_cycles") or 0) / self.chip.clock,
            flops / self.chip.peak_flops,
            moved / self.chip.hbm_bandwidth,
        )
        for scope, call in work.kernels(self.module, self.scope, i):
            declared = work.kernel_flops(scope, call)
            known = KernelCost(declared or 0.0, self.chip.kernel_efficiency)
            if declared is None:
                known = self.timeline.kernels(call) or known
                self.total.unpriced_kernels += known.flops == 0
                flops += known.flops
            seconds = max(seconds, known.flops / self.chip.peak_flops / known.efficiency)
            self.total.kernel_flops += known.flops
        self.total.flops += flops
        self.total.compute += seconds
        self.total.by_name[i.text("op_name") or i.name] += seconds
        self.now += seconds

    # Transfers ----------------------------------------------------------------------------------

    def _until(self, resource: str, end: float) -> None:
        if end > self.now:
            self.total.waiting[resource] += end - self.now
            self.now = end

    def _queue(self, name: str, resource: str, seconds: float) -> None:
        end = max(self.now, self.free[resource]) + seconds
        self.free[resource] = end
        self.pending[name] = (resource, end)

    def _transfer(self, i: Instruction, result, name: str) -> None:
        one = collectives.measure(self.timeline.pod, self.timeline.places, i, result)
        self.total.counts[one.kind] += 1
        self.total.bytes[one.kind] += one.bytes
        self.total.busy[one.kind] += one.seconds
        self._queue(name, "interconnect", one.seconds)

    def _start(self, i: Instruction) -> None:
        if collectives.kind_of(i.opcode):
            self._transfer(i, self._result(i), i.name)
            if '"is_sync":true' in i.attributes:  # XLA's GPU compiler: not beside anything
                self.total.synchronous[collectives.kind_of(i.opcode)] += 1
                self._until(*self.pending[i.name])
        elif i.opcode == "async-start" and not i.operands:
            self.armed[i.name] = i
        else:
            self._begin(i, i.name)

    def _begin(self, i: Instruction, name: str) -> None:
        """What runs beside the TensorCore: a collective, a copy, or work of another core."""
        called = i.called("calls")
        if called and (inside := self.timeline.collective_in(called)):
            return self._transfer(inside, inside.shapes, name)
        operands = [self.scope.by_name[n] for n in i.operands if n in self.scope.by_name]
        does = self.module.computations[called].root.opcode if called else i.opcode
        in_place = does.startswith("dynamic-update-slice")
        moved = sum(s.bytes for s in (operands[1].shapes if in_place else self._result(i)))
        spaces = {s.space for s in (*i.shapes, *(s for o in operands for s in o.shapes))}
        if HOST in spaces:
            self.total.host_bytes += moved
            self._queue(name, "host", moved / self.chip.host_bandwidth)
        elif i.text("async_execution_thread") == "sparsecore":  # reads and writes HBM
            self._queue(name, "sparsecore", 2 * moved / self.chip.hbm_bandwidth)
        else:
            self._queue(name, "dma", moved / self.chip.hbm_bandwidth)

    def _update(self, i: Instruction) -> None:
        """A step between start and done; the one that brings the operands of an armed start."""
        armed = next((n for n in i.operands if n in self.armed), None)
        if armed is not None:
            self._begin(self.armed.pop(armed), i.name)
        else:
            self.pending[i.name] = self.pending.pop(self._origin(i), ("", self.now))

    def _result(self, i: Instruction):
        """Shapes that the done of a start returns."""
        for user in self.scope.users.get(i.name, []):
            if user.opcode.endswith("-done"):
                return user.shapes
            if user.opcode.endswith("-update"):
                return self._result(user)
        return i.shapes[-1:]

    def _origin(self, i: Instruction) -> str:
        return next((n for n in i.operands if n in self.pending), "")

    def _wait(self, i: Instruction) -> None:
        name = self._origin(i)
        if name:
            self._until(*self.pending.pop(name))

    def _fused(self, i: Instruction, role: str, collective: Instruction) -> None:
        """A transfer that is driven from inside compute fusions, known by its channel."""
        channel = "channel " + (re.search(r"channel_id=(\d+)", collective.attributes) or [""])[0]
        if role == "Start":
            self._transfer(collective, collective.shapes, channel)
        elif role == "Done":
            self._until(*self.pending.pop(channel, ("interconnect", self.now)))
        else:
            self._compute(i)
        if role == "Whole":  # fused with what makes its input, waited for on the spot
            self._transfer(collective, collective.shapes, "")
            self._until("interconnect", self.free["interconnect"])


def predict(module: Module, pod: Pod | Nodes, mesh, kernels: Kernels | None = None) -> Cost:
    """The whole step's cost on one device of `mesh` over `pod`.

    Args:
      mesh: whatever has `devices`, an array of devices with `coords`, in the program's order.
      kernels: costs of Pallas calls without a cost estimate, such as those of a library.
    """
    return Timeline(module, pod, mesh, kernels).entry()
