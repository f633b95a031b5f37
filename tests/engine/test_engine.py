"""Host side of the engine: any schedule gives each request the output it would get alone.

The device is the double of `tests.engine.fake_device`, so hundreds of schedules take seconds;
`test_engine_model.py` runs the real programs.
"""

import dataclasses

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from qwen_jax.engine.engine import Engine
from qwen_jax.engine.options import EngineOptions
from qwen_jax.engine.request import Request, SamplingParams
from qwen_jax.engine.scheduler import choose_prefill_size
from qwen_jax.errors import UserError
from qwen_jax.model import ntk_alphas
from qwen_jax.parallel import MeshConfig, make_mesh
from tests.engine.fake_device import CONFIG, VOCAB, FakeDeviceEngine, alone

SMALL = EngineOptions(
    max_running_requests=3,
    max_length=40,
    page_size=4,
    pages=24,
    prefill_tokens=16,
    decode_steps_per_call=4,
    seed=3,
)


def request(name, prompt, stream=False, **params):
    params = {"temperature": 0.0, "max_tokens": 8} | params
    return Request(name, tuple(prompt), SamplingParams(**params), stream)


def expected(asked, engine):
    alpha = ntk_alphas(len(asked.prompt), CONFIG)[0]
    return alone(asked.prompt, asked.params, alpha, engine.max_length)


class Answers:
    """Collects outputs and asserts what holds for each."""

    def __init__(self, engine):
        self.engine, self.tokens, self.finish, self.cached = engine, {}, {}, {}
        self.ended = set()

    def step(self):
        outputs = self.engine.step()
        self.engine.check()
        for out in outputs:
            name = out.request_id
            assert name not in self.ended, "an output after the end"
            first = name not in self.tokens
            self.tokens.setdefault(name, []).extend(out.tokens.tolist())
            self.cached[name] = self.cached.get(name, 0) + out.cached_tokens
            assert first or not out.cached_tokens
            assert out.tokens.size or out.finish
            if out.finish:
                self.finish[name] = out.finish
                self.ended.add(name)
            if out.logprobs is not None:
                np.testing.assert_array_equal(out.logprobs * -64, out.tokens)
                np.testing.assert_array_equal(out.raw_logprobs * -32, out.tokens)
                assert (out.top_ids == out.tokens[:, None]).all()
                assert out.top_ids.shape == out.top_logprobs.shape
        return outputs

    def run(self, most=2000):
        for _ in range(most):
            if not self.engine.busy:
                return self
            self.step()
        raise AssertionError("the engine doesn't come to an end")


def prompts():
    """Returns prompts with common prefixes, so that pages are shared."""
    stem = st.sampled_from([(), (1, 2, 3, 4) * 2, (1, 2, 3, 4) * 4, (7,) * 13])
    rest = st.lists(st.integers(0, 5), min_size=0, max_size=14)
    return st.builds(lambda a, b: (*a, *b), stem, rest).filter(lambda p: 0 < len(p) < 40)


def requests():
    params = st.fixed_dictionaries(
        {
            "max_tokens": st.integers(1, 20),
            "temperature": st.sampled_from([0.0, 1.0]),
            "seed": st.integers(0, 2**63 - 1),
            "repetition_penalty": st.sampled_from([1.0, 1.0, 1.2]),
            "frequency_penalty": st.sampled_from([0.0, 0.0, 0.5]),
            "stop_ids": st.lists(st.integers(0, VOCAB - 1), max_size=8).map(tuple),
            "logprobs": st.sampled_from([None, None, 0, 3]),
        }
    )
    return st.builds(
        lambda p, s, kw: request("?", p, s, **kw), prompts(), st.sampled_from([0, 0, 1]), params
    )


def options():
    return st.builds(
        EngineOptions,
        max_running_requests=st.integers(1, 6),
        max_length=st.just(40),
        page_size=st.sampled_from([4, 8]),
        pages=st.integers(10, 22),
        prefill_tokens=st.sampled_from([8, 16, 64]),
        decode_steps_per_call=st.integers(1, 6),
        prefix_cache=st.booleans(),
    )


EVENTS = st.lists(
    st.one_of(requests(), requests(), st.just("step"), st.just("step"), st.integers(0, 30)),
    min_size=1,
    max_size=40,
)


