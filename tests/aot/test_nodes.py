"""Nodes of GPUs: names, transfer times in closed form, what their programs' operations cost."""

import dataclasses
import importlib.util
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import pods
from qwen_jax.aot import collectives, hlo, nodes, timeline, topology, work
from qwen_jax.aot.compile import CompiledStep, Memory
from qwen_jax.aot.report import report
from qwen_jax.aot.search import Trial
from qwen_jax.config import from_config_dict
from qwen_jax.errors import UserError
from qwen_jax.kernels.gpu.flash import KERNEL
from qwen_jax.kernels.mask import live_blocks, make_mask
from qwen_jax.train.job import PretrainJob
from tests import programs
from tests.aot.pods import Device

LINK, NETWORK, PEAK = 4.5e11, 5e10, 989e12
MIB2 = 2 * 2**20  # bytes of bf16[1024,1024]


def made_up(name: str) -> nodes.Nodes:
    """The nodes of this name without jax's CUDA plugin."""
    gpu, shape = nodes.parse(name)
    devices = [Device((0, node, n)) for node in range(shape[1]) for n in range(shape[2])]
    return nodes.Nodes(name, gpu, shape, devices)


def mesh(place: nodes.Nodes):
    return types.SimpleNamespace(
        devices=np.array(place.devices, dtype=object), size=len(place.devices), shape={}
    )


def module(entry: str, *others: str) -> hlo.HloModule:
    main = "ENTRY %main (p: f32[1]) -> f32[1] {\n" + entry + "\n}"
    return hlo.parse("\n\n".join([*others, main]))


def played(place: nodes.Nodes, *lines: str) -> timeline.StepCost:
    return timeline.predict(module("\n".join(lines)), place, mesh(place))


@pytest.mark.parametrize(
    ("name", "shape"), [("h100:8", (1, 1, 8)), ("h200:2x8", (1, 2, 8)), ("h100:1", (1, 1, 1))]
)
def test_topology_name_gives_nodes_and_gpus(name, shape):
    gpu, found = nodes.parse(name)
    assert found == shape and gpu.name == name[:4]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("h100:", "needs the number of GPUs after the colon, such as h100:8 for a node"),
        ("h200:0", "needs the number of GPUs"),
        ("h100:x8", "needs the number of GPUs"),
        ("h100:2x2x8", "needs the number of GPUs"),
        ("h100:16", "has 16 GPUs per node, but a node has 8; write NODESxGPUS, such as h100:2x8"),
    ],
)
def test_malformed_topology_names_are_refused(name, sentence):
    assert nodes.is_gpu(name)
    with pytest.raises(UserError) as refused:
        nodes.parse(name)
    assert sentence in str(refused.value)


def test_error_for_an_unknown_gpu_lists_supported_ones():
    assert not nodes.is_gpu("h300:8")
    with pytest.raises(UserError, match=r"not of a known TPU or GPU .*h[12]00.*such as h100:8"):
        topology.parse("h300:8")


