"""Analytic FLOPs of training, and the peak FLOP/s of devices, for MFU (model FLOPs utilisation).

XLA's own cost analysis counts the body of a scan once, so the formula is given here. The convention
is that of PaLM (appendix B) with causal attention counted at half: per token, 6 × the parameters
that take part in a matrix product (input embedding excluded, output projection included) plus
12 × N·H × (average number of keys per query) per layer, for N query heads of dimension H.
Recomputation by remat is not counted.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
from absl import logging

from qwen_jax.model import ModelConfig

# Dense bf16 FLOP/s per device, by a substring of `device_kind` (vendors' data sheets).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # JAX lists each of the chip's two TensorCores as a device
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}


def matmul_params(config: ModelConfig) -> int:
    """Returns the number of parameters in matrices that multiply each token.

    These are the layers' matrices and the output projection, without the input embedding.
    """
    attention = config.d_model * config.head_dim * 2 * (config.n_heads + config.n_kv_heads)
    ffn = 3 * config.d_model * config.d_ff
    return config.n_layers * (attention + ffn) + config.d_model * config.vocab_size


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Returns the FLOPs of forward and backward pass per token of rows of `seq_len` tokens.

    Attention is causal, limited to the layers' windows where they have one.
    """
    windows = config.windows or (None,) * config.n_layers
    keys = 0.0  # average per query, summed over layers: i + 1 for the i-th, at most the window
    for window in windows:
        w = min(window or seq_len, seq_len)
        keys += (w * (w + 1) / 2 + (seq_len - w) * w) / seq_len
    return 6.0 * matmul_params(config) + 12.0 * config.n_heads * config.head_dim * keys


def peak_flops(device: jax.Device) -> float:
    """Returns the peak FLOP/s of one device.

    For known accelerators this is the data sheet's figure. For others it is measured, which takes
    about a second and is logged: the best of a few square matrix products, in float32 on CPUs,
    whose devices share the host equally, and in bf16 elsewhere.
    """
    for kind, peak in PEAK_FLOPS.items():
        if kind.lower() in device.device_kind.lower():
            return peak
    on_cpu = device.platform == "cpu"
    n, dtype = (1024, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    x = jax.device_put(jnp.ones((n, n), dtype), device)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    peak = 2 * n**3 / best / (jax.local_device_count() if on_cpu else 1)
    logging.info("peak of %s, measured: %.4g TFLOP/s per device", device.device_kind, peak / 1e12)
    return peak
