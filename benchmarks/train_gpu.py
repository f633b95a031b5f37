"""Training speed of Qwen on one GPU, beside a PyTorch step of the same network in the same run.

    python -m benchmarks.train_gpu [--quick] [--seconds=200] [--out=FILE.json]

Two networks: all of Qwen-1.8B, and a part of Qwen-7B (its widths with fewer layers, so that float32
master weights and moments fit), at 2,048 tokens per row. The peer is `transformers`'
`Qwen2ForCausalLM` of the same shape (biases on q, k, v; multi-head attention; untied), with scaled
dot-product attention, `torch.compile`, bf16 autocast over float32 weights and fused AdamW: the same
precision and optimizer state. Its attention is declared causal; by default the library passes a
mask under `torch.compile`, which keeps PyTorch from its flash kernels. Neither side recomputes
anything (`--remat=none`), since 141 GB hold it all. Each side runs in a process of its own with the
whole memory. Reports the median step, and the losses for comparison (both start near ln V, V
vocabulary size). MFU is analytic (`train.flops`, causal attention counted by half) over the data
sheet's dense bf16 peak.

Prints a table and, as its last line, one JSON object, which --out saves with every row.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import app, flags

from benchmarks.report import emit, save
from benchmarks.torch_attention import register_causal_sdpa

if TYPE_CHECKING:  # imported in the child processes only
    from qwen_jax.model import ModelConfig

NETWORKS = {
    "qwen-1.8b": ("qwen-1.8b", None, 8),
    "qwen-7b/8": ("qwen-7b", 8, 8),
    "toy": ("toy", None, 2),
}
"""By name: (preset, number of layers or None for all, rows per step on one 141 GB GPU)."""

_NETWORKS = flags.DEFINE_list(
    "networks", ["qwen-1.8b", "qwen-7b/8"], f"Networks to train, of {', '.join(NETWORKS)}."
)
_BATCH = flags.DEFINE_integer("batch", 0, "Rows per step; 0: the network's own number.")
_LENGTH = flags.DEFINE_integer("length", 2048, "Tokens per row.")
_STEPS = flags.DEFINE_integer("steps", 10, "Timed steps, after three to warm up.")
_REMAT = flags.DEFINE_string("remat", "none", "Remat policy of our side.")
_SECONDS = flags.DEFINE_float(
    "seconds", 3600, "Time limit of the whole run; a side that exceeds it is reported as failed."
)
_ATTENTION = flags.DEFINE_string("attention", "auto", "Attention implementation of our side.")
_QUICK = flags.DEFINE_bool("quick", False, "Train only Qwen-1.8B, with five timed steps.")
_COMPILE = flags.DEFINE_bool("torch_compile", True, "Compile the PyTorch step.")
_OUT = flags.DEFINE_string("out", "", "Also write the JSON to this file.")
_WORKER = flags.DEFINE_string("worker", "", "Internal: what a child process measures.")


def model_config(name: str) -> tuple[ModelConfig, int]:
    """Returns (model configuration, rows per step) of a network of `NETWORKS`."""
    from qwen_jax.model.presets import preset

    preset_name, layers, rows = NETWORKS[name]
    model = preset("qwen-1.8b" if preset_name == "toy" else preset_name)
    model = dataclasses.replace(model, n_layers=layers or model.n_layers)
    if preset_name == "toy":
        model = dataclasses.replace(
            model,
            vocab_size=512,
            d_model=64,
            n_layers=2,
            n_heads=2,
            n_kv_heads=2,
            head_dim=32,
            d_ff=96,
        )
    return model, _BATCH.value or rows


def make_batch(vocab_size: int, rows: int) -> dict[str, Any]:
    """Returns a batch of random tokens, [rows, --length], one segment per row, all with loss."""
    rng = np.random.default_rng(0)
    shape = (rows, _LENGTH.value)
    tokens = rng.integers(0, vocab_size, (rows, _LENGTH.value + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": None,
        "positions": np.broadcast_to(np.arange(_LENGTH.value, dtype=np.int32), shape).copy(),
        "loss_mask": np.ones(shape, np.float32),
        "n_bytes": np.full(rows, 4.0 * _LENGTH.value, np.float32),
    }


def time_steps(
    start_step: Callable[[], None], wait: Callable[[], float], steps: int
) -> dict[str, float]:
    """Times train steps after three to warm up.

    Args:
      start_step: starts a step.
      wait: waits for its end and returns its loss.
      steps: number of timed steps.

    Returns:
      median "seconds_per_step", "fastest" and the last "loss".
    """
    for _ in range(3):
        start_step()
        wait()
    times, loss = [], 0.0
    for _ in range(steps):
        start = time.perf_counter()
        start_step()
        loss = wait()
        times.append(time.perf_counter() - start)
    return {"seconds_per_step": statistics.median(times), "fastest": min(times), "loss": loss}


def measure_ours(name: str) -> dict[str, Any]:
    """Trains a network of `NETWORKS` with our step; returns times, memory and FLOPs."""
    import jax

    from qwen_jax.model import ForwardOptions, count_params
    from qwen_jax.train.compiling import xla_options
    from qwen_jax.train.config import LossConfig, StepConfig
    from qwen_jax.train.flops import peak_flops, train_flops_per_token
    from qwen_jax.train.objective import NextToken
    from qwen_jax.train.optimizer import OptimizerConfig
    from qwen_jax.train.state import init_state
    from qwen_jax.train.step import train_step

    model, rows = model_config(name)
    config = StepConfig(
        model,
        ForwardOptions("bfloat16", _REMAT.value, _ATTENTION.value),
        OptimizerConfig(peak_lr=1e-4, warmup_steps=10, decay_steps=1000),
        LossConfig(chunk=2048),
    )
    data = jax.device_put(make_batch(model.vocab_size, rows))
    current: dict[str, Any] = {
        "state": jax.jit(functools.partial(init_state, config))(jax.random.key(0))
    }
    step = functools.partial(train_step, config=config, objective=NextToken())
    start = time.perf_counter()
    compiled = (
        jax.jit(step, donate_argnums=0)
        .lower(current["state"], data)
        .compile(compiler_options=xla_options(jax.devices()[0].device_kind))
    )
    compile_seconds = time.perf_counter() - start

    def start_step():
        current["state"], current["metrics"] = compiled(current["state"], data)

    def wait():
        jax.block_until_ready(current["state"])
        return float(current["metrics"]["loss"])

    result = time_steps(start_step, wait, _STEPS.value)
    memory = jax.devices()[0].memory_stats() or {}
    return result | {
        "parameters": count_params(model),
        "tokens_per_step": rows * _LENGTH.value,
        "flops_per_token": train_flops_per_token(model, _LENGTH.value),
        "peak_flops": peak_flops(jax.devices()[0]),
        "compile_seconds": compile_seconds,
        "peak_bytes": memory.get("peak_bytes_in_use"),
        "device": jax.devices()[0].device_kind,
    }


def measure_peer(name: str) -> dict[str, Any]:
    """Trains the same network in PyTorch; returns times and memory, or {"not_run": reason}."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            return {"not_run": f"{package} is not installed"}
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    register_causal_sdpa()
    model, rows = model_config(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    shape = Qwen2Config(
        vocab_size=model.vocab_size,
        hidden_size=model.d_model,
        intermediate_size=model.d_ff,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.n_kv_heads,
        max_position_embeddings=_LENGTH.value,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="causal_sdpa",
    )
    with torch.device(device):
        net = Qwen2ForCausalLM(shape).float()
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=device == "cuda"
    )
    data = make_batch(model.vocab_size, rows)
    tokens = torch.as_tensor(data["tokens"], device=device).long()
    current = {}

    def loss_of(tokens):
        with torch.autocast(device, torch.bfloat16):
            return net(input_ids=tokens, labels=tokens).loss

    loss_of = torch.compile(loss_of) if _COMPILE.value else loss_of

    def start_step():
        optimizer.zero_grad(set_to_none=True)
        current["loss"] = loss_of(tokens)
        current["loss"].backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()
        return current["loss"].item()

    result: dict[str, Any] = time_steps(start_step, wait, _STEPS.value)
    if device == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    return result | {
        "parameters": sum(p.numel() for p in net.parameters()),
        "tokens_per_step": rows * _LENGTH.value,
    }