def test_missing_cuda_plugin_is_refused(monkeypatch):
    monkeypatch.setattr(nodes.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -r requirements/aot-gpu\.txt"):
        nodes.describe("h100:8")


def test_missing_assembler_is_refused(monkeypatch, tmp_path):
    (tmp_path / "cu13" / "bin").mkdir(parents=True)
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(nodes.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="NVIDIA's assembler, which are not installed"):
        nodes.describe("h100:8")


def transfer(name: str, kind: str, groups: str) -> collectives.Collective:
    place = made_up(name)
    key = "source_target_pairs" if kind == "collective-permute" else "replica_groups"
    i = hlo.parse_instruction(f"  %c = bf16[1024,1024] {kind}(%x), {key}={groups}")
    return collectives.estimate(place, collectives.coordinates(place, mesh(place)), i, i.shapes)


@pytest.mark.parametrize(
    ("name", "kind", "groups", "size", "seconds"),
    [
        ("h100:8", "all-gather", "[1,8]<=[8]", MIB2, MIB2 * 7 / 8 / LINK),
        ("h100:8", "all-gather", "[4,2]<=[8]", MIB2, MIB2 / 2 / LINK),
        ("h100:8", "all-reduce", "[1,8]<=[8]", MIB2, MIB2 / LINK),  # summed in the switch
        ("h100:8", "reduce-scatter", "[1,8]<=[8]", 8 * MIB2, 7 * MIB2 / LINK),
        ("h100:8", "all-to-all", "[2,4]<=[8]", MIB2, MIB2 * 3 / 4 / LINK),
        ("h100:8", "all-gather", "[8,1]<=[8]", MIB2, 0),  # nobody to hear from
        # Two nodes: half of the array comes over all network cards, an eighth or a fourth each.
        ("h200:2x8", "all-gather", "[1,16]<=[16]", MIB2, MIB2 * 7 / 8 / LINK),
        ("h200:2x4", "all-gather", "[1,8]<=[8]", MIB2, MIB2 / 2 / (4 * NETWORK)),
        ("h200:2x8", "all-gather", "[8,2]<=[2,8]T(1,0)", MIB2, MIB2 / 2 / NETWORK),
        ("h200:2x8", "all-reduce", "[1,16]<=[16]", MIB2, MIB2 / (8 * NETWORK)),
        ("h200:2x8", "all-to-all", "[1,16]<=[16]", MIB2, MIB2 / 2 / NETWORK),
        ("h200:2x8", "all-gather", "[2,8]<=[16]", MIB2, MIB2 * 7 / 8 / LINK),  # each in its node
        ("h200:2x8", "collective-permute", "{{0,1},{1,0}}", MIB2, MIB2 / LINK),
        ("h200:2x8", "collective-permute", "{{0,1},{7,8}}", MIB2, MIB2 / NETWORK),
    ],
)
def test_transfer_time_is_bytes_over_switch_and_network_bandwidth(
    name, kind, groups, size, seconds
):
    found = transfer(name, kind, groups)
    assert (found.kind, found.bytes) == (kind, size)
    assert found.seconds == pytest.approx(seconds)


def test_schedule_waits_for_synchronous_collectives():
    gather = (
        "  %s = (bf16[128,1024], bf16[1024,1024]) all-gather-start(%x), "
        'replica_groups=[1,8]<=[8], backend_config={{"is_sync":{0}}}'
    )
    product = (
        "  %d = (bf16[4096,4096], s8[4194304]) custom-call(%a, %b), "
        'custom_call_target="__cublas$lt$matmul", '
        'backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}'
    )
    operands = [f"  %{name} = bf16[4096,4096] parameter({n})" for n, name in enumerate("ab")]
    done = "  %g = bf16[1024,1024] all-gather-done(%s)"
    wire, flops = MIB2 * 7 / 8 / LINK, 2 * 4096**3
    for is_sync, waiting in (("false", 0.0), ("true", wire)):
        cost = played(made_up("h100:8"), *operands, gather.format(is_sync), product, done)
        assert cost.waiting["interconnect"] == pytest.approx(waiting)
        assert cost.counts == {"all-gather": 1}
        assert cost.synchronous["all-gather"] == (is_sync == "true")
        assert cost.flops == flops
        assert cost.seconds == pytest.approx(flops / PEAK + waiting)


@pytest.mark.parametrize("target", ["__cublas$gemm", "__cublas$lt$matmul"])
def test_cublas_call_costs_its_product_without_workspace(target):
    m = module(
        "  %a = bf16[3,16,8] parameter(0)\n  %b = bf16[3,16,4] parameter(1)\n"
        f'  ROOT %d = (f32[3,8,4], s8[999]) custom-call(%a, %b), custom_call_target="{target}", '
        'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{'
        '"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],'
        '"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}'
    )
    scope = m.computations[m.entry]
    assert work.flops(m, scope, scope.root) == 2 * 3 * 8 * 4 * 16
    assert work.hbm_bytes(m, scope, scope.root) == 2 * 3 * 16 * (8 + 4) + 4 * 3 * 8 * 4


def hopper_call(name: str, length: int, keys: int) -> hlo.HloModule:
    return module(
        f"  %q = bf16[2,{length},16,128] parameter(0)\n  %k = bf16[2,{keys},4,128] parameter(1)\n"
        f"  ROOT %o = bf16[2,{length},16,128] custom-call(%q, %k, %k), "
        f'custom_call_target="mosaic_gpu_v2", metadata={{op_name="jit(f)/{name}/mpmd_map"}}'
    )


@pytest.mark.parametrize(("name", "products"), sorted(work.HOPPER_PRODUCTS.items()))
def test_hopper_attention_costs_the_blocks_it_computes(name, products):
    length, block = 1024, 128
    live = int(live_blocks(make_mask(None, None, None, None), length, length, block, block).sum())
    m = hopper_call(name, length, length)
    scope = m.computations[m.entry]
    pairs = 2 * 16 * live * block * block
    assert work.is_kernel(scope.root)
    assert work.flops(m, scope, scope.root) == 2 * products * 128 * pairs
    # Keys of another length come from a ring or a cache: all of them may be seen.
    m = hopper_call(name, length, 3 * length)
    scope = m.computations[m.entry]
    assert work.flops(m, scope, scope.root) == 2 * products * 128 * 2 * 16 * length * 3 * length


def test_names_of_hopper_kernels_are_those_that_are_counted(monkeypatch):
    def run(q, lse):
        mask = make_mask(None, None, None, None)
        return KERNEL.forward(q, q, q, mask, 1.0), KERNEL.backward(
            q, q, q, mask, 1.0, lse, q, lse, None
        )

    q = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)
    lse = jax.ShapeDtypeStruct((1, 2, 256), jnp.float32)

    def names(flags):
        monkeypatch.setenv("XLA_FLAGS", flags)
        jax.clear_caches()
        text = (
            jax.jit(run).trace(q, lse).lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
        )
        return {name for name in work.HOPPER_PRODUCTS if re.search(rf"/{name}/\w+/mpmd_map", text)}

    fast, same = names(""), names("--xla_gpu_deterministic_ops=true")
    assert fast == {"flash_forward", "flash_backward"}
    assert fast | same == set(work.HOPPER_PRODUCTS) and "flash_backward" not in same


