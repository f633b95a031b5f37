"""Prediction of the duration of a compiled step by simulating its schedule.

One device executes its operations in the order that the compiler scheduled. An operation takes the
longest of the compiler's own estimate (`estimated_cycles`), its FLOPs at peak and its HBM traffic
at full bandwidth; a Pallas call, for which the compiler has no estimate, its declared FLOPs at the
chip's `kernel_efficiency`, or its declared bytes (the caller may supply the cost of kernels that
declare none: `KernelCost`). Asynchronous transfers run concurrently, one at a time per resource
(interconnect, host link, DMA, SparseCore), and delay the schedule only where it waits for one that
has not finished. The cost of a loop is that of its body times its trip count.

For GPUs there is neither a compiler estimate nor a measured kernel: the result is the roofline, the
least time that the schedule can take.

Nothing here was measured on hardware: latencies, launch overheads, contention between HBM traffic
and DMA, and input are ignored.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable

from qwen_jax.aot import collectives, work
from qwen_jax.aot.hlo import HOST, Computation, HloModule, Instruction, trip_count
from qwen_jax.aot.nodes import Nodes
from qwen_jax.aot.topology import Pod


def _zeros() -> defaultdict[str, float]:
    """Returns a mapping in which missing keys are 0."""
    return defaultdict(float)


@dataclasses.dataclass
class StepCost:
    """Predicted totals of a computation on one device, with loops multiplied out.

    Attributes:
      seconds: time until the last operation has finished.
      compute: seconds of operations on the cores.
      flops: executed FLOPs.
      kernel_flops: FLOPs of Pallas calls.
      unpriced_kernels: number of Pallas calls with unknown FLOPs.
      waiting: seconds the schedule waited, by resource.
      counts: number of collectives, by kind.
      bytes: bytes of collectives, by kind.
      busy: seconds of collectives, by kind.
      synchronous: number of collectives that GPUs wait for at once, by kind.
      host_bytes: bytes moved to or from host memory.
      by_name: seconds on the cores by op_name, to find slow operations.
    """

    seconds: float = 0.0
    compute: float = 0.0
    flops: float = 0.0
    kernel_flops: float = 0.0
    unpriced_kernels: int = 0
    waiting: defaultdict[str, float] = dataclasses.field(default_factory=_zeros)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    bytes: Counter[str] = dataclasses.field(default_factory=Counter)
    busy: defaultdict[str, float] = dataclasses.field(default_factory=_zeros)
    synchronous: Counter[str] = dataclasses.field(default_factory=Counter)
    host_bytes: int = 0
    by_name: defaultdict[str, float] = dataclasses.field(default_factory=_zeros)

    def add(self, other: StepCost, times: int = 1) -> None:
        """Adds all fields of `other` except `seconds`, multiplied by `times`."""
        for name in ("compute", "flops", "kernel_flops", "unpriced_kernels", "host_bytes"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for name in ("waiting", "counts", "bytes", "busy", "synchronous", "by_name"):
            mine = getattr(self, name)
            for key, value in getattr(other, name).items():
                mine[key] += times * value


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """Cost of a Pallas call.

    Attributes:
      flops: FLOPs of one call.
      efficiency: share of the chip's peak FLOP/s that it reaches.
    """

    flops: float
    efficiency: float


KernelCosts = Callable[[Instruction], KernelCost | None]
"""Returns the cost of a Pallas call without a cost estimate; None: only its bytes are counted."""

_ASYNC_FUSION = re.compile(r"AsyncCollective(Start|Done)")


class Timeline:
    """Predictor of the cost of the computations of one module, for one pod and mesh."""

    def __init__(
        self, module: HloModule, pod: Pod | Nodes, mesh, kernel_costs: KernelCosts | None = None
    ):
        """Sets up the prediction.

        Args:
          module: the compiled program.
          pod: TPU slice or GPU nodes that it runs on.
          mesh: its mesh; anything with `devices`, an array of devices with `coords`.
          kernel_costs: costs of Pallas calls without a cost estimate.
        """
        self.module, self.pod = module, pod
        self.kernel_costs = kernel_costs or (lambda call: None)
        self.coordinates = collectives.coordinates(pod, mesh)
        self._costs: dict[str, StepCost] = {}

    def entry(self) -> StepCost:
        """Returns the cost of the complete step."""
        return self.cost(self.module.entry)

    def cost(self, name: str) -> StepCost:
        """Returns the cost of one execution of a computation."""
        if name not in self._costs:
            self._costs[name] = _Simulation(self, self.module.computations[name]).run()
        return self._costs[name]

    def collective_in(self, computation: str) -> Instruction | None:
        """Returns the collective in a computation or in one that it calls, or None."""
        for i in self.module.computations[computation].instructions:
            if collectives.kind_of(i.opcode):
                return i
            for key in ("to_apply", "calls", "called_computations"):
                if (called := i.called(key)) and (found := self.collective_in(called)):
                    return found
        return None

    @functools.cache  # noqa: B019  (a timeline lives as long as its report)
    def fused_collective(self, computation: str) -> tuple[str, Instruction] | None:
        """Returns (role, collective) of a fusion that is part of a collective transfer, or None.

        A transfer may be started in one fusion (role "Start"), continued from inside unrelated
        matrix products ("Step", also in the body of a loop) and waited for in a third ("Done"); or
        be fused completely ("Whole").
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


