"""Parity with the released Qwen v1 code, run on CPU in float32, on a folder that it saved.

Reference arrays: tests/fixtures/qwen1-small, described in its README together with tolerances.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.interop import load_params, logits, read_config, tree_to_hf
from qwen_jax.model import ForwardOptions, abstract_params, forward, hidden_states
from tests.interop.folders import toy_mesh

FLOAT32 = ForwardOptions(dtype="float32")


@pytest.fixture(scope="module", autouse=True)
def _highest():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def model(qwen1_small):
    cfg = read_config(qwen1_small)
    return load_params(qwen1_small, cfg, abstract_params(cfg)), cfg


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=5e-4, rtol=1e-4)


def test_prefill_logits_match_the_released_code(qwen1_small, tmp_path):
    """Up to four times the trained length (NTK and LogN act); [T] and [B, T], any int dtype."""
    with np.load(qwen1_small / "prefill.npz") as stored:
        reference = dict(stored)
    ids = {name: a for name, a in reference.items() if name.startswith("ids_")}
    ids["ids_batch of two"] = np.stack([ids["ids_193"]] * 2).astype(np.uint16)
    np.savez(tmp_path / "ids.npz", **ids, unrelated=np.ones(3))
    logits.write_logits(qwen1_small, tmp_path / "ids.npz", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as out:
        assert set(out) == {name.replace("ids_", "logits_") for name in ids}
        assert out["logits_batch of two"].dtype == np.float32
        for row in out["logits_batch of two"]:
            close(row, reference["logits_193"])
        for name in ids.keys() - {"ids_batch of two"}:
            key = name.replace("ids_", "logits_")
            close(out[key], reference[key])


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("ntk0_logn0", {"dynamic_ntk": False, "logn": False}),
        ("ntk0_logn1", {"dynamic_ntk": False}),
        ("ntk1_logn0", {"logn": False}),
        ("ntk1_logn1", {}),
        ("72b_like_base1e6", {"dynamic_ntk": False, "logn": False, "rope_theta": 1e6}),
        ("rotary_pct_0.5", {"rope_fraction": 0.5}),
    ],
)
def test_logits_past_the_trained_length_match_for_each_switch(qwen1_small, model, key, change):
    params, cfg = model
    with np.load(qwen1_small / "switches.npz") as stored:
        ids, want = stored["ids"], stored[f"logits_{key}"]
    ours = logits.prompt_logits(params, ids[None], dataclasses.replace(cfg, **change), FLOAT32)
    close(ours[0], want)


def test_training_mode_has_neither_ntk_nor_logn(qwen1_small, model):
    params, cfg = model
    with np.load(qwen1_small / "switches.npz") as stored:
        ids, want = stored["ids"], stored["logits_train_mode"]
    close(forward(params, jnp.asarray(ids)[None], cfg, FLOAT32)[0][0], want)


def test_residual_stream_matches_after_each_block(qwen1_small, model):
    params, cfg = model
    with np.load(qwen1_small / "hidden.npz") as stored:
        ref = dict(stored)
    tokens = jnp.asarray(ref["ids"])[None]
    context = {"ntk_alpha": 7.0, "logn": True}  # 100 tokens: between two and four times 48.
    np.testing.assert_array_equal(params["embed"]["table"][tokens[0]], ref["h0"])
    ours, _ = hidden_states(params, tokens, cfg, FLOAT32, **context)
    close(ours[0], ref["h2"])  # The last one is after the final norm.
    first = params | {"layers": jax.tree.map(lambda x: x[:1], params["layers"])}
    ours, _ = hidden_states(first, tokens, dataclasses.replace(cfg, n_layers=1), FLOAT32, **context)
    rms = np.sqrt((ref["h1"] ** 2).mean(-1, keepdims=True) + cfg.norm_eps)
    close(ours[0], ref["h1"] / rms * np.asarray(params["final_norm"]["scale"]))


def test_bfloat16_logits_are_within_the_reference_tolerance(qwen1_small, model):
    params, cfg = model
    with np.load(qwen1_small / "bf16.npz") as stored:
        ids, want = stored["ids"], stored["logits_bf16"]
    bf16 = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    options = ForwardOptions(dtype="bfloat16")
    ours = logits.prompt_logits(bf16, ids[None], cfg, options)[0]
    assert np.abs(np.asarray(ours) - want).max() < 0.35


def test_gradients_match_by_hf_name(qwen1_small, model):
    """Gradients of the next-token loss over unmasked labels, mapped to HF names."""
    _, cfg = model
    with np.load(qwen1_small / "train_grads.npz") as stored:
        ref = dict(stored)
    tokens, labels = jnp.asarray(ref["ids"]), jnp.asarray(ref["labels"])[:, 1:]
    mesh = toy_mesh(2, 1, 1)  # Sharded by batch: gradients are summed over devices.
    params = load_params(qwen1_small, cfg, abstract_params(cfg, mesh))

    def loss(params, tokens, labels):
        out = forward(params, tokens, cfg, FLOAT32)[0][:, :-1]
        hit = jax.nn.one_hot(labels, cfg.vocab_size)  # All zeros for -100.
        return -(jax.nn.log_softmax(out) * hit).sum() / (labels >= 0).sum()

    with jax.set_mesh(mesh):
        tokens, labels = jax.reshard((tokens, labels), jax.P("data"))
        value, grads = jax.jit(jax.value_and_grad(loss))(params, tokens, labels)
    assert value == pytest.approx(ref["loss"], abs=1e-5)
    ours = tree_to_hf(grads, cfg)
    assert {f"grad.{name}" for name in ours} == {k for k in ref if k.startswith("grad.")}
    for name, g in ours.items():
        want = ref[f"grad.{name}"]
        np.testing.assert_allclose(
            g, want, rtol=0, atol=1e-5 + 1e-3 * np.abs(want).max(), err_msg=name
        )
