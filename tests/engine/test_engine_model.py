"""The engine with real programs: parity with references and invariance under schedules."""

import dataclasses
import functools
import threading

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from qwen_jax.engine.batch import pack_prefill, page_table, resumed_row
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.options import EngineOptions
from qwen_jax.engine.programs import CompiledPrograms
from qwen_jax.engine.request import Request, SamplingParams
from qwen_jax.engine.scheduler import PrefillChunk, RequestState
from qwen_jax.interop import load_params, read_config
from qwen_jax.model import ForwardOptions, abstract_params, ntk_alphas
from qwen_jax.parallel import MeshConfig, make_mesh
from tests.model.families import MODELS, params

FLOAT32 = ForwardOptions(dtype="float32")


@pytest.fixture(scope="module", autouse=True)
def _highest():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def compiled_quickly():
    """Disables most XLA optimisations: compiles faster, and few tokens are computed."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def step(engine, answers):
    """Runs one step and adds its outputs to answers, {id: [tokens, finish, cached tokens]}."""
    for out in engine.step():
        entry = answers.setdefault(out.request_id, [[], None, 0])
        entry[0] += out.tokens.tolist()
        entry[1] = out.finish
        entry[2] += out.cached_tokens


def finish(engine, answers=None):
    """Runs an engine until it has no requests and returns the answers."""
    answers = {} if answers is None else answers
    while engine.busy:
        step(engine, answers)
    return answers


def greedy(name, prompt, n, **more):
    return Request(
        name, tuple(map(int, prompt)), SamplingParams(max_tokens=n, temperature=0.0, **more)
    )


@pytest.fixture(scope="module")
def released(qwen1_small):
    """An engine over the checkpoint for which the released code's outputs are stored."""
    config = read_config(qwen1_small)
    weights = load_params(qwen1_small, config, abstract_params(config))
    sizes = EngineOptions(
        max_running_requests=3, page_size=8, pages=50, max_length=128, prefill_tokens=16
    )
    return Engine(weights, config, FLOAT32, sizes)


@pytest.mark.slow
def test_batched_greedy_output_equals_the_released_code(qwen1_small, released):
    """Prompts below, near and past the trained length, with different NTK factors, in one batch."""
    with np.load(qwen1_small / "greedy.npz") as stored:
        lengths = (80, 6, 40)
        cases = {n: (stored[f"prompt_{n}"], stored[f"greedy_{n}"].tolist()) for n in lengths}
    for turn in range(2):
        for n, (prompt, _) in cases.items():
            released.add(greedy(f"{n}", prompt, 24))
        answers = finish(released)
        for n, (_, expected) in cases.items():
            cached = (n - 1) // 8 * 8 if turn else 0
            assert answers[str(n)] == [expected, "length", cached]


@pytest.mark.slow
def test_decoding_past_trained_length_keeps_the_prompts_ntk_factor(qwen1_small, released):
    """Given tokens one at a time, past the trained length and past its double."""
    config, shapes, programs = released._config, released.shapes, released._programs
    asked = SamplingParams(temperature=0.0, seed=0, logprobs=5, logprobs_of="raw")
    with np.load(qwen1_small / "decode.npz") as stored:
        for name in ("p40_n20", "p90_n30"):
            ids, length = stored[f"ids_{name}"], int(stored[f"prompt_len_{name}"])
            log_probs = np.asarray(jax.nn.log_softmax(stored[f"logits_{name}"]))
            alpha = ntk_alphas(length, config)
            assert alpha == [stored[f"alpha_{name}"]]
            request = Request("x", tuple(map(int, ids[:length])), asked)
            running = RequestState(request, alpha, b"", token_budget=len(ids), row=0)
            running.pages = list(range(16))
            state = programs.init_state()
            for at in range(0, length, 16):
                chunk = PrefillChunk(running, at, min(16, length - at))
                state, drawn = programs.prefill(state, pack_prefill([chunk], 16, shapes))
            got = [(drawn.top_ids[0, :5], drawn.top_logprobs[0, :5])]
            for at in range(length, len(ids)):
                running.output_tokens.append(int(ids[at]))
                state = programs.start_row(state, 0, resumed_row(running))
                state, drawn = programs.decode(state, page_table([running], 1, shapes), 1)
                got.append((drawn.top_ids[0, 0, :5], drawn.top_logprobs[0, 0, :5]))
            for expected, (top_ids, top) in zip(log_probs[length - 1 :], got, strict=True):
                np.testing.assert_allclose(expected[np.asarray(top_ids)], top, atol=5e-4, rtol=1e-4)
                np.testing.assert_allclose(np.sort(expected)[:-6:-1], top, atol=5e-4, rtol=1e-4)


