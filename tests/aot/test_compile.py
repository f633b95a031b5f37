"""Real compilations for chips that are not attached: closed forms, reports and refusals."""

import json
import subprocess
import sys

import pytest

from qwen_jax.aot import topology
from qwen_jax.aot.compile import needed_bytes
from qwen_jax.errors import UserError
from tests import programs
from tests.aot import compiled
from tests.tpu import needs_libtpu

TOY = (
    "launch.aot",
    "--config=configs/pretrain.py:toy",
    "--config.model.head_dim=128",
    "--config.options.remat=full",
    "--config.mesh.fsdp=-1",
    "--config.mesh.tensor=1",
)
CHIPS = {"v5e:2x2": 4, "v5p:2x2x1": 4, "v6e:2x2": 4}


@pytest.fixture(scope="module")
def small():
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot.compiled"],
        cwd=programs.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_libtpu
def test_nested_loops_multiply_costs_by_trip_counts(small):
    c = compiled
    found = small["nested"]
    products = c.LAYERS * c.INNER
    assert found["flops"] == products * 2 * c.ROWS * c.WIDTH * c.WIDTH
    assert found["counts"] == {"all-gather": c.LAYERS}
    assert found["bytes"] == {"all-gather": c.LAYERS * c.WIDTH * c.WIDTH * 2}
    # Two lines of two chips: three quarters of the weights arrive over two links.
    wire = c.LAYERS * c.WIDTH * c.WIDTH * 2 * 0.75 / (2 * 4.5e10)
    assert found["busy"]["all-gather"] == pytest.approx(wire)
    assert found["seconds"] >= found["flops"] / 197e12


@needs_libtpu
def test_pallas_call_costs_its_estimate_in_every_trip(small):
    assert small["kernel"]["kernel_flops"] == small["kernel"]["flops"] == 7 * 10**6
    assert small["kernel"]["seconds"] >= 7 * 10**5 / 8.1e11


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What the program says for the toy on each chip, its HLO, and two that can't be served."""
    folder = tmp_path_factory.mktemp("aot")
    calls = [
        [*TOY, f"--topology={chip}", "--per_device_batch=2", f"--dump_hlo={folder}/{i}.gz"]
        for i, chip in enumerate(CHIPS)
    ]
    calls.append([*TOY, "--topology=v5e:2x2", "--config.data.global_batch=6"])
    calls.append([*TOY, "--topology=v5e:2x2", "--config.model.n_layers=2000000"])
    return programs.run(calls, timeout=500), folder


def parsed(done: programs.Done) -> dict:
    start = done.output.index("{\n")
    return json.loads(done.output[start : done.output.rindex("}") + 1])


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CHIPS)), ids=list(CHIPS))
def test_real_step_of_a_toy_compiles_for_every_chip(reports, number):
    done, folder = reports[0][number], reports[1]
    assert done.status == 0, done.output
    made = parsed(done)
    assert made["topology"] == list(CHIPS)[number] and made["devices"] == 4
    assert made["global_batch"] == 8 and made["per_device_batch"] == 2
    # State: float32 weights and two moments, split over four chips (norms and biases are not).
    assert made["memory"]["fits"]
    assert 12 * made["parameters"] / 4 <= made["memory"]["argument_bytes"]
    assert made["memory"]["argument_bytes"] <= made["memory"]["peak_bytes"]
    # Fully recomputed, and 64 tokens in blocks of 128: more than the model's own, but not so many.
    assert 1.0 < made["flops"]["executed_over_model"] < 3.0
    assert made["collectives"]["all-gather"]["count"] > 0
    predicted = made["prediction"]
    assert 0 < predicted["mfu"] < 1
    assert predicted["step_seconds"] >= predicted["compute_seconds"]
    rate = 8 * 64 / 4 / predicted["step_seconds"]
    assert predicted["tokens_per_second_per_chip"] == pytest.approx(rate, rel=2e-3)
    assert (folder / f"{number}.gz").stat().st_size > 1000


@needs_libtpu
@pytest.mark.slow
def test_batch_that_the_mesh_does_not_divide_is_refused(reports):
    done = reports[0][len(CHIPS)]
    assert done.status == 2
    assert done.last_line.startswith("error: data.global_batch=6 is not a multiple of data×fsdp")


@needs_libtpu
@pytest.mark.slow
def test_step_that_does_not_fit_is_reported(reports):
    done = reports[0][len(CHIPS) + 1]
    assert done.status == 1, done.output
    memory = parsed(done)["memory"]
    assert not memory["fits"]
    assert memory["needed_bytes"] > memory["hbm_bytes"]
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("… the total memory required for HLO temporaries (256.00G) exceeds …", 256 * 2**30),
        ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.", 20.5 * 2**30),
        ("something else", None),
    ],
)
def test_needed_bytes_are_parsed_from_the_compilers_message(message, expected):
    assert needed_bytes(message) == expected


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("v7:4x4", "topology 'v7:4x4' is not of a known TPU"),
        ("v5e", "needs 2 lengths after the colon, such as v5e:4x4"),
        ("v5p:4x4", "needs 3 lengths after the colon, such as v5p:4x4x4"),
        ("v6e:4xx4", "needs 2 lengths"),
        ("v5e:0x4", "needs 2 lengths"),  # libtpu divides by them
    ],
)
def test_unknown_topologies_are_refused(name, sentence):
    with pytest.raises(UserError) as refused:
        topology.parse(name)
    assert sentence in str(refused.value)


def test_missing_libtpu_is_refused(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install libtpu"):
        topology.describe("v5e:2x2")


@needs_libtpu
def test_slice_that_libtpu_does_not_have_is_refused():
    code = (
        "from qwen_jax.aot.topology import describe\nfrom qwen_jax.errors import UserError\n"
        "import jax; jax.config.update('jax_platforms', 'cpu')\n"
        "try: describe('v5e:3x7')\nexcept UserError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=programs.ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.startswith("libtpu has no slice v5e:3x7 ("), done.stderr


def test_unusable_flags_are_refused_before_compilation(tmp_path):
    refused = {
        ("--search", "--per_device_batch=4"): "--search cannot be combined with --per_device_batch",
        ("--search", f"--dump_hlo={tmp_path}/x"): "--search cannot be combined with --dump_hlo",
        (f"--search_log={tmp_path}/x",): "--search_log is only written with --search",
        ("--dump_hlo=/nowhere/x.gz",): "--dump_hlo=/nowhere/x.gz cannot be written",
        (f"--dump_hlo={tmp_path}",): "cannot be written",
        ("--topology=v5e:0x4",): "needs 2 lengths",
    }
    found = programs.run([[*TOY, "--topology=v5e:2x2", *flags] for flags in refused])
    for done, (flags, sentence) in zip(found, refused.items(), strict=True):
        assert done.status == 2, (flags, done.output)
        assert done.last_line.startswith("error: ") and sentence in done.last_line, done.output


@needs_libtpu
def test_invalid_batches_and_lengths_are_refused():
    refused = {
        "--per_device_batch=nan": "--per_device_batch=nan on 4 devices makes nan rows",
        "--per_device_batch=inf": "makes inf rows",
        "--per_device_batch=0.3": "makes 1.2 rows",
        "--seq_len=1": "--seq_len=1 is too short; give 2 or more",
    }
    found = programs.run([[*TOY, "--topology=v5e:2x2", flag] for flag in refused])
    for done, sentence in zip(found, refused.values(), strict=True):
        assert done.status == 2 and sentence in done.last_line, done.output
