"""GPTQ folders, packed here by AutoGPTQ's documented layout: loading, parity with dense models."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_jax.errors import UserError
from qwen_jax.interop import config_to_hf, load_params, read_config
from qwen_jax.interop.mapping import hf_tensors, tree_from_hf
from qwen_jax.kernels.quantised import GroupWeight
from qwen_jax.model import ForwardOptions, ModelConfig, abstract_params, forward, ntk_alphas
from qwen_jax.model.quantised import ChannelWeight
from qwen_jax.parallel import named_sharding
from tests.interop.folders import toy_mesh

V1 = ModelConfig(
    family="qwen", vocab_size=96, d_model=64, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=16,
    d_ff=128, max_length=64, trained_length=16, dynamic_ntk=True, logn=True,
)  # fmt: skip
V2 = ModelConfig(
    family="qwen2", vocab_size=96, d_model=64, n_layers=2, n_heads=8, n_kv_heads=2, head_dim=8,
    d_ff=128, max_length=64, trained_length=64,
)  # fmt: skip
LINEARS = {
    "qwen": ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"),
    "qwen2": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
              "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}  # fmt: skip


def pack_words(numbers, bits):
    """Packs 32/bits integers along axis 0 into an int32, the first in the lowest bits."""
    per_word = 32 // bits
    out = np.zeros((numbers.shape[0] // per_word, numbers.shape[1]), np.int64)
    for row in range(numbers.shape[0]):
        out[row // per_word] += numbers[row].astype(np.int64) * 2 ** (bits * (row % per_word))
    return torch.from_numpy(out).to(torch.int32)  # wraps around, as two's complement does


def gptq_tensors(cfg, bits, group, *, symmetric=True, zero_bias=1, seed=0):
    """Returns (random tensors of a GPTQ folder, the dense float64 tensors that they represent)."""
    rng = np.random.default_rng(seed)
    stored, dense = {}, {}
    for name, tensor in hf_tensors(cfg).items():
        base = name.removesuffix(".weight")
        if not base.endswith(LINEARS[cfg.family]):
            value = torch.from_numpy(0.3 * rng.standard_normal(tensor.shape)).to(torch.float16)
            stored[name], dense[name] = value, value.double().numpy()
            continue
        outputs, inputs = tensor.shape
        width = inputs if group == -1 else group
        q = rng.integers(0, 2**bits, (inputs, outputs))
        scales = rng.uniform(0.2, 1, (inputs // width, outputs)) / 2**bits / 4
        scales = torch.from_numpy(scales).to(torch.float16)
        zeros = np.full(scales.shape, 2 ** (bits - 1))
        if not symmetric:
            zeros = rng.integers(1, 2**bits + 1, scales.shape)
        groups = np.arange(inputs) // width
        stored[base + ".qweight"] = pack_words(q, bits)
        stored[base + ".qzeros"] = pack_words((zeros - zero_bias).T, bits).T.contiguous()
        stored[base + ".scales"] = scales
        stored[base + ".g_idx"] = torch.from_numpy(groups).to(torch.int32)
        dense[name] = ((q - zeros[groups]) * scales.double().numpy()[groups]).T
    return stored, dense


def quantisation(bits, group, **more):
    """Returns a quantization_config object."""
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False} | more


def write(folder, cfg, tensors, settings, *, separate=False):
    """Writes a GPTQ folder; `separate` puts settings into quantize_config.json, as old writers."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_to_hf(cfg)
    if separate:
        settings = {k: v for k, v in settings.items() if k != "quant_method"}
        (folder / "quantize_config.json").write_text(json.dumps(settings))
    else:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def logits(params, cfg, tokens, mesh=None):
    """Returns float32 logits at inference, with NTK and LogN as `cfg` has them."""
    alpha = np.tile(ntk_alphas(tokens.shape[1], cfg), (len(tokens), 1)) if cfg.dynamic_ntk else None
    options = ForwardOptions(dtype="float32")

    def run(params, tokens):
        return forward(params, tokens, cfg, options, ntk_alpha=alpha, logn=cfg.logn)[0]

    with jax.default_matmul_precision("highest"):
        if mesh is None:
            return np.asarray(jax.jit(run)(params, tokens))
        with jax.set_mesh(mesh):
            tokens = jax.device_put(tokens, named_sharding(mesh, "batch", "sequence"))
            return np.asarray(jax.jit(run)(params, tokens))