@hypothesis.settings(max_examples=500, deadline=None, derandomize=True)
@hypothesis.given(options(), EVENTS, st.booleans())
def test_any_schedule_gives_each_request_the_output_it_gets_alone(sizes, events, one_past):
    engine = FakeDeviceEngine(sizes)
    engine._scheduler._single_cached_prefix = engine.programs.one_past = one_past
    answers, asked, cancelled = Answers(engine), {}, set()
    for event in events:
        if event == "step":
            answers.step()
        elif isinstance(event, int):
            name = str(event)
            if name in asked:
                engine.cancel(name)
                if name not in answers.ended:
                    cancelled.add(name)
                    answers.ended.add(name)
                engine.check()
        else:
            name = str(len(asked))
            asked[name] = dataclasses.replace(event, id=name)
            engine.add(asked[name])
    answers.run()
    for name, one in asked.items():
        tokens, finish = expected(one, engine)
        if name in cancelled:
            assert answers.tokens.get(name, []) == tokens[: len(answers.tokens.get(name, []))]
        else:
            assert (answers.tokens[name], answers.finish[name]) == (tokens, finish)
    stats = engine.stats()
    assert stats.pages_free == stats.pages_total and not stats.running + stats.waiting


# One thing at a time


@hypothesis.given(st.integers(1, 5000))
def test_prefill_call_is_at_least_half_full_or_of_the_smallest_size(wanted):
    slots = choose_prefill_size((128, 512, 2048), wanted)
    if slots > 128:
        assert 2 * wanted >= slots
    if wanted <= 2048 and slots < wanted:
        larger = {128: 512, 512: 2048}[slots]
        assert 2 * wanted < larger, "cut although the next size would be half full"


def test_stream_is_delayed_by_at_most_one_prefill_chunk():
    """While long prompts arrive one after the other, a running stream gets a token every step."""
    sizes = dataclasses.replace(SMALL, max_running_requests=4, pages=40)
    engine = FakeDeviceEngine(sizes)
    answers = Answers(engine)
    engine.add(request("stream", [1, 2], stream=True, max_tokens=30))
    answers.step()
    answers.step()
    for i in range(3):
        engine.add(request(f"long {i}", [i + 3] * 38, max_tokens=2))
    for _ in range(9):
        before = len(answers.tokens["stream"])
        answers.step()
        assert len(answers.tokens["stream"]) == before + 1
    prefills = [n for name, n, _ in engine.programs.calls if name == "prefill"]
    assert max(prefills) <= sizes.prefill_tokens and len(prefills) >= 8


def test_several_decode_steps_per_call_only_without_streams_and_queue():
    engine = FakeDeviceEngine(dataclasses.replace(SMALL, max_running_requests=1))
    answers = Answers(engine)
    engine.add(request("a", [1], max_tokens=12))
    answers.step()
    assert engine.programs.calls[-1] == ("decode", 1, 4)
    engine.add(request("b", [2], max_tokens=3, stream=True))
    answers.step()
    assert engine.programs.calls[-1] == ("decode", 1, 1), "somebody waits for a row"
    answers.run()
    assert {call[2] for call in engine.programs.calls[-2:] if call[0] == "decode"} == {1}
    engine.add(request("c", [3], max_tokens=3))
    answers.run()
    assert engine.programs.calls[-1] == ("decode", 1, 2), "no more steps than tokens are left"


def test_equal_prompts_submitted_together_are_computed_once():
    engine = FakeDeviceEngine(
        dataclasses.replace(SMALL, max_running_requests=4, prefill_tokens=64, pages=40)
    )
    answers = Answers(engine)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    for i in range(4):
        engine.add(request(str(i), prompt, seed=i, temperature=1.0))
    answers.run()
    assert answers.cached == {"0": 0, "1": 8, "2": 8, "3": 8}
    computed = sum(n for name, _, n in engine.programs.calls if name == "prefill")
    assert computed == 9 + 3 * 1
    assert engine.stats().cached_tokens == 24 and engine.stats().prompt_tokens == 36


def test_next_chat_turn_reuses_prompt_and_answer_but_computes_the_last_token():
    engine = FakeDeviceEngine(SMALL)
    answers = Answers(engine)
    first = request("1", [1, 2, 3, 4, 5], max_tokens=8)
    engine.add(first)
    answers.run()
    history = [*first.prompt, *answers.tokens["1"]]  # 13 tokens, 12 of them in the cache
    engine.add(request("2", history))
    answers.run()
    assert answers.cached["2"] == 12
    engine.add(request("3", history[:12]))
    answers.run()
    assert answers.cached["3"] == 8, "the last token must be computed"


def test_prompts_with_different_ntk_factors_share_no_pages():
    engine = FakeDeviceEngine(SMALL)
    answers = Answers(engine)
    engine.add(request("short", range(16)))
    answers.run()
    engine.add(request("long", range(17)))  # past the trained length of 16
    answers.run()
    assert answers.cached["long"] == 0
    engine.add(request("long again", range(18)))
    answers.run()
    assert answers.cached["long again"] == 16


def test_without_prefix_cache_no_pages_are_kept():
    engine = FakeDeviceEngine(dataclasses.replace(SMALL, prefix_cache=False))
    answers = Answers(engine)
    for name in "ab":
        engine.add(request(name, range(13)))
        answers.run()
    assert answers.cached == {"a": 0, "b": 0} and engine.stats().cached_pages == 0


