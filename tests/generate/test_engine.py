"""Host side of the engine: whatever comes and goes, each request gets what it would get alone.

The device is the double of `tests.generate.double`, so hundreds of schedules take seconds;
`test_engine_model.py` runs the real programs.
"""

import dataclasses

import hypothesis
import numpy as np
from hypothesis import strategies as st

from qwen_jax.generate.options import EngineOptions
from qwen_jax.generate.request import Request, SamplingParams
from qwen_jax.model import ntk_alphas
from tests.generate.double import CONFIG, VOCAB, DoubleEngine, alone

SMALL = EngineOptions(
    rows=3, max_length=40, page_size=4, pages=24, prefill_tokens=16, burst=4, seed=3
)


def request(name, prompt, stream=False, **params):
    params = {"temperature": 0.0, "max_tokens": 8} | params
    return Request(name, tuple(prompt), SamplingParams(**params), stream)


def expected(asked, engine):
    alpha = ntk_alphas(len(asked.prompt), CONFIG)[0]
    return alone(asked.prompt, asked.params, alpha, engine.max_length)


class Answers:
    """Collects outputs and checks what must be true of each."""

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
    """Prompts with common beginnings, so that pages are shared."""
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
        rows=st.integers(1, 6),
        max_length=st.just(40),
        page_size=st.sampled_from([4, 8]),
        pages=st.integers(10, 22),
        prefill_tokens=st.sampled_from([8, 16, 64]),
        burst=st.integers(1, 6),
        prefix_cache=st.booleans(),
    )


EVENTS = st.lists(
    st.one_of(requests(), requests(), st.just("step"), st.just("step"), st.integers(0, 30)),
    min_size=1,
    max_size=40,
)
WINDOWED = dataclasses.replace(CONFIG, windows=(6,))


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(options(), EVENTS, st.booleans())
def test_any_schedule_gives_each_request_what_it_gets_alone(sizes, events, one_past):
    engine = DoubleEngine(sizes)
    engine._scheduler._one_past = one_past
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
