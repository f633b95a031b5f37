"""The report of what quantisation loses: each row is the perplexity of what it names."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from launch import quantise as program
from qwen_jax.evaluate import quantisation
from qwen_jax.evaluate.perplexity import perplexity
from qwen_jax.evaluate.quantisation import as_text, compare
from qwen_jax.interop import save_hf
from qwen_jax.kernels.cache import dequantise, quantise
from qwen_jax.model import (
    ForwardOptions,
    ModelConfig,
    abstract_params,
    hidden_states,
    init_params,
    ntk_alphas,
    transformer,
)
from qwen_jax.model.quantised import QuantFormat, dequantise_params, quantise_params
from qwen_jax.tokenizer import Tokenizer

CONFIG = ModelConfig(
    family="qwen", vocab_size=300, d_model=64, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=16,
    d_ff=128, max_length=64, trained_length=16, dynamic_ntk=True, logn=True, init_std=0.15,
)  # fmt: skip
FORMATS = (QuantFormat(8, None, head=True), QuantFormat(4, 32), QuantFormat(4, 48))
EXACT = ForwardOptions(dtype="float32")


@pytest.fixture(scope="module")
def params():
    return jax.jit(lambda key: init_params(CONFIG, key))(jax.random.key(0))


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(0).integers(0, 256, (3, 25)).astype(np.int32)


@pytest.fixture(scope="module")
def rows(params, windows):
    found = compare(params, windows, CONFIG, formats=FORMATS, batch=3)
    return {row.name: row for row in found}


def test_every_row_equals_the_perplexity_of_its_weights(params, windows, rows):
    """Groups of 48 don't divide 64 inputs, so that format has no row."""
    assert list(rows) == ["float32", "bfloat16", "float32, 8-bit KV cache", "int8, head int8",
                          "int4-g32"]  # fmt: skip
    whole = perplexity(params, windows, CONFIG, EXACT).perplexity
    assert rows["float32"].perplexity == pytest.approx(whole, rel=1e-5)
    for name, fmt in (("int8, head int8", FORMATS[0]), ("int4-g32", FORMATS[1])):
        dense = dequantise_params(quantise_params(params, fmt), abstract_params(CONFIG))
        expected = perplexity(dense, windows, CONFIG, EXACT).perplexity
        assert rows[name].perplexity == pytest.approx(expected, rel=1e-5)
        assert rows[name].perplexity != pytest.approx(rows["float32"].perplexity, rel=1e-5)
    assert rows["int4-g32"].bits == 5.0 and rows["bfloat16"].bits == 16.0
    assert rows["int4-g32"].megabytes < rows["bfloat16"].megabytes
    assert "+0.00 %" in as_text(list(rows.values()))


def test_the_cache_row_rounds_keys_and_values(params, windows, rows, monkeypatch):
    """Against the plain forward pass with its attention wrapped, on as many rows at once.

    The largest number of a vector lies on a border of codes, so its code hangs on the last bit.
    """
    plain = transformer.attention

    def rounded(q, k, v, **how):
        return plain(q, *(dequantise(*quantise(x)).astype(x.dtype) for x in (k, v)), **how)

    monkeypatch.setattr(transformer, "attention", rounded)
    alpha = np.tile(ntk_alphas(24, CONFIG), (3, 1))
    hidden = hidden_states(params, windows[:, :-1], CONFIG, EXACT, ntk_alpha=alpha, logn=True)[0]
    logits = transformer.logits(params, hidden, CONFIG)
    logprobs = jax.nn.log_softmax(logits)
    nll = -np.take_along_axis(np.asarray(logprobs), windows[:, 1:, None], axis=-1).mean()
    found = rows["float32, 8-bit KV cache"].perplexity
    assert found == pytest.approx(np.exp(nll), rel=1e-4)
    assert found != pytest.approx(rows["float32"].perplexity, rel=1e-6)


@pytest.mark.slow
def test_program_prints_and_returns_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quantisation, "FORMATS", (QuantFormat(4, 64), QuantFormat(4, 128)))
    vocabulary = Tokenizer(tuple(bytes([i]) for i in range(256)))
    config = dataclasses.replace(CONFIG, vocab_size=vocabulary.vocab_size, n_layers=1)
    tree = jax.jit(lambda key: init_params(config, key))(jax.random.key(0))
    save_hf(tmp_path / "src", tree, config, dtype="float32")
    vocabulary.save(tmp_path / "bytes.tiktoken")
    (tmp_path / "text.txt").write_text("what is lost is counted " * 9)
    found = program.report(
        str(tmp_path / "src"), str(tmp_path / "text.txt"), str(tmp_path / "bytes.tiktoken"), 24, 3
    )
    assert found["windows"] == 3 and found["rows"][0]["name"] == "float32"
    names = [row["name"] for row in found["rows"]]
    assert "int4-g64" in names and "int4-g128" not in names
    assert json.loads(json.dumps(found)) == found
    assert "int4-g64" in capsys.readouterr().out
