"""The HLO parser on hand-written text: types, operands, attributes, trip counts, groups."""

import pytest

from qwen_jax.aot import collectives, hlo

LOOP = """HloModule toy, is_scheduled=true

%cond.1 (state: (s32[], f32[4,8])) -> pred[] {
  %state = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)S(1)}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%state), index=0
  %bound = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[]{:T(512)} compare(%counter, %bound), direction=LT
}

%body.1 (state.1: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %state.1 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)S(1)}) parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %i = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %x = f32[4,8]{1,0:T(8,128)S(1)} get-tuple-element(%state.1), index=1
  %next = s32[]{:T(128)} add(%i, %one)
  ROOT %out = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)S(1)}) tuple(%next, %x)
}

ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0:T(8,128)} parameter(0)
  %first = s32[]{:T(128)} constant(2)
  %init = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)S(1)}) tuple(%first, %p)
  %loop = (s32[], /*index=1*/f32[4,8]{1,0:T(8,128)S(1)}) while(%init), condition=%cond.1, \
body=%body.1, metadata={op_name="jit(f)/while {not a bracket"}
  ROOT %result = f32[4,8]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def instruction(text):
    found = hlo.parse_instruction(text)
    assert found is not None
    return found


def test_parsed_shapes_flatten_tuples_and_have_memory_spaces():
    shapes = hlo.parse_shapes("(bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, (f32[]), u8[5]{0:S(5)}, token[])")
    assert [(s.dtype, s.dims, s.space, s.bytes) for s in shapes] == [
        ("bf16", (2, 3), hlo.VMEM, 12),
        ("f32", (), hlo.HBM, 4),
        ("u8", (5,), hlo.HOST, 5),
        ("token", (), hlo.HBM, 0),
    ]


def test_instruction_is_parsed_into_its_parts():
    i = instruction(
        "  ROOT %f.1 = bf16[8,16]{1,0} fusion(%a.2, /*index=1*/%b), kind=kLoop, calls=%inner.3, "
        'metadata={op_name="x(y)}"}, backend_config={"estimated_cycles":"123","n":-4}'
    )
    assert (i.name, i.opcode, i.operands, i.root) == ("f.1", "fusion", ("a.2", "b"), True)
    assert i.called("calls") == "inner.3" and i.called("body") is None
    assert i.text("op_name") == "x(y)}"
    assert i.number("estimated_cycles") == 123 and i.number("n") == -4 and i.number("m") is None


def test_lines_that_are_not_instructions_give_none():
    for line in ("", "}", "FileNames", '1 "a = b.py"', "1 {file_name_id=1 line=2}"):
        assert hlo.parse_instruction(line) is None


def test_values_with_line_breaks_are_parsed():
    text = """ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %k = f32[8]{0} custom-call(%p), frontend_attributes={kernel_metadata={
"note":"{\\"block_q\\": 512}"
}}, metadata={op_name="layer/kernel"}, backend_config={"estimated_cycles":"7"}
  ROOT %copy = f32[8]{0} copy(%k), metadata={op_name="a } quoted { bracket"}
}, execution_thread="main"
"""
    m = hlo.parse(text)
    assert list(m.computations) == ["main"]
    _, kernel, last = m.computations["main"].instructions
    assert kernel.number("estimated_cycles") == 7 and kernel.text("op_name") == "layer/kernel"
    assert last.root and last.opcode == "copy"


def test_unparsable_line_in_a_computation_is_refused():
    head = "ENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n"
    with pytest.raises(ValueError, match="not an instruction:   something new"):
        hlo.parse(head + "  something new\n}\n")
    for cut in ("", "  %k = f32[8]{0} copy(%p), metadata={\n}\n"):
        with pytest.raises(ValueError, match="ends inside the computation main"):
            hlo.parse(head + cut)


def test_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing\n")


def test_trip_count_uses_the_initial_value_of_the_counter():
    module = hlo.parse(LOOP)
    entry = module.computations[module.entry]
    assert entry.name == "main" and entry.root.name == "result"
    assert hlo.trip_count(module, entry, entry.by_name["loop"]) == 5


def test_known_trip_count_of_the_compiler_takes_precedence():
    known = 'body=%body.1, backend_config={"known_trip_count":{"n":"11"}}'
    module = hlo.parse(LOOP.replace("body=%body.1", known))
    entry = module.computations[module.entry]
    assert hlo.trip_count(module, entry, entry.by_name["loop"]) == 11


def test_trip_count_is_found_in_a_fused_condition():
    fused = """
%less (l: s32[], r: s32[]) -> pred[] {
  %r = s32[] parameter(1)
  %l = s32[] parameter(0)
  ROOT %c = pred[] compare(%l, %r), direction=LT
}
"""
    text = LOOP.replace("%cond.1 (state", fused.strip() + "\n\n%cond.1 (state").replace(
        "compare(%counter, %bound), direction=LT", "fusion(%counter, %bound), calls=%less"
    )
    module = hlo.parse(text)
    entry = module.computations[module.entry]
    assert hlo.trip_count(module, entry, entry.by_name["loop"]) == 5


def test_loop_of_another_form_is_refused():
    module = hlo.parse(LOOP.replace("direction=LT", "direction=NE"))
    entry = module.computations[module.entry]
    with pytest.raises(ValueError, match="trip count of loop loop"):
        hlo.trip_count(module, entry, entry.by_name["loop"])


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'c','a'}", [[0, 4, 1, 5], [2, 6, 3, 7]]),
        (
            "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}",
            [[0, 2, 4, 6], [1, 3, 5, 7]],
        ),
        (
            "replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}",
            [[0, 1], [2, 3], [4, 5], [6, 7]],
        ),
        (
            "replica_groups=mesh['a'=4,'b'=2], device_ids=([8]) {'b'}",
            [[0, 1], [2, 3], [4, 5], [6, 7]],
        ),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_replica_groups_are_parsed_in_every_notation(attribute, expected):
    i = instruction(f"  %c = f32[8] all-reduce(%x), channel_id=1, {attribute}, to_apply=%add")
    assert collectives.groups(i, 8) == expected


def test_replica_groups_in_an_unknown_notation_are_refused():
    i = instruction("  %c = f32[8] all-reduce(%x), replica_groups=mesh['a'=8] {'a':(1)2}")
    with pytest.raises(ValueError, match="replica groups of c"):
        collectives.groups(i, 8)
