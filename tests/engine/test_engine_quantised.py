"""The engine over quantised weights gives the tokens that the forward pass chooses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.engine.engine import Engine
from qwen_jax.engine.options import EngineOptions
from qwen_jax.engine.request import Request, SamplingParams
from qwen_jax.model import ForwardOptions, ModelConfig, forward, init_params
from qwen_jax.model.quantised import QuantFormat, quantise_params

CONFIG = ModelConfig(
    family="qwen2", vocab_size=96, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8,
    d_ff=64, max_length=64, trained_length=64, init_std=0.3,
)  # fmt: skip
OPTIONS = ForwardOptions(dtype="float32")


@pytest.mark.slow
def test_output_of_quantised_weights_equals_the_forward_pass():
    """Groups in the layers and an int8 head."""
    fmt = QuantFormat(4, 16, head=True)
    dense = jax.jit(lambda key: init_params(CONFIG, key))(jax.random.key(0))
    params = quantise_params(dense, fmt)
    prompts = [np.arange(5) + 3, (np.arange(17) * 7) % 90]
    run = jax.jit(lambda params, ids: forward(params, ids, CONFIG, OPTIONS)[0][0])
    with jax.default_matmul_precision("highest"):
        expected = {}
        for name, prompt in enumerate(prompts):
            ids = np.zeros((1, 32), np.int32)  # what stands behind is not seen
            ids[0, : len(prompt)] = prompt
            for t in range(len(prompt), len(prompt) + 8):
                ids[0, t] = int(jnp.argmax(run(params, ids)[t - 1]))
            expected[str(name)] = ids[0, len(prompt) : len(prompt) + 8].tolist()
        sizes = EngineOptions(
            max_running_requests=2, page_size=8, pages=20, max_length=64, prefill_tokens=16
        )
        engine = Engine(params, CONFIG, OPTIONS, sizes)
        for name, prompt in enumerate(prompts):
            asked = SamplingParams(max_tokens=8, temperature=0.0)
            engine.add(Request(str(name), tuple(map(int, prompt)), asked))
        answers = {name: [] for name in expected}
        while engine.busy:
            for out in engine.step():
                answers[out.request_id] += out.tokens.tolist()
    assert answers == expected
    assert len({tuple(tokens) for tokens in expected.values()}) == 2
