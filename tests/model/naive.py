"""Qwen v1 with windows and a factor of NTK for each layer, in float64: what no released code has.

One text at a time, complex rotations, a mask of all scores; nothing is shared with the library but
the weights and the description of the network.
"""

import functools

import jax
import numpy as np

from qwen_jax.model import ModelConfig, layer_windows
from tests.model.families import params

S = 8
CONFIG = ModelConfig(
    family="qwen", vocab_size=96, d_model=32, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=8,
    d_ff=48, max_length=128, trained_length=S, dynamic_ntk=True, logn=True,
    windows=layer_windows(4, S, layers_per_window=1, longest=64),
)  # fmt: skip


@functools.cache
def weights64():
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params(CONFIG))


def factor(seen):
    """2c − 1 for the smallest power of two c with c·S tokens or more; 1 within S."""
    chunks = 1
    while chunks * S < seen:
        chunks *= 2
    return 2 * chunks - 1 if chunks > 1 else 1


def rotated(x, alpha):
    """x [T,N,H]: channel pairs (i, i + H/2) as complex numbers turned by position · frequency."""
    width = x.shape[-1]
    base = CONFIG.rope_theta * alpha ** (width / (width - 2))
    frequency = 1 / base ** (np.arange(0, width, 2) / width)
    turns = np.exp(1j * np.arange(len(x))[:, None] * frequency)[:, None]
    z = (x[..., : width // 2] + 1j * x[..., width // 2 :]) * turns
    return np.concatenate([z.real, z.imag], -1)


def normed(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.norm_eps) * scale


def naive(tokens, prompt=None):
    """Logits [T,V] of one text whose first `prompt` tokens (by default all) were its prompt."""
    w, n = weights64(), len(tokens)
    prompt = n if prompt is None else prompt
    i, j = np.arange(n)[:, None], np.arange(n)
    logn = np.maximum(np.log(np.arange(1, n + 1)) / np.log(S), 1.0)
    x = w["embed"]["table"][tokens]
    for layer, window in enumerate(CONFIG.windows):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], w["layers"])
        a = own["attn"]
        h = normed(x, own["attn_norm"]["scale"])
        q, k, v = (np.einsum("td,dnh->tnh", h, a[c]) + a[f"{c}_bias"] for c in "qkv")
        alpha = factor(prompt if window is None else min(prompt, window))
        q, k = rotated(q, alpha) * logn[:, None, None], rotated(k, alpha)
        scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(CONFIG.head_dim)
        seen = (j <= i) & (i - j < (n if window is None else window))
        scores = np.where(seen, scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + np.einsum("nts,snh,nhd->td", p, v, a["o"])
        h, m = normed(x, own["mlp_norm"]["scale"]), own["mlp"]
        gate = h @ m["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ m["up"])) @ m["down"]
    return normed(x, w["final_norm"]["scale"]) @ w["head"]["kernel"]
