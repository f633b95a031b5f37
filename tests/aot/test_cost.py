"""FLOPs, bytes, transfer times and the simulated schedule against closed forms."""

import pytest

from qwen_jax.aot import collectives, hlo, timeline, work
from tests.aot.pods import mesh, pod


def module(entry: str, *others: str) -> hlo.HloModule:
    """A module of one ENTRY body and further computations."""
    main = "ENTRY %main (p: f32[1]) -> f32[1] {\n" + entry + "\n}"
    return hlo.parse("\n\n".join([*others, main]))


def only(m: hlo.HloModule, opcode: str) -> tuple[hlo.Computation, hlo.Instruction]:
    scope = m.computations[m.entry]
    return scope, next(i for i in scope.instructions if i.opcode == opcode)


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "attributes", "flops"),
    [
        ("f32[64,32]", "f32[32,16]", "f32[64,16]", "dim_labels=bf_io->bf", 2 * 64 * 32 * 16),
        # a product with a batch of 5, as TPUs spell it: one of five kernel places meets data
        (
            *("f32[5,64,32]", "f32[5,32,16]", "f32[5,64,16]"),
            "window={size=5 stride=4 pad=0_0 lhs_dilate=5}, dim_labels=0bf_0io->0bf",
            2 * 5 * 64 * 32 * 16,
        ),
        # contraction over a spatial dimension: a weight's gradient over batch and length
        (
            *("f32[4,128,32]", "f32[4,128,16]", "f32[32,16]"),
            "window={size=128}, dim_labels=f0b_i0o->bf",
            2 * 4 * 128 * 32 * 16,
        ),
        # an image: 3×3 kernel, padding that meets nothing
        (
            *("f32[2,8,8,3]", "f32[3,3,3,5]", "f32[2,8,8,5]"),
            "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            2 * 2 * 3 * 5 * (8 * 3 - 2) ** 2,
        ),
        (
            *("f32[2,8,6]", "f32[1,3,12]", "f32[2,8,12]"),
            "window={size=1}, dim_labels=b0f_0io->b0f, feature_group_count=2",
            2 * 2 * 8 * 3 * 12,
        ),
    ],
)
def test_flops_of_convolutions(lhs, rhs, out, attributes, flops):
    out = out if "f0b" not in attributes else "f32[32,1,16]"
    attributes = attributes.replace("f0b_i0o->bf", "f0b_i0o->b0f")
    m = module(
        f"  %a = {lhs} parameter(0)\n  %b = {rhs} parameter(1)\n"
        f"  ROOT %c = {out} convolution(%a, %b), {attributes}"
    )
    assert work.flops(m, *only(m, "convolution")) == flops


def test_flops_of_a_dot_and_of_a_kernel_estimate():
    m = module(
        "  %a = bf16[3,8,16] parameter(0)\n  %b = bf16[3,16,4] parameter(1)\n"
        "  %d = f32[3,8,4] dot(%a, %b), lhs_batch_dims={0}, lhs_contracting_dims={2}\n"
        '  ROOT %k = f32[9] custom-call(%d), custom_call_target="tpu_custom_call", backend_config='
        '{"custom_call_config":{"cost_estimate":{"flops":"700","transcendentals":"0",'
        '"bytes_accessed":"55"}}}'
    )
    assert work.flops(m, *only(m, "dot")) == 2 * 3 * 8 * 16 * 4
    assert work.flops(m, *only(m, "custom-call")) == 700
    assert work.hbm_bytes(m, *only(m, "custom-call")) == 55


