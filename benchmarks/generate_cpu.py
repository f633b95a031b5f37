"""Decoding speed of the engine on a CPU, beside `transformers`' `generate` in the same run.

    python -m benchmarks.generate_cpu [--rounds=5] [--threads=0] [--out=FILE.json]

The model is a Qwen2 of hidden size 512 with 8 layers and random float32 weights, with a vocabulary
of 4,096 and of 151,936 rows; both sides load the same folder. Prompts have 128 tokens, outputs 128
tokens, sampling is greedy, with 1 and 8 requests at a time. A round times, for each side in turn,
an output of 128 tokens and one of 1 token; decoding speed is computed from the difference, 127
steps, so that neither prefill nor the fixed cost of a call counts. Reports medians over the rounds,
and CPU time beside wall time: on a shared machine the former says more. The greedy ids of both
sides are compared.

Prints a line per case and, as its last line, one JSON object, which --out saves.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import tempfile
import time
from typing import Any, Protocol

import jax
import numpy as np
import torch
import transformers
from absl import app, flags

from benchmarks.report import emit
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.options import EngineOptions
from qwen_jax.engine.request import Request, SamplingParams
from qwen_jax.interop import load_params, read_config, save_hf
from qwen_jax.model import ForwardOptions, ModelConfig, abstract_params, init_params

PROMPT_TOKENS, NEW_TOKENS = 128, 128
VOCABULARIES = (4_096, 151_936)
BATCHES = (1, 8)
TARGETS = {1: 1.5, 8: 1.0}
"""Wanted ratio of our decoding speed to that of `transformers`, by requests at a time."""


def make_model_folder(folder: str, vocab_size: int) -> None:
    """Writes a Hugging Face folder with a small Qwen2 of random weights."""
    config = ModelConfig(
        family="qwen2",
        vocab_size=vocab_size,
        d_model=512,
        n_layers=8,
        n_heads=8,
        n_kv_heads=8,
        head_dim=64,
        d_ff=1376,  # 8/3 · 512, rounded up to a multiple of 32
        max_length=1024,
    )
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(0))
    save_hf(folder, params, config, dtype="float32")


class Generator(Protocol):
    """One side of the comparison."""

    def generate(self, prompts: np.ndarray, new_tokens: int) -> np.ndarray:
        """Returns greedy continuations, int [requests, new_tokens], of prompts [requests, T]."""


@dataclasses.dataclass
class EngineGenerator:
    """Our engine behind `Generator`.

    Attributes:
      engine: the engine.
      calls: number of calls of `generate`, which makes request ids unique.
    """

    engine: Engine
    calls: int = 0

    @classmethod
    def load(cls, folder: str, new_tokens: int) -> EngineGenerator:
        """Loads the weights of a folder into an engine for outputs of `new_tokens`."""
        config = read_config(folder)
        engine_options = EngineOptions(
            max_running_requests=max(BATCHES),
            max_length=PROMPT_TOKENS + new_tokens,
            prefill_tokens=PROMPT_TOKENS * max(BATCHES),
            prefix_cache=False,
            decode_steps_per_call=32,
        )
        options = ForwardOptions(dtype="float32")
        params = load_params(folder, config, abstract_params(config))
        return cls(Engine(params, config, options, engine_options))

    def generate(self, prompts: np.ndarray, new_tokens: int) -> np.ndarray:
        """Returns greedy continuations, int [requests, new_tokens], of prompts [requests, T]."""
        self.calls += 1
        outputs: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            request_id = f"{self.calls}-{i}"
            params = SamplingParams(temperature=0.0, max_tokens=new_tokens)
            self.engine.add(Request(request_id, tuple(prompt.tolist()), params))
            outputs[request_id] = []
        while self.engine.busy:
            for output in self.engine.step():
                outputs[output.request_id].extend(output.tokens.tolist())
        return np.array(list(outputs.values()))


@dataclasses.dataclass
class TransformersGenerator:
    """`transformers` on PyTorch behind `Generator`, called as its users call it."""

    model: transformers.PreTrainedModel

    @classmethod
    def load(cls, folder: str) -> TransformersGenerator:
        """Loads a Hugging Face folder in float32, without an end-of-sequence token."""
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return cls(model.eval())

    def generate(self, prompts: np.ndarray, new_tokens: int) -> np.ndarray:
        """Returns greedy continuations, int [requests, new_tokens], of prompts [requests, T]."""
        with torch.inference_mode():
            ids = torch.tensor(prompts)
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
            )
        return out[:, prompts.shape[1] :].numpy()


def measure(
    sides: dict[str, Generator], prompts: np.ndarray, new_tokens: int, rounds: int
) -> dict[str, Any]:
    """Measures the decoding speed of both sides and compares their ids.

    Args:
      sides: "qwen_jax" and "transformers", in this order.
      prompts: int [requests, T].
      new_tokens: tokens of the long output.
      rounds: timed rounds.

    Returns:
      for each side its tokens per second and per CPU second; "speed_ratio" and "cpu_ratio" of ours
      to theirs, and "equal_ids", the share of equal output tokens.
    """
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():  # compiles
        side.generate(prompts, 1)
    outputs = {name: side.generate(prompts, new_tokens) for name, side in sides.items()}
    steps = prompts.shape[0] * (new_tokens - 1)
    for _ in range(rounds):
        for name, side in sides.items():
            times = []
            for count in (1, new_tokens):
                start = time.perf_counter(), time.process_time()
                side.generate(prompts, count)
                times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
            wall[name].append(times[1][0] - times[0][0])
            cpu[name].append(times[1][1] - times[0][1])
    ours, theirs = outputs.values()
    speeds = {
        name: {
            "tokens_per_second": steps / statistics.median(wall[name]),
            "tokens_per_cpu_second": steps / statistics.median(cpu[name]),
            "seconds": [round(t, 3) for t in wall[name]],
        }
        for name in sides
    }
    ratios = [t / o for o, t in zip(wall["qwen_jax"], wall["transformers"], strict=True)]
    return speeds | {
        "speed_ratio": statistics.median(ratios),
        "speed_ratios": [round(r, 2) for r in ratios],
        "cpu_ratio": statistics.median(cpu["transformers"]) / statistics.median(cpu["qwen_jax"]),
        "equal_ids": float((ours == theirs).mean()),
    }


def _define_flags() -> None:
    """Defines the flags; not at import, because tests import several benchmarks together."""
    flags.DEFINE_integer("rounds", 5, "Timed rounds; in each, both sides take turns.")
    flags.DEFINE_integer("threads", 0, "Threads of PyTorch; 0: one per core.")
    flags.DEFINE_integer("new", NEW_TOKENS, "Output tokens.")
    flags.DEFINE_multi_integer("vocab", list(VOCABULARIES), "Vocabulary sizes.")
    flags.DEFINE_string("out", "", "Also write the JSON to this file.")


def main(_):
    """Measures all vocabularies and batch sizes."""
    torch.set_num_threads(flags.FLAGS.threads or len(os.sched_getaffinity(0)))
    results = []
    for vocab_size in flags.FLAGS.vocab:
        with tempfile.TemporaryDirectory() as folder:
            make_model_folder(f"{folder}/model", vocab_size)
            sides: dict[str, Generator] = {
                "qwen_jax": EngineGenerator.load(f"{folder}/model", flags.FLAGS.new),
                "transformers": TransformersGenerator.load(f"{folder}/model"),
            }
        for batch in BATCHES:
            rng = np.random.default_rng(batch)
            prompts = rng.integers(0, vocab_size, (batch, PROMPT_TOKENS))
            row = {"vocabulary": vocab_size, "batch": batch, "target": TARGETS[batch]}
            row |= measure(sides, prompts, flags.FLAGS.new, flags.FLAGS.rounds)
            results.append(row)
            print(
                f"V {vocab_size:>7,}  batch {batch}  "
                + "  ".join(f"{n} {row[n]['tokens_per_second']:7.1f} tokens/s" for n in sides)
                + f"  ratio {row['speed_ratio']:.2f} (wanted {row['target']})"
                + f"  by CPU time {row['cpu_ratio']:.2f}  equal ids {row['equal_ids']:.3f}",
                flush=True,
            )
    report = {
        "benchmark": "generate_cpu",
        "date": time.strftime("%Y-%m-%d"),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "prompt": PROMPT_TOKENS,
        "new": flags.FLAGS.new,
        "results": results,
    }
    emit(report, flags.FLAGS.out)


if __name__ == "__main__":
    _define_flags()
    app.run(main)
