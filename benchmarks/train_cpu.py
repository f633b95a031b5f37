"""Speed and peak memory of the train step on a CPU, beside a naive step in the same run.

    python -m benchmarks.train_cpu [--rounds=5] [--dtype=bfloat16] [--out=FILE.json]

The model is a Qwen v1 of hidden size 512 with 8 layers, sequence length 512, batch 4, with a
vocabulary of 4,096 and of 151,936 rows. The naive step is what one writes in an afternoon with
plain `jax.numpy`: a Python loop over the layers, all logits at once, `jax.nn.log_softmax`,
`optax.adamw`, autodiff; the same parameters, mixed precision, loss and optimizer. Speed: both steps
take turns in one process and the median is reported, in wall time and in CPU time (user and
system), which says more on a shared machine. Memory: the growth of a fresh process's peak resident
size while it trains, one process per step, and the temporaries that XLA plans.

Prints one JSON object as its last line, which --out saves.
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
from collections.abc import Callable
from typing import Any, TypeAlias

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

_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed steps of each kind, which take turns.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Compute dtype.")
_CHUNK = flags.DEFINE_integer("chunk", 512, "Tokens whose logits our loss holds at one time.")
_OUT = flags.DEFINE_string("out", "", "Also write the JSON to this file.")
_WORKER = flags.DEFINE_string("worker", "", "Internal: what a child process measures.")

Batch: TypeAlias = dict[str, Any]
"""Arrays of a training batch by name, as `train_step` takes them."""


def step_config(vocab_size: int, dtype: str, chunk: int) -> StepConfig:
    """Returns the configuration of both steps.

    Args:
      vocab_size: vocabulary size.
      dtype: compute dtype.
      chunk: tokens whose logits our loss holds at one time.
    """
    model = ModelConfig(
        family="qwen",
        vocab_size=vocab_size,
        d_model=512,
        n_layers=8,
        n_heads=8,
        n_kv_heads=8,
        head_dim=64,
        d_ff=1376,  # 8/3 · 512, rounded up to a multiple of 32
        max_length=LENGTH,
    )
    optimizer = OptimizerConfig(warmup_steps=10, decay_steps=1000)
    # On a CPU, recomputing the FFN is faster than storing it: memory traffic is the bottleneck.
    options = ForwardOptions(dtype=dtype, remat="qkv_out")
    return StepConfig(model, options, optimizer, LossConfig(chunk=chunk))


def naive_forward(params: Any, tokens: jax.Array, config: StepConfig) -> jax.Array:
    """Computes logits float32 [B, T, V] of tokens int32 [B, T] (batch, sequence) in plain jnp."""
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


def naive_step(
    state: tuple[Any, Any, jax.Array], batch: Batch, config: StepConfig
) -> tuple[tuple[Any, Any, jax.Array], dict[str, jax.Array]]:
    """Runs one naive train step.

    Args:
      state: (params, optimizer state or None to initialise it, step).
      batch: tokens, targets and loss_mask, [B, T] each.
      config: model, optimizer and dtypes.

    Returns:
      (next state, {"loss": mean loss}).
    """
    o = config.optimizer
    params, opt_state, step = state
    optimizer = optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        optax.adamw(
            lambda count: learning_rate(o, count),
            b1=o.b1,
            b2=o.b2,
            eps=o.eps,
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


def make_batch(vocab_size: int) -> Batch:
    """Returns a batch of random tokens, one segment per row, all with loss."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab_size, (BATCH, LENGTH + 1)).astype(np.int32)
    shape = (BATCH, LENGTH)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape).copy(),
        "loss_mask": np.ones(shape, np.float32),
        "n_bytes": np.full(BATCH, 4.0 * LENGTH, np.float32),
    }


def build(kind: str, config: StepConfig, batch: Batch) -> tuple[Callable[..., Any], Any]:
    """Returns (compiled step, initial state) of a kind, "real" or "naive"; the state is donated."""
    state: Any = jax.jit(functools.partial(init_state, config))(jax.random.key(0))
    step: Callable[..., Any] = functools.partial(train_step, config=config, objective=NextToken())
    if kind == "naive":
        step = functools.partial(naive_step, config=config)
        params = state.params
        opt_state = jax.eval_shape(step, (params, None, state.step), batch)[0][1]
        opt_state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), opt_state)
        state = (params, opt_state, state.step)
    return jax.jit(step, donate_argnums=0).lower(state, batch).compile(), state


def measure_speed(config: StepConfig, rounds: int) -> dict[str, Any]:
    """Returns speeds, losses and planned temporaries of both kinds of step, which take turns."""
    batch = jax.device_put(make_batch(config.model.vocab_size))
    steps: dict[str, Any] = {kind: build(kind, config, batch) for kind in ("real", "naive")}
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    cpu_times: dict[str, list[float]] = {kind: [] for kind in steps}
    losses: dict[str, list[float]] = {kind: [] for kind in steps}
    for round_ in range(rounds + 1):  # the first one warms up
        for kind, (step, state) in steps.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            state, metrics = step(state, batch)
            jax.block_until_ready(state)
            if round_:
                times[kind].append(time.perf_counter() - start)
                cpu_times[kind].append(time.process_time() - cpu_start)
            losses[kind].append(float(metrics["loss"]))
            steps[kind] = (step, state)
    return {
        kind: {
            "tokens_per_second": BATCH * LENGTH / statistics.median(times[kind]),
            "seconds_per_step": [round(t, 3) for t in times[kind]],
            "cpu_seconds_per_step": statistics.median(cpu_times[kind]),
            "losses": losses[kind],
            "xla_temp_bytes": steps[kind][0].memory_analysis().temp_size_in_bytes,
        }
        for kind in steps
    }


def measure_memory(kind: str, config: StepConfig) -> dict[str, int]:
    """Returns how much the peak resident size of this process grows over two steps of a kind."""
    jax.block_until_ready(jnp.zeros(1))

    def peak_bytes():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = peak_bytes()
    batch = jax.device_put(make_batch(config.model.vocab_size))
    step, state = build(kind, config, batch)
    for _ in range(2):
        state, _ = step(state, batch)
    jax.block_until_ready(state)
    return {"peak_bytes": peak_bytes() - before}


def run_worker(job: str) -> dict[str, Any]:
    """Returns the result of `measure_worker`, run in a child process with the same flags."""
    command = [sys.executable, "-m", "benchmarks.train_cpu", f"--worker={job}"]
    command += [f"--{f.name}={f.value}" for f in (_ROUNDS, _DTYPE, _CHUNK)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def measure_worker(job: str) -> dict[str, Any]:
    """Measures a job in a child process.

    job: "speed:VOCABULARY" for the speed of both steps, or "real:…" or "naive:…" for the memory of
      one.
    """
    task, vocab_size = job.split(":")
    config = step_config(int(vocab_size), _DTYPE.value, _CHUNK.value)
    if task == "speed":
        return measure_speed(config, _ROUNDS.value)
    return measure_memory(task, config)


def main(_):
    """Measures both steps at all vocabularies, or in a child process the job of --worker."""
    if _WORKER.value:
        print(json.dumps(measure_worker(_WORKER.value)))
        return
    results = []
    for vocab_size in VOCABULARIES:
        measured = run_worker(f"speed:{vocab_size}")
        for kind in measured:
            measured[kind] |= run_worker(f"{kind}:{vocab_size}")
        real, naive = measured["real"], measured["naive"]
        results.append(
            {
                "vocabulary": vocab_size,
                "parameters": count_params(step_config(vocab_size, _DTYPE.value, 1).model),
                **measured,
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
