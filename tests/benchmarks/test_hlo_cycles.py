"""Predicted cycles of a program count each operation as often as it runs."""

from benchmarks.hlo_cycles import predicted_cycles


def test_loop_bodies_count_once_per_trip():
    """Two nested loops, 3 × 5 trips of 7 cycles, and 11 cycles outside."""
    hlo = """
%inner_cond (a: s32[]) -> pred[] {
  %n = s32[]{:T(128)} constant(5)
}

%inner (a: s32[]) -> s32[] {
  %f = f32[8] fusion(%x), backend_config={"estimated_cycles":"7"}
}

%cond (a: s32[]) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
}

%body (a: s32[]) -> s32[] {
  %w = (s32[]) while(%t), condition=%inner_cond, body=%inner
}

ENTRY %main (a: s32[]) -> s32[] {
  %w = (s32[]) while(%t), condition=%cond, body=%body
  %g = f32[8] fusion(%x), backend_config={"estimated_cycles":"11"}
}
"""
    assert predicted_cycles(hlo) == 3 * 5 * 7 + 11
