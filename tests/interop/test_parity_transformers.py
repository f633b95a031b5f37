"""Parity with transformers' Qwen2 and Qwen3 on tiny random models: logits, gradients, export."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from qwen_jax.errors import UserError
from qwen_jax.interop import load_params, logits, read_config, save_hf, tree_to_hf
from qwen_jax.model import ForwardOptions, abstract_params, forward
from tests.interop.folders import toy_mesh

SIZE = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "initializer_range": 0.3, "rms_norm_eps": 1e-5,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
    "rope_theta": 1e4,
}  # fmt: skip
WINDOWS = {
    "use_sliding_window": True, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip
CASES = {
    "qwen2-untied": Qwen2Config(
        **SIZE, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ),
    "qwen2-tied-windows": Qwen2Config(**SIZE, **WINDOWS, tie_word_embeddings=True),
    "qwen2-yarn": Qwen2Config(**SIZE, rope_parameters=YARN),
    "qwen3-head-dim": Qwen3Config(**SIZE, head_dim=32),
    "qwen3-tied-windows-yarn": Qwen3Config(
        **SIZE, head_dim=8, tie_word_embeddings=True, rope_parameters=YARN, **WINDOWS
    ),
}
FLOAT32 = ForwardOptions(dtype="float32")


@pytest.fixture(scope="module", autouse=True)
def _highest():
    with jax.default_matmul_precision("highest"):
        yield


def reference_model(case):
    """Returns a transformers model with weights so large that every part affects the logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CASES[case], attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name or "bias" in name:
                p.add_(0.3 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_gradients_and_export_match_transformers(tmp_path, case):
    theirs = reference_model(case)
    theirs.save_pretrained(tmp_path / "in")
    cfg = read_config(tmp_path / "in")
    mesh = toy_mesh(1, 2, 2)
    params = load_params(tmp_path / "in", cfg, abstract_params(cfg, mesh))
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 60))
    tokens = torch.from_numpy(ids)
    expected = theirs(tokens, labels=tokens)
    expected.loss.backward()

    def loss(params, tokens):
        out = forward(params, tokens, cfg, FLOAT32)[0]
        picked = jax.nn.log_softmax(out[:, :-1]) * jax.nn.one_hot(tokens[:, 1:], cfg.vocab_size)
        return -picked.sum() / tokens[:, 1:].size, out

    with jax.set_mesh(mesh):
        sharded = jax.reshard(jnp.asarray(ids, jnp.int32), jax.P("fsdp"))
        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (value, ours), grads = step(params, sharded)
    scale = np.abs(expected.logits.detach().numpy()).max()
    assert scale > 3  # Else the tolerance would hide a missing part.
    np.testing.assert_allclose(ours, expected.logits.detach().numpy(), atol=5e-4, rtol=1e-4)
    assert float(value) == pytest.approx(expected.loss.item(), abs=1e-5)
    by_name = tree_to_hf(grads, cfg)
    wanted = {n: p.grad.numpy() for n, p in theirs.named_parameters()}
    assert by_name.keys() == wanted.keys()
    for name, g in wanted.items():
        np.testing.assert_allclose(
            by_name[name], g, rtol=0, atol=1e-5 + 1e-3 * np.abs(g).max(), err_msg=name
        )

    save_hf(tmp_path / "out", params, cfg, dtype="float32", max_shard_bytes=100_000)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    with torch.no_grad():
        np.testing.assert_array_equal(again.eval()(tokens).logits, expected.logits.detach())


def test_write_logits_on_two_devices_matches_transformers(tmp_path):
    """Tensor-parallel, and past max_position_embeddings up to YaRN's limit but not beyond it."""
    theirs = reference_model("qwen2-yarn")
    theirs.config.max_position_embeddings = 32
    theirs.save_pretrained(tmp_path / "hf")
    ids = np.random.default_rng(1).integers(0, 160, (2, 128))
    np.savez(tmp_path / "ids.npz", ids_long=ids)
    logits.write_logits(tmp_path / "hf", tmp_path / "ids.npz", tmp_path / "out.npz", tensor=2)
    with np.load(tmp_path / "out.npz") as out, torch.no_grad():
        want = theirs(torch.from_numpy(ids)).logits.numpy()
        np.testing.assert_allclose(out["logits_long"], want, atol=5e-4, rtol=1e-4)
    np.savez(tmp_path / "ids.npz", ids_long=np.zeros(129, np.int32))
    with pytest.raises(UserError, match=r"129 tokens.*128"):
        logits.write_logits(tmp_path / "hf", tmp_path / "ids.npz", tmp_path / "out.npz")