def test_unknown_kernel_is_counted_as_unpriced():
    m = hopper_call("another", 256, 256)
    cost = timeline.predict(m, made_up("h100:8"), mesh(made_up("h100:8")))
    assert cost.unpriced_kernels == 1 and cost.flops == 0
    fused = module(
        "  %a = bf16[2,256,16,128] parameter(0)\n"
        "  ROOT %f = bf16[2,256,16,128] fusion(%a), kind=kCustom, calls=%inner",
        "%inner (q: bf16[8]) -> bf16[8] {\n  %q = bf16[2,256,16,128] parameter(0)\n"
        "  ROOT %o = bf16[2,256,16,128] custom-call(%q, %q), "
        'custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/flash_forward/mpmd_map"}\n}',
    )
    cost = timeline.predict(fused, made_up("h100:8"), mesh(made_up("h100:8")))
    assert cost.kernel_flops == cost.flops == 4 * 2 * 16 * 128 * 3 * 128 * 128
    known = hopper_call("flash_forward", 256, 256)
    assert timeline.predict(known, made_up("h100:8"), mesh(made_up("h100:8"))).unpriced_kernels == 0


@pytest.mark.parametrize(("share", "fits"), [(0.89, True), (0.91, False)])
def test_gpu_report_has_no_prediction_and_reserves_memory_for_nccl(share, fits):
    place = made_up("h100:8")
    job = from_config_dict(PretrainJob, pods.get_config("7b,h100-8"))
    text = (
        "ENTRY %main (p: f32[8]) -> f32[8] {\n  %a = bf16[4096,4096] parameter(0)\n"
        "  ROOT %d = bf16[4096,4096] dot(%a, %a), lhs_contracting_dims={1}\n}"
    )
    peak = int(share * place.chip.memory_bytes)
    memory = Memory(arguments=1, temporaries=2, peak=peak, host=0)
    made = report(job, place, CompiledStep(text, memory, 1.0, mesh(place), {}))
    assert made["memory"]["fits"] is fits
    assert made["memory"]["hbm_bytes"] == int(0.9 * place.chip.memory_bytes)
    assert made["prediction"] is None
    seconds = 2 * 4096**3 / PEAK
    assert made["roofline"]["step_seconds"] == pytest.approx(seconds, abs=1e-6)
    assert made["flops"]["executed"] == 8 * 2 * 4096**3
    assert "not a prediction" in made["roofline"]["assumptions"]
    assert made["versions"]["jax"] == jax.__version__ and "libtpu" not in made["versions"]


def test_search_uses_the_roofline_on_gpus():
    times = {"tokens_per_second_per_chip": 7.0}
    found = {"memory": {"fits": True}, "prediction": None, "roofline": times}
    assert Trial.of(4, "full", found).rate == 7.0
    assert Trial.of(4, "full", {"memory": {"fits": False}}).rate == 0.0


def test_target_config_has_the_properties_of_each_gpu():
    for gpu in nodes.GPUS.values():
        text = nodes.target_config(gpu)
        assert f"device_memory_size: {gpu.memory_bytes} " in text
        assert f"memory_bandwidth: {gpu.hbm_bandwidth} " in text
        assert text.count(f'"{gpu.kind}"') == 2
        assert gpu.name.upper() in gpu.kind
    h100, h200 = nodes.GPUS["h100"], nodes.GPUS["h200"]
    assert h100.memory_bytes < h200.memory_bytes and dataclasses.replace(
        h100, name="h200", kind=h200.kind, memory_bytes=h200.memory_bytes,
        hbm_bandwidth=h200.hbm_bandwidth,
    ) == h200  # fmt: skip


def test_gpu_recipes_use_the_memory_available_to_programs():
    named = {s.topology: s for s in pods.SLICES.values() if nodes.is_gpu(s.topology)}
    assert set(named) == {f"{name}:8" for name in nodes.GPUS}
    for name, slice_ in named.items():
        gpu, shape = nodes.parse(name)
        assert slice_.devices == np.prod(shape)
        assert slice_.device_bytes == pytest.approx(gpu.hbm_bytes, rel=1e-3)