def test_flops_are_found_inside_nested_fusions():
    m = module(
        "  %a = f32[8,16] parameter(0)\n  %b = f32[16,4] parameter(1)\n"
        "  ROOT %f = f32[8,4] fusion(%a, %b), kind=kOutput, calls=%outer",
        "%inner (x: f32[8,16], y: f32[16,4]) -> f32[8,4] {\n  %x = f32[8,16] parameter(0)\n"
        "  %y = f32[16,4] parameter(1)\n  ROOT %c = f32[8,4] convolution(%x, %y), "
        "dim_labels=bf_io->bf\n}",
        "%outer (u: f32[8,16], v: f32[16,4]) -> f32[8,4] {\n  %u = f32[8,16] parameter(0)\n"
        "  %v = f32[16,4] parameter(1)\n"
        "  ROOT %g = f32[8,4] fusion(%u, %v), kind=kOutput, calls=%inner\n}",
    )
    assert work.flops(m, *only(m, "fusion")) == 2 * 8 * 16 * 4


SLICING = (
    "%stack (w: f32[32,8,8], i: s32[], old: f32[32,8,8]) -> f32[32,8,8] {\n"
    "  %w = f32[32,8,8] parameter(0)\n  %i = s32[] parameter(1)\n"
    "  %old = f32[32,8,8] parameter(2)\n  %zero = s32[] constant(0)\n"
    "  %s = f32[1,8,8] dynamic-slice(%w, %i, %zero, %zero), dynamic_slice_sizes={1,8,8}\n"
    "  %n = f32[1,8,8] negate(%s)\n"
    "  ROOT %u = f32[32,8,8] dynamic-update-slice(%old, %n, %i, %zero, %zero)\n}"
)


def test_slices_and_updates_in_place_cost_only_their_own_bytes():
    m = module(
        "  %w = f32[32,8,8] parameter(0)\n  %i = s32[] parameter(1)\n"
        "  %old = f32[32,8,8] parameter(2)\n"
        "  ROOT %f = f32[32,8,8] fusion(%w, %i, %old), kind=kLoop, calls=%stack",
        SLICING,
    )
    one_layer = 8 * 8 * 4
    index = 4
    assert work.hbm_bytes(m, *only(m, "fusion")) == 2 * one_layer + index


def test_values_in_vector_memory_cost_no_hbm_traffic():
    m = module(
        "  %a = f32[1024]{0:S(1)} parameter(0)\n  %b = f32[1024]{0} parameter(1)\n"
        "  ROOT %c = f32[1024]{0:S(1)} add(%a, %b)"
    )
    assert work.hbm_bytes(m, *only(m, "add")) == 4096


def gathered(name: str, groups: str, kind: str = "all-gather", out: str = "bf16[1024,1024]"):
    slice_ = pod(name)
    i = hlo.parse_instruction(f"  %c = {out} {kind}(%x), replica_groups={groups}, dimensions={{0}}")
    places = collectives.coordinates(slice_, mesh(slice_))
    return collectives.estimate(slice_, places, i, i.shapes)


MIB2 = 2 * 2**20  # bytes of bf16[1024,1024]
LINK = 4.5e10  # v5e, one direction


@pytest.mark.parametrize(
    ("topology", "groups", "seconds"),
    [
        ("v5e:16x16", "[1,256]<=[256]", MIB2 * 255 / 256 / (4 * LINK)),  # two rings
        ("v5e:16x16", "[16,16]<=[256]", MIB2 * 15 / 16 / (2 * LINK)),  # along one ring
        ("v5e:4x4", "[1,16]<=[16]", MIB2 * 15 / 16 / (2 * LINK)),  # two lines
        ("v5e:4x4", "[4,4]<=[16]", MIB2 * 3 / 4 / LINK),  # one line
        ("v5e:16x16", "[128,2]<=[256]", MIB2 / 2 / LINK),  # neighbours: no ring of two
        ("v5p:4x4x4", "[1,64]<=[64]", MIB2 * 63 / 64 / (6 * 9e10)),  # three rings
    ],
)
def test_all_gather_time_is_bytes_over_link_bandwidth(topology, groups, seconds):
    found = gathered(topology, groups)
    assert (found.kind, found.bytes) == ("all-gather", MIB2)
    assert found.seconds == pytest.approx(seconds)


