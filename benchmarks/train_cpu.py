"""Tokens per second and peak memory of the train step, against a naive one in the same run.

    python -m benchmarks.train_cpu [--rounds=5] [--dtype=bfloat16] [--out=FILE.json]

The model is a Qwen v1 of hidden 512, 8 layers, sequence 512, batch 4, with a vocabulary of 4,096
and of 151,936 rows. The naive step is what one writes in an afternoon with plain `jax.numpy`: a
Python loop over the layers, all logits at once, `jax.nn.log_softmax`, `optax.adamw`, autodiff; the
same parameters, mixed precision, loss and optimizer. Speeds: both steps take turns in one process
and the median is reported. Memory: the growth of a fresh process's peak resident size while it
trains, one process per step; and what XLA plans (arguments + temporaries). Processor seconds, the
system's included, stand beside the speeds: they say more where the machine has other work.
"""

from __future__ import annotations

import functools
import json
import platform
import resource
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from benchmarks.report import emit
from qwen_jax.model import ForwardOptions, ModelConfig, count_params, decay_mask
from qwen_jax.train.config import LossConfig, StepConfig
from qwen_jax.train.objective import NextToken
from qwen_jax.train.optimizer import OptimizerConfig, learning_rate
from qwen_jax.train.state import init_state
from qwen_jax.train.step import train_step

BATCH, LENGTH = 4, 512
VOCABULARIES = (4_096, 151_936)

_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed steps of each kind, taking turns.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Compute dtype.")
_CHUNK = flags.DEFINE_integer("chunk", 512, "Tokens whose logits the real loss holds at a time.")
_OUT = flags.DEFINE_string("out", "", "Also write the JSON here.")
_WORKER = flags.DEFINE_string("worker", "", "Internal: what a child process measures.")


def configs(vocab: int, dtype: str, chunk: int) -> StepConfig:
    model = ModelConfig(
        family="qwen",
        vocab_size=vocab,
        d_model=512,
        n_layers=8,
        n_heads=8,
        n_kv_heads=8,
        head_dim=64,
        d_ff=1376,  # 8/3 · 512, up to a multiple of 32
        max_length=LENGTH,
    )
    optimizer = OptimizerConfig(warmup_steps=10, decay_steps=1000)
    # Recomputing the FFN is faster on a CPU than keeping it: memory traffic is what costs.
    options = ForwardOptions(dtype=dtype, remat="qkv_out")
    return StepConfig(model, options, optimizer, LossConfig(chunk=chunk))


def naive_forward(params, tokens, config: StepConfig):
    """Logits float32 [B,T,V], nothing clever."""
    c, dtype = config.model, config.options.compute_dtype
    params = jax.tree.map(lambda w: w.astype(dtype), params)

    def norm(x, scale):
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + c.norm_eps)
        return wide.astype(dtype) * scale

    half = c.head_dim // 2
    angles = jnp.arange(tokens.shape[1])[:, None] * c.rope_theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]

    def rotate(x):
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(dtype)

    x = params["embed"]["table"][tokens]
    causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
    for layer in range(c.n_layers):
        w = jax.tree.map(lambda p, layer=layer: p[layer], params["layers"])
        h, a = norm(x, w["attn_norm"]["scale"]), w["attn"]
        q, k, v = (jnp.einsum("BTD,DNH->BTNH", h, a[n]) + a[f"{n}_bias"] for n in "qkv")
        scores = jnp.einsum("BTNH,BSNH->BNTS", rotate(q), rotate(k)).astype(jnp.float32)
        scores = jnp.where(causal, scores / c.head_dim**0.5, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
        out = jnp.einsum("BNTS,BSNH->BTNH", weights, v)
        x = x + jnp.einsum("BTNH,NHD->BTD", out, a["o"])
        h, m = norm(x, w["mlp_norm"]["scale"]), w["mlp"]
        x = x + (jax.nn.silu(h @ m["gate"]) * (h @ m["up"])) @ m["down"]
    x = norm(x, params["final_norm"]["scale"])
    return (x @ params["head"]["kernel"]).astype(jnp.float32)


def naive_step(state, batch, config: StepConfig):
    """(params, optimizer state, step) -> the same and the loss."""
    o = config.optimizer
    params, opt_state, step = state
    optimizer = optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        optax.adamw(
            lambda count: learning_rate(o, count),
            *(o.b1, o.b2, o.eps),
            weight_decay=o.weight_decay,
            mask=decay_mask(config.model),
        ),
    )

    def loss(params):
        logprobs = jax.nn.log_softmax(naive_forward(params, batch["tokens"], config))
        picked = jnp.take_along_axis(logprobs, batch["targets"][..., None], -1)[..., 0]
        return -jnp.sum(picked * batch["loss_mask"]) / jnp.sum(batch["loss_mask"])

    value, grads = jax.value_and_grad(loss)(params)
    opt_state = optimizer.init(params) if opt_state is None else opt_state
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state, step + 1), {"loss": value}