needs_cuda_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="compiles for GPUs: jax's CUDA plugin is not installed, it takes 0.8 GB "
    "(pip install -r requirements/aot-gpu.txt)",
)
LENGTH, LAYERS, MICROBATCHES = 1920, 2, 4
TOY = (
    "launch.aot",
    "--config=configs/pretrain.py:toy",
    # A layer of 1.8B: what the compiler joins and overlaps depends on sizes, its time does not.
    "--config.model.d_model=2048",
    "--config.model.n_heads=16",
    "--config.model.n_kv_heads=16",
    "--config.model.head_dim=128",
    "--config.model.d_ff=5504",
    f"--config.model.n_layers={LAYERS}",
    "--config.options.dtype=bfloat16",
    "--config.options.remat=products",
    "--config.mesh.fsdp=-1",
    "--config.mesh.tensor=1",
    f"--config.train.microbatches={MICROBATCHES}",
    f"--seq_len={LENGTH}",
    "--per_device_batch=4",
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the program says for the toy on a node and on two, with the programs' text."""
    folder = tmp_path_factory.mktemp("nodes")
    calls = [
        [*TOY, f"--topology={name}", f"--dump_hlo={folder}/{n}", f"--config.mesh.data={n + 1}"]
        for n, name in enumerate(("h100:8", "h200:2x2"))
    ]
    found = []
    for n, done in enumerate(programs.run(calls, timeout=500)):
        assert done.status == 0, done.output
        start = done.output.index("{\n")
        made = json.loads(done.output[start : done.output.rindex("}") + 1])
        found.append((made, hlo.parse((folder / str(n)).read_text())))
    return found


def loops(m: hlo.HloModule, scope: hlo.Computation, times: int = 1):
    """(computation, how often it runs) of the entry and of all loops in it."""
    yield scope, times
    for i in scope.instructions:
        if i.opcode == "while":
            trips = hlo.trip_count(m, scope, i)
            yield from loops(m, m.computations[i.called("body")], times * trips)


@needs_cuda_plugin
@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_real_step_compiles_for_gpu_nodes(compiled, number):
    made, m = compiled[number]
    assert made["devices"] == (8, 4)[number]
    assert made["mesh"]["data"] == number + 1
    memory = made["memory"]
    # State: float32 weights and two moments, split over fsdp.
    shards = made["mesh"]["fsdp"]
    assert 12 * made["parameters"] / shards <= memory["argument_bytes"] <= memory["peak_bytes"]
    assert memory["fits"]
    assert made["prediction"] is None and made["roofline"]["step_seconds"] > 0
    assert made["roofline"]["pallas_calls_without_estimate"] == 0
    # Nothing is multiplied twice; of attention whole blocks count, of the fifteen on a side.
    flops, rows = made["flops"], 4 * made["devices"]
    heads, per_product = 16, 2 * LENGTH**2 / 2 * 128
    visited = 7 * per_product * 16 / 15
    assert flops["pallas"] == pytest.approx(rows * LAYERS * heads * visited, rel=1e-6)
    assert flops["executed"] - flops["pallas"] == pytest.approx(
        flops["model"] - rows * LAYERS * heads * 6 * per_product * (1 + 1 / LENGTH), rel=0.02
    )
    # One kernel forward, one backward, in every layer and microbatch.
    times = {"flash_forward": 0, "flash_backward": 0}
    for scope, runs in loops(m, m.computations[m.entry]):
        for i in filter(work.is_kernel, scope.instructions):
            (kernel,) = set(i.text("op_name").split("/")) & set(times)
            times[kernel] += runs
    assert set(times.values()) == {LAYERS * MICROBATCHES}
    # No scores of a whole row in memory.
    shapes = {s.dims for scope in m.computations.values() for i in scope.instructions
              for s in i.shapes}  # fmt: skip
    assert not [dims for dims in shapes if dims.count(LENGTH) > 1]


@needs_cuda_plugin
@pytest.mark.slow
def test_layer_collectives_overlap_with_compute_on_gpus(compiled):
    _, m = compiled[0]
    started = {"all-gather": [], "reduce-scatter": []}
    for scope, runs in loops(m, m.computations[m.entry]):
        for i in scope.instructions:
            if runs == LAYERS * MICROBATCHES and i.opcode.endswith("-start"):
                started.get(collectives.kind_of(i.opcode), []).append(i)
    beside = {
        kind: ['"is_sync":false' in i.attributes for i in of_kind]
        for kind, of_kind in started.items()
    }
    assert beside["all-gather"] and all(beside["all-gather"])
    # q, k, v, the output projection, and three of the FFN.
    assert len(beside["reduce-scatter"]) == 7 and any(beside["reduce-scatter"])