def test_other_collectives_relative_to_an_all_gather():
    everyone = "[1,256]<=[256]"
    gather = gathered("v5e:16x16", everyone).seconds
    assert gathered("v5e:16x16", everyone, "all-reduce").seconds == pytest.approx(2 * gather)
    shard = gathered("v5e:16x16", everyone, "reduce-scatter", "bf16[4,1024]")
    assert shard.bytes == MIB2 and shard.seconds == pytest.approx(gather)
    # Each device's 2 MiB meet the middle of a ring of 16: 16/8 of them pass each link.
    traded = gathered("v5e:16x16", everyone, "all-to-all").seconds
    assert traded == pytest.approx(MIB2 * 2 / LINK)


def test_permute_time_is_that_of_its_longest_path():
    slice_ = pod("v5e:16x16")
    places = collectives.coordinates(slice_, mesh(slice_))

    def seconds(pairs):
        i = hlo.parse_instruction(
            f"  %c = bf16[1024,1024] collective-permute(%x), source_target_pairs={pairs}"
        )
        return collectives.estimate(slice_, places, i, i.shapes).seconds

    assert seconds("{{0,1},{1,2}}") == pytest.approx(MIB2 / LINK)
    assert seconds("{{15,0}}") == pytest.approx(MIB2 / LINK)  # round the ring
    assert seconds("{{0,8}}") == pytest.approx(8 * MIB2 / LINK)


def fusion(cycles: int, name: str = "f") -> str:
    return (
        f"  %{name} = f32[8]{{0:S(1)}} fusion(%a), kind=kLoop, calls=%id, "
        f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
    )


IDENTITY = (
    "%id (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0:S(1)} parameter(0)\n"
    "  ROOT %y = f32[8]{0:S(1)} negate(%x)\n}"
)
START = (
    "  %s = (bf16[64,1024], bf16[1024,1024]) all-gather-start(%a), "
    "replica_groups=[1,16]<=[16], dimensions={0}"
)
DONE = "  %d = bf16[1024,1024] all-gather-done(%s)"
FIRST = "  %a = f32[8]{0:S(1)} parameter(0)"


def played(*lines: str, others=()) -> timeline.StepCost:
    slice_ = pod("v5e:4x4")
    program = module("\n".join([FIRST, *lines]), IDENTITY, *others)
    return timeline.predict(program, slice_, mesh(slice_))


GATHER = MIB2 * 15 / 16 / (2 * LINK)
CYCLES = int(GATHER * 1.5e9 / 4)  # a fusion of a quarter of that time
QUARTER = CYCLES / 1.5e9


def test_cycles_are_converted_to_seconds_by_the_clock():
    cost = played(fusion(3_000_000))
    assert cost.seconds == cost.compute == pytest.approx(0.002)


def test_schedule_waits_for_a_synchronous_collective():
    line = "  %c = bf16[1024,1024] all-gather(%a), replica_groups=[1,16]<=[16], dimensions={0}"
    cost = played(fusion(CYCLES), line)
    assert cost.seconds == pytest.approx(QUARTER + GATHER)
    assert cost.waiting["interconnect"] == pytest.approx(GATHER)


def test_asynchronous_collective_overlaps_with_compute():
    some = played(START, fusion(CYCLES), DONE)
    assert some.seconds == pytest.approx(GATHER)
    assert some.waiting["interconnect"] == pytest.approx(GATHER - QUARTER)
    enough = played(START, *(fusion(CYCLES, f"f{n}") for n in range(5)), DONE)
    assert enough.seconds == pytest.approx(5 * QUARTER)
    assert not enough.waiting
    assert enough.counts == some.counts == {"all-gather": 1}
    assert enough.bytes == {"all-gather": MIB2}


def test_two_transfers_run_one_after_the_other_on_the_links():
    second = START.replace("%s =", "%t =")
    cost = played(START, second, DONE, DONE.replace("%d", "%e").replace("(%s)", "(%t)"))
    assert cost.seconds == pytest.approx(2 * GATHER)