CASES = {
    "v1 int4": (V1, 4, 32, {}),
    "v1 int8": (V1, 8, 16, {}),
    "v2 int4": (V2, 4, 16, {}),
    "v2 int8, asymmetric": (V2, 8, 32, {"symmetric": False}),
    "v1 int4, asymmetric": (V1, 4, 64, {"symmetric": False}),
    "v2 int4, a scale per channel": (V2, 4, -1, {}),
    "v1 int8, a scale per channel": (V1, 8, -1, {}),
    "v2 int4, per channel, asymmetric": (V2, 4, -1, {"symmetric": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_match_the_dequantised_dense_model(tmp_path, name):
    cfg, bits, group, how = CASES[name]
    stored, dense = gptq_tensors(cfg, bits, group, **how)
    write(tmp_path, cfg, stored, quantisation(bits, group), separate=cfg is V1)
    assert read_config(tmp_path) == cfg
    params = load_params(tmp_path, cfg, abstract_params(cfg))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 96, (2, 24)), jnp.int32)
    reference = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree_from_hf(dense, cfg))
    expected = logits(reference, cfg, tokens)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits(params, cfg, tokens), expected, atol=1e-4)
    kind = ChannelWeight if group == -1 and not how else GroupWeight
    assert all(isinstance(params["layers"]["attn"][x], kind) for x in "qkvo")
    if kind is GroupWeight:
        assert params["layers"]["mlp"]["up"].codes.shape == (2, 64 * bits // 32, 128)
        assert (params["layers"]["mlp"]["up"].zeros is None) == (not how)


@pytest.mark.parametrize("name", ["v1 int4", "v2 int4", "v2 int8, asymmetric",
                                  "v2 int4, a scale per channel"])  # fmt: skip
def test_sharded_logits_match_a_single_device(tmp_path, name):
    cfg, bits, group, how = CASES[name]
    stored, _ = gptq_tensors(cfg, bits, group, **how)
    write(tmp_path, cfg, stored, quantisation(bits, group))
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 96, (4, 24)), jnp.int32)
    alone = logits(load_params(tmp_path, cfg, abstract_params(cfg)), cfg, tokens)
    mesh = toy_mesh(data=2, fsdp=2, tensor=2)
    params = load_params(tmp_path, cfg, abstract_params(cfg, mesh))
    for leaf, axis in (("q", -1 if group > 0 else 2), ("o", 1)):
        codes = params["layers"]["attn"][leaf].codes
        part = codes.addressable_shards[0].data.shape
        assert part[axis] * 2 == codes.shape[axis] and np.prod(part) * 2 == codes.size
    np.testing.assert_allclose(logits(params, cfg, tokens, mesh), alone, atol=2e-6)


def test_gptq_v2_zeros_are_stored_without_offset(tmp_path):
    """Format gptq_v2 stores zero instead of zero − 1."""
    stored, dense = gptq_tensors(V2, 4, 16, symmetric=True, zero_bias=0)
    write(tmp_path, V2, stored, quantisation(4, 16, checkpoint_format="gptq_v2"))
    params = load_params(tmp_path, V2, abstract_params(V2))
    tokens = jnp.asarray([[1, 2, 3, 4]])
    reference = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree_from_hf(dense, V2))
    np.testing.assert_allclose(logits(params, V2, tokens), logits(reference, V2, tokens), atol=1e-4)


def test_zero_biases_are_ignored_and_nonzero_ones_rejected(tmp_path):
    stored, _ = gptq_tensors(V1, 4, 32)
    name = "transformer.h.1.mlp.w1.bias"
    write(tmp_path, V1, stored | {name: torch.zeros(128)}, quantisation(4, 32))
    load_params(tmp_path, V1, abstract_params(V1))
    write(tmp_path, V1, stored | {name: torch.ones(128)}, quantisation(4, 32))
    refused(tmp_path, V1, name, "not zero")


def refused(folder, cfg, *words):
    """Checks that loading the folder raises a UserError whose message contains all words."""
    with pytest.raises(UserError) as error:
        load_params(folder, read_config(folder), abstract_params(cfg))
    for word in words:
        assert word in str(error.value), error.value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "awq"}, ["awq", "launch.quantise"]),
        ({"desc_act": True}, ["desc_act"]),
        ({"bits": 3}, ["bits 3"]),
        ({"bits": None}, ["bits None"]),
        ({"group_size": 0}, ["group_size 0"]),
        ({"group_size": "128"}, ["group_size '128'"]),
        ({"group_size": 48}, ["groups of 48"]),
        ({"checkpoint_format": "marlin"}, ["marlin"]),
        ({"dynamic": {"-:.*down.*": {}}}, ["dynamic"]),
        ({"bits": 8}, ["qweight has shape [8, 64]", "[16, 64]"]),
    ],
)
def test_unsupported_quantisation_settings_are_rejected(tmp_path, change, words):
    stored, _ = gptq_tensors(V2, 4, 16)
    write(tmp_path, V2, stored, quantisation(4, 16) | change)
    refused(tmp_path, V2, *words)


def test_reordered_g_idx_is_rejected(tmp_path):
    stored, _ = gptq_tensors(V2, 4, 16)
    name = "model.layers.1.mlp.down_proj.g_idx"
    stored[name] = stored[name].flip(0)
    write(tmp_path, V2, stored, quantisation(4, 16))
    refused(tmp_path, V2, name, "order")


def test_groups_split_over_devices_are_rejected(tmp_path):
    stored, _ = gptq_tensors(V2, 4, 64)
    write(tmp_path, V2, stored, quantisation(4, 64))
    with pytest.raises(UserError, match=r"64 inputs, split over 2 devices.*groups of 64"):
        load_params(tmp_path, V2, abstract_params(V2, toy_mesh()))


def test_quantising_packed_weights_is_rejected(tmp_path):
    from qwen_jax.model.quantised import QuantFormat

    stored, _ = gptq_tensors(V2, 4, 16)
    write(tmp_path, V2, stored, quantisation(4, 16))
    with pytest.raises(UserError, match="already quantised to int4-g16"):
        load_params(tmp_path, V2, abstract_params(V2), quantise=QuantFormat(8, None))
    assert len(load_file(tmp_path / "model.safetensors")) == len(stored)