def measure_in_child(job: str, deadline: float) -> dict[str, Any]:
    """Returns a measurement from a child process, or {"failed": reason}.

    Args:
      job: "ours:NETWORK" or "torch:NETWORK".
      deadline: value of `time.monotonic` at which the child is stopped.
    """
    command = [sys.executable, "-m", "benchmarks.train_gpu", f"--worker={job}"]
    passed = (_BATCH, _LENGTH, _STEPS, _REMAT, _ATTENTION, _COMPILE)
    command += [f"--{f.name}={f.value}" for f in passed]
    left = deadline - time.monotonic()
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=max(left, 1))
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in the {left:.0f} s that were left"}
    if run.returncode:
        lines = [line for line in run.stderr.strip().splitlines() if line.strip()]
        return {"failed": lines[-1] if lines else f"exit status {run.returncode}"}
    return json.loads(run.stdout.strip().splitlines()[-1])


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the installed packages that matter, by name."""
    found = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "torch", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def add_rates(result: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Returns a measurement with "tokens_per_second" and "mfu" added, if it has a step time.

    Args:
      result: of either side.
      reference: result of our side, whose analytic FLOPs and peak are used for both.
    """
    if "seconds_per_step" not in result:
        return result
    speed = result["tokens_per_step"] / result["seconds_per_step"]
    mfu = None
    if "flops_per_token" in reference:
        mfu = speed * reference["flops_per_token"] / reference["peak_flops"]
    return result | {"tokens_per_second": speed, "mfu": mfu}