def test_sparse_core_collective_begins_when_its_operands_are_supplied():
    offloaded = (
        "%ring (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0:S(1)} parameter(0)\n"
        "  ROOT %g = bf16[1024,1024] all-gather(%x), replica_groups=[1,16]<=[16], "
        "dimensions={0}\n}",
        "%async (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0:S(1)} parameter(0)\n"
        '  ROOT %c = bf16[1024,1024] custom-call(%x), custom_call_target="other", '
        "called_computations={%ring}\n}",
    )
    cost = played(
        '  %s = ((), (), s32[5]) async-start(), async_execution_thread="sparsecore", calls=%async',
        fusion(CYCLES, "before"),
        "  %u = ((f32[8]), bf16[1024,1024], s32[5]) async-update(%s, %a)",
        fusion(CYCLES, "meanwhile"),
        "  %d = bf16[1024,1024] async-done(%u)",
        others=offloaded,
    )
    assert cost.seconds == pytest.approx(QUARTER + GATHER)
    assert cost.counts == {"all-gather": 1} and cost.bytes == {"all-gather": MIB2}


@pytest.mark.parametrize("spelling", ["dynamic-update-slice", "async"])
def test_offloading_costs_the_bytes_of_the_update_only(spelling):
    inner = (
        "%update (x: bf16[1]) -> bf16[1] {\n"
        "  ROOT %u = bf16[32,1024,1024]{2,1,0:S(5)} dynamic-update-slice(%a, %b, %c)\n}"
    )
    cost = played(
        "  %stack = bf16[32,1024,1024]{2,1,0:S(5)} custom-call(), "
        'custom_call_target="AllocateBuffer"',
        '  %one = bf16[1,1024,1024] custom-call(), custom_call_target="AllocateBuffer"',
        "  %i = s32[] constant(3)",
        "  %s = ((bf16[32,1024,1024]{2,1,0:S(5)}, bf16[1,1024,1024], s32[]), "
        "bf16[32,1024,1024]{2,1,0:S(5)}, u32[]) "
        f"{spelling}-start(%stack, %one, %i){', calls=%update' * (spelling == 'async')}",
        f"  %d = bf16[32,1024,1024]{{2,1,0:S(5)}} {spelling}-done(%s)",
        others=(inner,),
    )
    assert cost.host_bytes == MIB2
    assert cost.waiting["host"] == cost.seconds == pytest.approx(MIB2 / 1.6e10)


def test_transfer_fused_into_products_overlaps_with_them():
    def driving(name, last):
        return (
            f"%{name} (x: f32[8]) -> f32[8] {{\n  %x = f32[8]{{0:S(1)}} parameter(0)\n"
            "  %g = bf16[1024,1024] all-gather(%x), channel_id=3, replica_groups=[1,16]<=[16], "
            'dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}\n'
            f"  {last}\n}}"
        )

    call = 'ROOT %r = f32[8]{{0:S(1)}} custom-call(%g), custom_call_target="AsyncCollective{}"'
    others = (
        driving("begin", call.format("Start")),
        driving("step", "ROOT %r = f32[8]{0:S(1)} negate(%x)"),
        driving("end", call.format("Done")),
    )
    lines = [fusion(0, n).replace("%id", f"%{n}") for n in ("begin", "step", "end")]
    lines[1] = lines[1].replace('cycles":"0"', f'cycles":"{CYCLES}"')
    cost = played(*lines, others=others)
    assert cost.counts == {"all-gather": 1}
    assert cost.compute == pytest.approx(QUARTER)
    assert cost.seconds == pytest.approx(GATHER)


LOOPS = (
    "%less{0} (s: (s32[])) -> pred[] {{\n  %s = (s32[]) parameter(0)\n"
    "  %i = s32[] get-tuple-element(%s), index=0\n  %n = s32[] constant({1})\n"
    "  ROOT %c = pred[] compare(%i, %n), direction=LT\n}}"
)


