"""The engine beyond the trained length: windows and NTK by layer, against the float64 network."""

import jax
import numpy as np
import pytest

from qwen_jax.engine.engine import Engine
from qwen_jax.engine.options import EngineOptions
from qwen_jax.engine.request import Request, SamplingParams
from tests.model.families import FLOAT32, params
from tests.model.naive import CONFIG, naive

NEW = 20
TEXT = np.random.default_rng(3).integers(0, CONFIG.vocab_size, 60)


def check(prompt, tokens, logprobs):
    """Each token is the most probable one, and as probable as the engine said."""
    length = len(prompt)
    scores = naive(np.concatenate([prompt, tokens])[:-1], prompt=length)[length - 1 :]
    highest = scores.max(-1)
    lse = np.log(np.exp(scores - highest[:, None]).sum(-1)) + highest
    own = scores[np.arange(len(tokens)), tokens]
    assert (highest - own < 1e-3).all()
    np.testing.assert_allclose(logprobs, own - lse, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_prompts_on_either_side_of_every_window_and_ntk_boundary():
    """Prefill in pieces, decoding past the borders, and pages shared only where factors are equal.

    All prompts begin alike, but only those of 40 and 33 tokens have the same factors, and those of
    32 and 17.
    """
    sizes = EngineOptions(
        max_running_requests=2, page_size=8, pages=40, max_length=64, prefill_tokens=16
    )
    with jax.default_matmul_precision("highest"):
        engine = Engine(params(CONFIG), CONFIG, FLOAT32, sizes)
        answers = {}
        for lengths in ((40, 7), (33, 17, 9, 32)):
            for n in lengths:
                asked = SamplingParams(max_tokens=NEW, temperature=0.0, logprobs=0)
                engine.add(Request(str(n), tuple(TEXT[:n].tolist()), asked))
            while engine.busy:
                for out in engine.step():
                    entry = answers.setdefault(int(out.request_id), [[], [], 0])
                    entry[0] += out.tokens.tolist()
                    entry[1] += out.raw_logprobs.tolist()
                    entry[2] += out.cached_tokens
    for n, (tokens, logprobs, _) in answers.items():
        assert len(tokens) == NEW
        check(TEXT[:n], tokens, logprobs)
    assert {n: cached for n, (*_, cached) in answers.items()} == {
        40: 0, 7: 0, 33: 32, 17: 0, 9: 0, 32: 16,
    }  # fmt: skip