SIZE = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "initializer_range": 0.3,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(
            **SIZE, use_sliding_window=True, sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        Qwen3Config(**SIZE, head_dim=32, tie_word_embeddings=True),
    ],
    ids=["qwen2", "qwen3"],
)  # fmt: skip
def test_greedy_ids_equal_transformers(config, tmp_path, compiled_quickly):
    torch.manual_seed(1)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path)
    ours = read_config(tmp_path)
    weights = load_params(tmp_path, ours, abstract_params(ours))
    sizes = EngineOptions(
        max_running_requests=3, page_size=32, pages=5, max_length=64, prefill_tokens=32
    )
    engine = Engine(weights, ours, FLOAT32, sizes)
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, 160, n).astype(int) for n in (3, 8, 21, 40, 12, 33)]
    expected, answers = {}, {}
    for i, prompt in enumerate(prompts):
        out = theirs.generate(
            torch.from_numpy(prompt)[None], max_new_tokens=16, do_sample=False, eos_token_id=None,
            pad_token_id=0, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        best = torch.stack(out.scores)[:, 0].topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-3, "too close to call: choose another seed"
        expected[str(i)] = [out.sequences[0, len(prompt) :].tolist(), "length", 0]
        engine.add(greedy(str(i), prompt, 16))
        step(engine, answers)
    assert finish(engine, answers) == expected


# Schedules

TIGHT = EngineOptions(
    max_running_requests=3,
    page_size=4,
    pages=14,
    max_length=40,
    prefill_tokens=8,
    decode_steps_per_call=4,
    seed=1,
)
V1 = MODELS["v1: NTK, LogN"]


class Shared(Engine):
    """An engine over programs that are compiled once for all tests."""

    def __init__(self, sizes=TIGHT, config=V1):
        super().__init__(None, config, FLOAT32, sizes)

    def _make_programs(self, nothing, options, vocab_size, kv_dtype):
        return programs_of(self._config, self.shapes, np.dtype(kv_dtype))


@functools.cache
def programs_of(config, shapes, kv_dtype):
    how = {"vocab_size": config.vocab_size, "kv_dtype": kv_dtype}
    return CompiledPrograms(params(config), config, FLOAT32, shapes, **how)


def asked():
    """Returns requests of all kinds; several share their first pages."""
    rng = np.random.default_rng(5)
    stem = rng.integers(0, 300, 12).tolist()
    kinds = [
        {},
        {"temperature": 1.0, "seed": 7},
        {"temperature": 0.8, "top_p": 0.9, "seed": 1, "logprobs": 3},
        {"temperature": 1.2, "top_k": 20, "min_p": 0.05, "seed": 2},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"temperature": 1.0, "presence_penalty": 1.0, "seed": 5},
    ]
    made = []
    for i, n in enumerate((1, 5, 9, 14, 17, 26, 4, 12, 21, 13, 30, 2)):
        prompt = rng.integers(0, 300, n).tolist()
        if i % 2:
            prompt = (stem + prompt)[:30]
        options = {"temperature": 0.0, "max_tokens": 4 + 3 * (i % 5)} | kinds[i % len(kinds)]
        if i % 4 == 3:
            options["stop_ids"] = tuple(range(0, 300, 40))
        made.append(Request(str(i), tuple(prompt), SamplingParams(**options), stream=i % 3 == 1))
    return made