def test_loops_multiply_costs_when_nested():
    inner = (
        "%inner (s: (s32[])) -> (s32[]) {\n  %s = (s32[]) parameter(0)\n"
        '  %a = f32[8]{0:S(1)} custom-call(), custom_call_target="AllocateBuffer"\n'
        + fusion(300)
        + "\n  ROOT %t = (s32[]) tuple(%s)\n}"
    )
    outer = (
        "%outer (s: (s32[])) -> (s32[]) {\n  %s = (s32[]) parameter(0)\n"
        "  %zero = s32[] constant(0)\n  %init = (s32[]) tuple(%zero)\n"
        "  ROOT %w = (s32[]) while(%init), condition=%less1, body=%inner\n}"
    )
    cost = played(
        "  %zero = s32[] constant(0)\n  %init = (s32[]) tuple(%zero)\n"
        "  %w = (s32[]) while(%init), condition=%less2, body=%outer",
        others=(LOOPS.format(1, 7), LOOPS.format(2, 3), inner, outer),
    )
    assert cost.seconds == pytest.approx(7 * 3 * 300 / 1.5e9)


def test_conditional_costs_its_longest_branch():
    branch = "%branch{0} (x: f32[8]) -> f32[8] {{\n  %a = f32[8]{{0:S(1)}} parameter(0)\n{1}\n}}"
    cost = played(
        "  %p = s32[] constant(0)\n"
        "  %c = f32[8] conditional(%p, %a, %a), branch_computations={%branch0, %branch1}",
        others=(branch.format(0, fusion(100)), branch.format(1, fusion(900))),
    )
    assert cost.seconds == pytest.approx(900 / 1.5e9)


def test_kernel_time_follows_from_efficiency_or_bytes():
    line = (
        '  %k = f32[8] custom-call(%a), custom_call_target="tpu_custom_call", backend_config={{'
        '"custom_call_config":{{"cost_estimate":{{"flops":"{0}","transcendentals":"0",'
        '"bytes_accessed":"{1}"}}}}}}'
    )
    chip = pod("v5e:4x4").chip
    busy = played(line.format(10**12, 1))
    assert busy.seconds == pytest.approx(1e12 / chip.peak_flops / chip.kernel_efficiency)
    assert busy.kernel_flops == busy.flops == 10**12 and busy.unpriced_kernels == 0
    assert played(line.format(1, 10**9)).seconds == pytest.approx(1e9 / chip.hbm_bandwidth)
    bare = played('  %k = f32[8] custom-call(%a), custom_call_target="tpu_custom_call"')
    assert bare.unpriced_kernels == 1


def test_cost_of_a_kernel_without_estimate_can_be_supplied():
    bare = 'custom-call(%a), custom_call_target="tpu_custom_call"'
    m = module(f"  %a = f32[8] parameter(0)\n  %k = f32[8] {bare}\n  %j = f32[8] {bare}")
    slice_ = pod("v5e:4x4")

    def kernels(call):
        return timeline.KernelCost(1e12, 0.25) if call.name == "k" else None

    cost = timeline.predict(m, slice_, mesh(slice_), kernels)
    moved = 2 * 32 / slice_.chip.hbm_bandwidth  # of the other, priced by its bytes
    assert cost.seconds == pytest.approx(1e12 / slice_.chip.peak_flops / 0.25 + moved)
    assert cost.flops == cost.kernel_flops == 1e12 and cost.unpriced_kernels == 1


def test_kernel_estimate_takes_precedence_over_a_supplied_cost():
    declared = (
        '  %k = f32[8] custom-call(%a), custom_call_target="tpu_custom_call", backend_config={'
        '"cost_estimate":{"flops":"1000000000000","transcendentals":"0","bytes_accessed":"1"}}'
    )
    m = module("  %a = f32[8] parameter(0)\n" + declared)
    slice_ = pod("v5e:4x4")
    cost = timeline.predict(m, slice_, mesh(slice_), lambda call: timeline.KernelCost(1.0, 1.0))
    assert cost.flops == 1e12
