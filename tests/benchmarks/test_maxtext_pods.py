"""Comparison with MaxText: programs, prices and figures, without MaxText or a TPU compiler."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks import maxtext_pods
from benchmarks.maxtext_pods import splash_costs
from benchmarks.maxtext_programs import PodProgram, make_programs
from qwen_jax.aot import hlo, topology
from qwen_jax.errors import UserError
from qwen_jax.train.flops import train_flops_per_token

V5E, _ = topology.parse("v5e:16x16")


def program(name: str) -> PodProgram:
    """Returns a program by name."""
    return next(p for p in make_programs() if p.name == name)


def call(phase: str, heads: int = 32, kv_heads: int = 32, target: str = "splash_mha") -> str:
    """Returns a call of splash attention as the compiler prints it, over several lines."""
    suffix = "" if phase == "fwd" else f"_{phase}"
    blocks = f'\\"block_q{suffix}\\": 512, \\"block_kv{suffix}\\": 512'
    row, keys = f"bf16[4,{heads},4096,128]", f"bf16[4,{kv_heads},4096,128]"
    return (
        f"  %{target}_{phase}_segmented.1 = {row}{{3,2,1,0}} custom-call(%a), "
        'custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,8,8]{2,1,0}, '
        f"{row}{{3,2,1,0}}, {keys}{{3,2,1,0}}, {keys}{{3,2,1,0}}, s32[4,4096,128]{{2,1,0}}}}, "
        f'frontend_attributes={{kernel_metadata={{\n"xprof_metadata":"{{{blocks}}}"\n}}}}'
    )


def module(*lines: str) -> str:
    """Returns the HLO text of a program with these instructions."""
    head = "ENTRY %main (a: f32[1]) -> f32[1] {\n  %a = f32[1] parameter(0)\n"
    return head + "\n".join(lines) + "\n  ROOT %b = f32[1] copy(%a)\n}\n"


def only_instruction(line: str) -> hlo.Instruction:
    """Returns the parsed form of one instruction."""
    return hlo.parse(module(line)).computations["main"].instructions[1]


@pytest.mark.parametrize(("phase", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_splash_is_priced_at_its_profiled_cycles_per_head(phase, products):
    cost = splash_costs(V5E, own_speed=True)(only_instruction(call(phase)))
    heads = 4 * 32
    assert cost.flops == heads * products * 2 * (4096**2 / 2) * 128
    seconds = cost.flops / V5E.peak_flops / cost.efficiency
    cycles = maxtext_pods.SPLASH_CYCLES["v5e", phase, 512, 512]
    assert seconds == pytest.approx(heads * cycles / V5E.clock)


def test_splash_flops_do_not_depend_on_the_number_of_kv_heads():
    grouped = splash_costs(V5E, own_speed=True)(only_instruction(call("dkv", kv_heads=8)))
    assert grouped.flops == splash_costs(V5E, own_speed=True)(only_instruction(call("dkv"))).flops


def test_pricing_at_our_kernels_share_changes_only_the_efficiency():
    own, ours = (
        splash_costs(V5E, own_speed=own)(only_instruction(call("dq"))) for own in (True, False)
    )
    assert own.flops == ours.flops and ours.efficiency == V5E.kernel_efficiency


def test_listed_cycles_are_profiled_again(monkeypatch):
    def run_case(module, case):
        if case["chip"] == "v5p":
            return {"error": "no such instruction"}
        parts = ("fwd",) if case["phase"] == "forward" else ("dq", "dkv")
        return {f"splash_mha_{part}_no_residuals.1": len(part) for part in parts}

    monkeypatch.setattr(maxtext_pods.cycle_profile, "run_case", run_case)
    lines = list(maxtext_pods.profile_splash())
    assert len(lines) == len(maxtext_pods.SPLASH_CYCLES)
    assert "v5e dq [512, 512]: 2, listed 88299" in lines
    assert "v6e dkv [2048, 512]: 3, listed 62038" in lines
    assert sum("no such instruction" in line for line in lines) == 3


def facts(devices: int = 256) -> dict:
    """Returns the JSON that `maxtext_child` writes, for a slice of v5e chips."""
    return {
        "coordinates": [[n // 16, n % 16, 0] for n in range(devices)],
        "peak_bytes": 3 * 2**30,
        "compile_seconds": 1.0,
        "versions": {"jax": "1"},
        "flags": [],
        "settings": {"remat_policy": "full"},
    }


def test_figures_are_per_chip_and_step_by_our_count_of_flops():
    theirs = program("maxtext llama2-7b v5e-256")
    product = (
        "  %m = bf16[8192,4096] dot(%x, %y), lhs_contracting_dims={1}, "
        'backend_config={"estimated_cycles":"1500000000"}'
    )
    inputs = (
        "  %x = bf16[8192,4096] parameter(1)",
        "  %y = bf16[4096,4096] parameter(2)",
    )
    text = module(*inputs, product, call("fwd"))
    made = maxtext_pods.price_theirs(theirs, text, facts())
    kernel = splash_costs(V5E, own_speed=True)(only_instruction(call("fwd")))
    attention = kernel.flops / V5E.peak_flops / kernel.efficiency
    assert made["step_seconds"] == pytest.approx(1 + attention, rel=1e-6)  # + copying one number
    executed = 2 * 8192 * 4096**2 + kernel.flops
    model = train_flops_per_token(theirs.model, 2048) * 4 * 2048
    assert made["executed_over_model"] == pytest.approx(executed / model)
    assert made["mfu"] == pytest.approx(model / made["step_seconds"] / V5E.peak_flops)
    assert made["tokens_per_second_per_chip"] == pytest.approx(8192 / made["step_seconds"])
    alone = 1 + kernel.flops / V5E.peak_flops
    assert made["mfu_of_cycles_alone"] == pytest.approx(model / alone / V5E.peak_flops)
    assert made["peak_gib"] == 3


def test_a_kernel_of_unknown_cost_is_refused():
    theirs = program("maxtext llama2-7b v5e-256")
    with pytest.raises(UserError, match="calls 1 kernels that neither declare"):
        maxtext_pods.price_theirs(theirs, module(call("fwd", target="other")), facts())


def test_llama_config_differs_from_qwen_in_the_vocabulary_only():
    llama = program("maxtext llama2-7b v5e-256").model
    qwen = program("qwen_jax qwen-7b v5e-256").model
    assert dataclasses.replace(llama, vocab_size=qwen.vocab_size) == qwen
    # 32 layers of 4·4096² + 3·4096·11008 and the output layer, 6 FLOPs each; causal attention
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    attention = 32 * 12 * 4096 * (2048 + 1) / 2
    assert train_flops_per_token(llama, 2048) == 6 * (layers + 4096 * 32_000) + attention


def test_a_finished_compilation_is_not_repeated(tmp_path, monkeypatch):
    theirs, calls = program("maxtext llama2-7b v5e-256"), []

    def compile_theirs(one, stem, maxtext):
        calls.append(one.name)
        stem.with_name(stem.name + ".hlo").write_text(module(call("fwd")))
        stem.with_name(stem.name + ".json").write_text(json.dumps(facts()))

    monkeypatch.setattr(maxtext_pods, "compile_theirs", compile_theirs)
    maxtext = maxtext_pods.MaxText(tmp_path, sys.executable)
    first = maxtext_pods.measure(theirs, tmp_path, maxtext)
    assert maxtext_pods.measure(theirs, tmp_path, maxtext) == first and calls == [theirs.name]
    other = dataclasses.replace(theirs, rows=2)
    maxtext_pods.measure(other, tmp_path, maxtext)  # other inputs under the same name
    assert len(calls) == 2
    table = maxtext_pods.format_table({theirs.name: first, "broken": {"error": "why"}})
    assert len({line.count("|") for line in table.splitlines()}) == 1
    assert f"{first['mfu']:.3f}" in table and "| broken | why |" in table


def test_a_failed_compilation_reports_the_compilers_message(tmp_path):
    failing = [sys.executable, "-c", "import sys; sys.exit('the compiler says no')"]
    with pytest.raises(UserError, match="was not compiled: the compiler says no"):
        maxtext_pods._run_compiler("a program", failing)


RECIPES = """
class Model:
    def __init__(self, **kw): self.__dict__.update(kw)