def test_oldest_request_finishes_under_a_stream_of_new_requests():
    """One long request among a continuous stream of short ones, only some of which fit together."""
    engine = FakeDeviceEngine(dataclasses.replace(SMALL, pages=10, max_running_requests=3))
    answers = Answers(engine)
    engine.add(request("0", range(10), max_tokens=30))
    for i in range(1, 200):
        engine.add(request(str(i), [i % 7] * (1 + i % 9), max_tokens=1 + i % 6))
        answers.step()
        if "0" in answers.ended:
            break
    assert i < 60, "the oldest request goes on at every step"
    engine.add(request("big", range(30), max_tokens=10))
    more = 0
    while "big" not in answers.ended:
        more += 1
        engine.add(request(f"late {more}", [more % 5], max_tokens=2))
        answers.step()
        assert more < 500
    assert all(str(n) in answers.ended for n in range(i + 1)), (
        "all who came before have been served"
    )


def test_youngest_request_is_preempted_and_resumes_in_arrival_order():
    engine = FakeDeviceEngine(dataclasses.replace(SMALL, pages=10, prefix_cache=False))
    answers = Answers(engine)
    asked = [request(str(i), [i] * 5, max_tokens=22, temperature=1.0, seed=i) for i in range(3)]
    for one in asked:
        engine.add(one)
    order = []
    while engine.busy:
        order += [out.request_id for out in answers.step() if out.finish]
    assert engine.stats().preemptions >= 2
    assert order == ["0", "1", "2"]
    for one in asked:
        assert answers.tokens[one.id] == expected(one, engine)[0]


def test_output_ends_at_max_length():
    engine = FakeDeviceEngine(SMALL)
    answers = Answers(engine)
    engine.add(request("x", [1] * 37, max_tokens=500))
    answers.run()
    assert len(answers.tokens["x"]) == 3 and answers.finish["x"] == "length"


def test_cancelling_frees_row_pages_and_id():
    engine = FakeDeviceEngine(SMALL)
    engine.add(request("x", range(30), max_tokens=10))
    engine.step()
    engine.cancel("x")
    assert not engine.busy and engine.stats().pages_free == engine.stats().pages_total
    engine.cancel("x")  # may have ended by itself: no mistake
    assert engine.step() == []
    engine.add(request("x", [4, 5], max_tokens=4))
    answers = Answers(engine).run()
    assert answers.tokens["x"] == expected(request("x", [4, 5], max_tokens=4), engine)[0]


def test_engine_assigned_seeds_differ_and_follow_the_engine_seed():
    def tokens(seed):
        engine = FakeDeviceEngine(dataclasses.replace(SMALL, seed=seed))
        for name in "ab":
            engine.add(request(name, [1, 2], temperature=1.0))
        return Answers(engine).run().tokens

    assert tokens(1) == tokens(1) != tokens(2)
    assert tokens(1)["a"] != tokens(1)["b"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request("x", []), "The prompt has no tokens"),
        (
            request("x", [1, VOCAB]),
            "ids from 1 to 50; ids of this model are 0 to 49",
        ),
        (request("x", [-1]), "The prompt has ids from -1 to -1"),
        (request("x", [1] * 40), "The prompt has 40 tokens and prompt and answer .* 40; shorten"),
        (request("taken", [1]), "Request 'taken' is running already"),
    ],
)
def test_requests_that_can_never_run_are_refused(bad, message):
    engine = FakeDeviceEngine(SMALL)
    engine.add(request("taken", [1]))
    with pytest.raises(UserError, match=message):
        engine.add(bad)
    assert engine.stats().waiting == 1


def test_mesh_with_other_axes_than_tensor_is_refused():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh), pytest.raises(UserError, match="only `tensor` may be above 1"):
        FakeDeviceEngine(SMALL)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=2), jax.devices()[:2])
    with jax.set_mesh(mesh), pytest.raises(UserError, match="2 devices can't share 1 kv heads"):
        FakeDeviceEngine(SMALL)
    with pytest.raises(UserError, match="vocab_size is 51; the model has 50 rows"):
        Engine(None, CONFIG, vocab_size=51)


def test_idle_pages_that_a_request_reuses_are_not_counted_as_available():
    """Of ten pages four are idle and reused by the new request, which needs four more than that."""
    engine = FakeDeviceEngine(dataclasses.replace(SMALL, pages=10))
    answers = Answers(engine)
    engine.add(request("before", range(17), max_tokens=1))
    answers.run()
    engine.add(request("big", [9] * 19, max_tokens=2))
    engine.add(request("next", [*range(16), *[8] * 16], max_tokens=1))
    answers.step()
    answers.step()
    assert engine.stats().running == 1 and engine.stats().waiting == 1
    answers.run()
    assert answers.cached["next"] == 16