class _Simulation:
    """Simulation of one execution of one computation."""

    def __init__(self, timeline: Timeline, scope: Computation):
        self.timeline, self.scope = timeline, scope
        self.module, self.chip = timeline.module, timeline.pod.chip
        self.total = StepCost()
        self.now = 0.0
        self.free: dict[str, float] = defaultdict(float)  # time at which a resource becomes idle
        # Transfers in flight: name -> (resource, time at which it ends).
        self.pending: dict[str, tuple[str, float]] = {}
        # Starts without operands, which a later update supplies.
        self.deferred: dict[str, Instruction] = {}

    def run(self) -> StepCost:
        """Executes all instructions in order and returns the totals."""
        for i in self.scope.instructions:
            self._execute(i)
        self.total.seconds = self.now
        return self.total

    def _execute(self, i: Instruction) -> None:
        """Advances the time by one instruction."""
        if work.is_free(i):
            return
        if i.opcode == "while":
            body = self.timeline.cost(self.module.called(i, "body").name)
            self._add_called(body, trip_count(self.module, self.scope, i))
        elif i.opcode == "call":
            self._add_called(self.timeline.cost(self.module.called(i, "to_apply").name), 1)
        elif i.opcode == "conditional":
            self._add_called(self._longest_branch(i), 1)
        elif i.opcode.endswith("-done"):
            self._handle_done(i)
        elif i.opcode.endswith("-update"):
            self._handle_update(i)
        elif i.opcode.endswith("-start"):
            self._handle_start(i)
        elif collectives.kind_of(i.opcode):
            self._transfer(i, i.shapes, "")
            self._wait_until("interconnect", self.free["interconnect"])
        elif i.opcode == "fusion" and (fused := self.timeline.fused_collective(i.called("calls"))):
            self._handle_fused(i, *fused)
        else:
            self._compute(i)

    def _add_called(self, cost: StepCost, times: int) -> None:
        """Adds the cost of a called computation, `times` times."""
        self.total.add(cost, times)
        self.now += times * cost.seconds

    def _longest_branch(self, i: Instruction) -> StepCost:
        """Returns the cost of the slowest branch of a conditional."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
        names = re.findall(r"%?([\w.\-]+)", listed[1]) if listed else []
        names = names or [
            self.module.called(i, key).name for key in ("true_computation", "false_computation")
        ]
        return max((self.timeline.cost(name) for name in names), key=lambda c: c.seconds)

    def _compute(self, i: Instruction) -> None:
        """Adds an operation that runs on the cores."""
        flops = work.flops(self.module, self.scope, i)
        moved = work.hbm_bytes(self.module, self.scope, i)
        seconds = max(
            (i.number("estimated_cycles") or 0) / self.chip.clock,
            flops / self.chip.peak_flops,
            moved / self.chip.hbm_bandwidth,
        )
        for scope, call in work.pallas_calls(self.module, self.scope, i):
            declared = work.kernel_flops(scope, call)
            known = KernelCost(declared or 0.0, self.chip.kernel_efficiency)
            if declared is None:
                known = self.timeline.kernel_costs(call) or known
                self.total.unpriced_kernels += known.flops == 0
                flops += known.flops
            seconds = max(seconds, known.flops / self.chip.peak_flops / known.efficiency)
            self.total.kernel_flops += known.flops
        self.total.flops += flops
        self.total.compute += seconds
        self.total.by_name[i.text("op_name") or i.name] += seconds
        self.now += seconds

    # Transfers ----------------------------------------------------------------------------------

    def _wait_until(self, resource: str, end: float) -> None:
        """Advances the time to `end`, counted as waiting for `resource`."""
        if end > self.now:
            self.total.waiting[resource] += end - self.now
            self.now = end

    def _queue(self, name: str, resource: str, seconds: float) -> None:
        """Starts a transfer that takes `seconds` of `resource` after earlier ones.

        Args:
          name: name under which it is waited for.
          resource: "interconnect", "host", "dma" or "sparsecore".
          seconds: duration.
        """
        end = max(self.now, self.free[resource]) + seconds
        self.free[resource] = end
        self.pending[name] = (resource, end)

    def _transfer(self, i: Instruction, result, name: str) -> None:
        """Starts a collective on the interconnect.

        Args:
          i: the collective.
          result: shapes that it returns.
          name: name under which it is waited for.
        """
        collective = collectives.estimate(self.timeline.pod, self.timeline.coordinates, i, result)
        self.total.counts[collective.kind] += 1
        self.total.bytes[collective.kind] += collective.bytes
        self.total.busy[collective.kind] += collective.seconds
        self._queue(name, "interconnect", collective.seconds)

    def _handle_start(self, i: Instruction) -> None:
        """Handles a `-start` instruction."""
        if kind := collectives.kind_of(i.opcode):
            self._transfer(i, self._result_shapes(i), i.name)
            if '"is_sync":true' in i.attributes:  # XLA's GPU compiler: not overlapped with anything
                self.total.synchronous[kind] += 1
                self._wait_until(*self.pending[i.name])
        elif i.opcode == "async-start" and not i.operands:
            self.deferred[i.name] = i
        else:
            self._begin_transfer(i, i.name)

    def _begin_transfer(self, i: Instruction, name: str) -> None:
        """Starts work beside the TensorCore: a collective, a copy, or SparseCore work.

        Args:
          i: instruction that starts it.
          name: name of the instruction whose `-done` waits for it.
        """
        called = i.called("calls")
        if called and (inside := self.timeline.collective_in(called)):
            return self._transfer(inside, inside.shapes, name)
        operands = [self.scope.by_name[n] for n in i.operands if n in self.scope.by_name]
        opcode = self.module.computations[called].root.opcode if called else i.opcode
        in_place = opcode.startswith("dynamic-update-slice")
        moved = sum(s.bytes for s in (operands[1].shapes if in_place else self._result_shapes(i)))
        spaces = {s.space for s in (*i.shapes, *(s for o in operands for s in o.shapes))}
        if HOST in spaces:
            self.total.host_bytes += moved
            self._queue(name, "host", moved / self.chip.host_bandwidth)
        elif i.text("async_execution_thread") == "sparsecore":  # reads and writes HBM
            self._queue(name, "sparsecore", 2 * moved / self.chip.hbm_bandwidth)
        else:
            self._queue(name, "dma", moved / self.chip.hbm_bandwidth)

    def _handle_update(self, i: Instruction) -> None:
        """Handles an `-update` instruction, between start and done.

        It either supplies the operands of a deferred start, which begins now, or renames the
        transfer.
        """
        deferred = next((n for n in i.operands if n in self.deferred), None)
        if deferred is not None:
            self._begin_transfer(self.deferred.pop(deferred), i.name)
        else:
            self.pending[i.name] = self.pending.pop(self._pending_operand(i), ("", self.now))

    def _result_shapes(self, i: Instruction):
        """Returns the shapes that the `-done` of a start returns."""
        for user in self.scope.users.get(i.name, []):
            if user.opcode.endswith("-done"):
                return user.shapes
            if user.opcode.endswith("-update"):
                return self._result_shapes(user)
        return i.shapes[-1:]

    def _pending_operand(self, i: Instruction) -> str:
        """Returns the name of the operand that is a transfer in flight, or ""."""
        return next((n for n in i.operands if n in self.pending), "")

    def _handle_done(self, i: Instruction) -> None:
        """Handles a `-done` instruction: waits for its transfer."""
        name = self._pending_operand(i)
        if name:
            self._wait_until(*self.pending.pop(name))

    def _handle_fused(self, i: Instruction, role: str, collective: Instruction) -> None:
        """Handles a fusion that is part of a transfer; transfers are identified by their channel.

        Args:
          i: the fusion.
          role: as `Timeline.fused_collective` returns it.
          collective: the collective.
        """
        channel = "channel " + (re.search(r"channel_id=(\d+)", collective.attributes) or [""])[0]
        if role == "Start":
            self._transfer(collective, collective.shapes, channel)
        elif role == "Done":
            self._wait_until(*self.pending.pop(channel, ("interconnect", self.now)))
        else:
            self._compute(i)
        if role == "Whole":  # fused with the computation of its input and waited for at once
            self._transfer(collective, collective.shapes, "")
            self._wait_until("interconnect", self.free["interconnect"])


def predict(
    module: HloModule, pod: Pod | Nodes, mesh, kernel_costs: KernelCosts | None = None
) -> StepCost:
    """Predicts the cost of a complete step on one device.

    Args:
      module: the compiled program.
      pod: TPU slice or GPU nodes that it runs on.
      mesh: anything with `devices`, an array of devices with `coords`, in the program's order.
      kernel_costs: costs of Pallas calls without a cost estimate, such as those of a library.
    """
    return Timeline(module, pod, mesh, kernel_costs).entry()