one = Model(model_name="one", model_type="llama", tuning_params={"remat_policy": "full"},
            xla_flags=" --a=true --fusion_b=true")
two = Model(model_name="two", model_type="other", tuning_params={}, xla_flags="")
"""
CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import maxtext_child
print(json.dumps(maxtext_child.read_recipe(json.loads(sys.argv[2]))))
"""


def test_recipes_and_flags_are_read_from_the_checkout(tmp_path):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "recipes.py").write_text(RECIPES)
    (folder / "xla_flags_library.py").write_text('MORE = " --c=1"\nLESS = " --d=2"\n')
    case = {"checkout": str(tmp_path), "module": "benchmarks.recipes", "recipe": "one"}
    case |= {"overrides": {"run_name": "aot"}}

    def read(**more):
        here = str(pathlib.Path(maxtext_pods.__file__).parent)
        command = [sys.executable, "-c", CHILD, here, json.dumps(case | more)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        return json.loads(done.stdout)

    settings, given = read()
    assert settings == {"model_name": "llama", "remat_policy": "full", "run_name": "aot"}
    assert given == ["--a=true", "--fusion_b=true"]
    assert read(without_flags=["fusion"])[1] == ["--a=true"]
    assert read(flag_groups=["LESS", "MORE"])[1] == ["--d=2", "--c=1"]