def format_row(name: str, side: str, result: dict[str, Any]) -> str:
    """Returns the table line of one side of a network."""
    if "tokens_per_second" not in result:
        return f"{name:<20}{side:<8}{result.get('not_run') or result.get('failed')}"
    mfu = "" if result["mfu"] is None else f"{result['mfu']:>8.3f}"
    peak_bytes = result.get("peak_bytes")
    peak = "" if not peak_bytes else f"{peak_bytes / 2**30:>10.1f}"
    milliseconds = 1e3 * result["seconds_per_step"]
    return (
        f"{name:<20}{side:<8}{result['tokens_per_second']:>12,.0f}{mfu:>8}{milliseconds:>11.1f}"
        f"{result['loss']:>9.3f}{peak:>10}"
    )


def main(_):
    """Trains all networks on both sides, or in a child process measures the job of --worker."""
    if _WORKER.value:
        side, name = _WORKER.value.split(":", 1)
        print(json.dumps({"ours": measure_ours, "torch": measure_peer}[side](name)))
        return
    unknown = [name for name in _NETWORKS.value if name not in NETWORKS]
    if unknown:
        raise app.UsageError(f"--networks: {unknown[0]!r} is none of {', '.join(NETWORKS)}")
    if _QUICK.value:
        flags.FLAGS.networks, flags.FLAGS.steps = ["qwen-1.8b"], 5
    print(
        f"{'network':<20}{'side':<8}{'tokens/s':>12}{'MFU':>8}{'ms/step':>11}{'loss':>9}{'GiB':>10}"
    )
    deadline = time.monotonic() + _SECONDS.value
    report: dict[str, Any] = {
        "benchmark": "train_gpu",
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "device": None,
        "sequence": _LENGTH.value,
        "remat": _REMAT.value,
        "attention": _ATTENTION.value,
        "results": [],
        "complete": False,
    }
    for name in _NETWORKS.value:
        row: dict[str, Any] = {"network": name, "ours": {}, "torch": {}, "speed_ratio": None}
        report["results"].append(row)
        for side in ("ours", "torch"):
            result = measure_in_child(f"{side}:{name}", deadline)
            row[side] = add_rates(result, result if side == "ours" else row["ours"])
            report["device"] = report["device"] or result.get("device")
            print(format_row(name, side, row[side]), flush=True)
            save(report, _OUT.value)
        speeds = [row[side].get("tokens_per_second") for side in ("ours", "torch")]
        if all(speeds):
            row["speed_ratio"] = speeds[0] / speeds[1]
            print(f"{name:<20}ratio   {row['speed_ratio']:>12.2f}")
    emit(report | {"complete": True}, _OUT.value)


if __name__ == "__main__":
    app.run(main)