@functools.cache
def answers_alone(config, sizes):
    """Runs each request alone, without prefix cache and with one decode step per call."""
    engine = Shared(dataclasses.replace(sizes, prefix_cache=False), config)
    answers = {}
    for one in asked():
        engine.add(dataclasses.replace(one, stream=True))
        finish(engine, answers)
    return {name: entry[:2] for name, entry in answers.items()}


def drive(engine, events):
    """Plays events: submissions (number), steps (None), cancellations (negative).

    Returns:
      ({id: answer}, cancelled ids).
    """
    requests, answers, cancelled = asked(), {}, set()
    for event in events:
        if event is None:
            step(engine, answers)
        elif event < 0:
            engine.cancel(str(-event - 1))
            cancelled.add(str(-event - 1))
        elif str(event) not in cancelled | answers.keys() | engine._requests.keys():
            engine.add(requests[event])
    return finish(engine, answers), cancelled


def check(engine, events, alone):
    answers, cancelled = drive(engine, events)
    for name, (tokens, end, *_) in answers.items():
        if name in cancelled and end is None:
            assert tokens == alone[name][0][: len(tokens)]
        else:
            assert [tokens, end] == alone[name]
    missing = {str(e) for e in events if e is not None and e >= 0} - answers.keys()
    assert missing <= cancelled
    stats = engine.stats()
    assert stats.pages_free == stats.pages_total
    return stats


EVENT = st.one_of(
    st.integers(0, 11), st.integers(0, 11), st.integers(0, 11), st.none(), st.integers(-12, -1)
)


@pytest.mark.slow
@hypothesis.settings(max_examples=30, deadline=None, derandomize=True)
@hypothesis.given(st.lists(EVENT, min_size=3, max_size=24))
def test_any_schedule_gives_each_request_the_output_it_gets_alone(events):
    check(Shared(), events, answers_alone(V1, TIGHT))


@pytest.mark.slow
def test_preempted_requests_resume_exactly_and_nothing_compiles_after_warm_up():
    alone = dict(answers_alone(V1, TIGHT))
    rng = np.random.default_rng(1)
    # Ten pages each in the end, and there are fourteen.
    long = [greedy(f"long {i}", rng.integers(0, 300, 20), 20) for i in range(3)]
    for one in long:
        engine = Shared()
        engine.add(one)
        alone[one.id] = finish(engine)[one.id][:2]
    engine = Shared()
    engine.warm_up()
    for one in long:
        engine.add(one)
    compilations = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        stats = check(engine, [*range(12), None, None, None, -1, None, -4], alone)
        assert not compilations
        jax.jit(lambda x: x + 1)(jnp.zeros(3))
        assert compilations, "the listener would have heard"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert stats.preemptions > 0 and stats.cached_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize("name, kv_dtype", [("2: windows", "auto"), ("v1: NTK, LogN", "uint8")])
def test_any_schedule_with_windows_and_with_an_8_bit_cache(compiled_quickly, name, kv_dtype):
    """With windows, only one prompt of a prefill call may have cached pages; the others wait."""
    config, sizes = MODELS[name], dataclasses.replace(TIGHT, kv_dtype=kv_dtype)
    check(Shared(sizes, config), [*range(12)], answers_alone(config, sizes))


@pytest.mark.slow
def test_tensor_parallel_engine_gives_the_same_ids_on_any_thread(compiled_quickly):
    alone = answers_alone(V1, TIGHT)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=2), jax.devices()[:2])
    shardings = jax.tree.map(lambda x: x.sharding, abstract_params(V1, mesh))
    with jax.set_mesh(mesh):
        engine = Engine(jax.device_put(params(V1), shardings), V1, FLOAT32, TIGHT)
    answers, some = {}, (0, 2, 6, 11)  # short prompts: fewer programs to compile
    thread = threading.Thread(target=lambda: answers.update(drive(engine, some)[0]))
    thread.start()
    thread.join()
    assert {name: entry[:2] for name, entry in answers.items()} == {
        str(i): alone[str(i)] for i in some
    }