def make_batch(vocab: int):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, (BATCH, LENGTH + 1)).astype(np.int32)
    shape = (BATCH, LENGTH)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape).copy(),
        "loss_mask": np.ones(shape, np.float32),
        "n_bytes": np.full(BATCH, 4.0 * LENGTH, np.float32),
    }


def build(kind: str, config: StepConfig, batch):
    """(compiled step, fresh state)."""
    state = jax.jit(functools.partial(init_state, config))(jax.random.key(0))
    step = functools.partial(train_step, config=config, objective=NextToken())
    if kind == "naive":
        step = functools.partial(naive_step, config=config)
        params = state.params
        opt_state = jax.eval_shape(step, (params, None, state.step), batch)[0][1]
        opt_state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), opt_state)
        state = (params, opt_state, state.step)
    return jax.jit(step, donate_argnums=0).lower(state, batch).compile(), state


def measure_speed(config: StepConfig, rounds: int) -> dict:
    batch = jax.device_put(make_batch(config.model.vocab_size))
    steps = {kind: build(kind, config, batch) for kind in ("real", "naive")}
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    used: dict[str, list[float]] = {kind: [] for kind in steps}
    losses: dict[str, list[float]] = {kind: [] for kind in steps}
    for round_ in range(rounds + 1):  # the first one warms up
        for kind, (step, state) in steps.items():
            start, processor = time.perf_counter(), time.process_time()
            state, metrics = step(state, batch)
            jax.block_until_ready(state)
            if round_:
                times[kind].append(time.perf_counter() - start)
                used[kind].append(time.process_time() - processor)
            losses[kind].append(float(metrics["loss"]))
            steps[kind] = (step, state)
    return {
        kind: {
            "tokens_per_second": BATCH * LENGTH / statistics.median(times[kind]),
            "seconds_per_step": [round(t, 3) for t in times[kind]],
            "cpu_seconds_per_step": statistics.median(used[kind]),
            "losses": losses[kind],
            "xla_temp_bytes": steps[kind][0].memory_analysis().temp_size_in_bytes,
        }
        for kind in steps
    }


def measure_memory(kind: str, config: StepConfig) -> dict:
    """Growth of the peak resident size over what the process had before it made any array."""
    jax.block_until_ready(jnp.zeros(1))

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = peak()
    batch = jax.device_put(make_batch(config.model.vocab_size))
    step, state = build(kind, config, batch)
    for _ in range(2):
        state, _ = step(state, batch)
    jax.block_until_ready(state)
    return {"peak_bytes": peak() - before}


def child(what: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.train_cpu", f"--worker={what}"]
    command += [f"--{f.name}={f.value}" for f in (_ROUNDS, _DTYPE, _CHUNK)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def worker(what: str) -> dict:
    task, vocab = what.split(":")
    config = configs(int(vocab), _DTYPE.value, _CHUNK.value)
    if task == "speed":
        return measure_speed(config, _ROUNDS.value)
    return measure_memory(task, config)


def main(_):
    if _WORKER.value:
        print(json.dumps(worker(_WORKER.value)))
        return
    results = []
    for vocab in VOCABULARIES:
        speed = child(f"speed:{vocab}")
        for kind in speed:
            speed[kind] |= child(f"{kind}:{vocab}")
        real, naive = speed["real"], speed["naive"]
        results.append(
            {
                "vocabulary": vocab,
                "parameters": count_params(configs(vocab, _DTYPE.value, 1).model),
                **speed,
                "speed_ratio": real["tokens_per_second"] / naive["tokens_per_second"],
                "cpu_seconds_ratio": naive["cpu_seconds_per_step"] / real["cpu_seconds_per_step"],
                "peak_memory_ratio": real["peak_bytes"] / naive["peak_bytes"],
            }
        )
    report = {
        "benchmark": "train_cpu",
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "dtype": _DTYPE.value,
        "batch": BATCH,
        "sequence": LENGTH,
        "results": results,
    }
    emit(report, _OUT.value)


if __name__ == "__main__":
    app.run(main)
