"""Decoding speed of the engine on a CPU against `transformers`' generate in the same run.

    python -m benchmarks.generate_cpu [--rounds=5] [--threads=0] [--out=FILE.json]

A Qwen2 of hidden 512, 8 layers, random weights in float32, with a vocabulary of 4,096 and of
151,936 rows; both sides load the same folder. Prompts of 128 tokens, 128 new ones, greedy, 1 and 8
requests at once. A round times each side's whole answer and an answer of one token, one after the
other; decoding speed is what lies between them, 127 steps, so that neither the prompt nor the
fixed cost of a call counts. Medians over the rounds are reported, and CPU seconds next to wall
time: where the machine is shared, those say more. Greedy ids of both sides are compared.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import tempfile
import time

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

PROMPT, NEW = 128, 128
VOCABULARIES = (4_096, 151_936)
BATCHES = (1, 8)
TARGETS = {1: 1.5, 8: 1.0}
"""Decoding speed over that of `transformers` which is wanted, by requests at once."""


def make_folder(folder: str, vocab: int) -> None:
    """A Hugging Face folder with random weights."""
    config = ModelConfig(
        family="qwen2",
        vocab_size=vocab,
        d_model=512,
        n_layers=8,
        n_heads=8,
        n_kv_heads=8,
        head_dim=64,
        d_ff=1376,  # 8/3 · 512, up to a multiple of 32
        max_length=1024,
    )
    params = jax.jit(lambda key: init_params(config, key))(jax.random.key(0))
    save_hf(folder, params, config, dtype="float32")


@dataclasses.dataclass
class Ours:
    """The engine."""

    engine: Engine
    calls: int = 0

    @classmethod
    def load(cls, folder: str, new: int) -> Ours:
        """Weights from a folder; for answers of `new` tokens."""
        config = read_config(folder)
        sizes = EngineOptions(
            rows=max(BATCHES),
            max_length=PROMPT + new,
            prefill_tokens=PROMPT * max(BATCHES),
            prefix_cache=False,
            burst=32,
        )
        options = ForwardOptions(dtype="float32")
        params = load_params(folder, config, abstract_params(config))
        return cls(Engine(params, config, options, sizes))

    def generate(self, prompts: np.ndarray, new: int) -> np.ndarray:
        """prompts int [R,T] -> new ids int [R,new]."""
        self.calls += 1
        answers: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            name = f"{self.calls}-{i}"
            params = SamplingParams(temperature=0.0, max_tokens=new)
            self.engine.add(Request(name, tuple(prompt.tolist()), params))
            answers[name] = []
        while self.engine.busy:
            for output in self.engine.step():
                answers[output.request_id].extend(output.tokens.tolist())
        return np.array(list(answers.values()))


@dataclasses.dataclass
class Theirs:
    """`transformers` on PyTorch, in the form its users call."""

    model: transformers.PreTrainedModel

    @classmethod
    def load(cls, folder: str) -> Theirs:
        """Weights from a folder."""
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        return cls(model.eval())

    def generate(self, prompts: np.ndarray, new: int) -> np.ndarray:
        """As `Ours.generate`."""
        with torch.inference_mode():
            ids = torch.tensor(prompts)
            mask = torch.ones_like(ids)
            out = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=new, do_sample=False, use_cache=True
            )
        return out[:, prompts.shape[1] :].numpy()


def measure(sides: dict, prompts: np.ndarray, new: int, rounds: int) -> dict:
    """Tokens per second of wall time and of CPU time, by side; the ids of both, compared."""
    wall = {name: [] for name in sides}
    cpu = {name: [] for name in sides}
    for side in sides.values():  # compiles
        side.generate(prompts, 1)
    answers = {name: side.generate(prompts, new) for name, side in sides.items()}
    steps = prompts.shape[0] * (new - 1)
    for _ in range(rounds):
        for name, side in sides.items():
            times = []
            for count in (1, new):
                start = time.perf_counter(), time.process_time()
                side.generate(prompts, count)
                times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
            wall[name].append(times[1][0] - times[0][0])
            cpu[name].append(times[1][1] - times[0][1])
    ours, theirs = answers.values()
    found = {
        name: {
            "tokens_per_second": steps / statistics.median(wall[name]),
            "tokens_per_cpu_second": steps / statistics.median(cpu[name]),
            "seconds": [round(t, 3) for t in wall[name]],
        }
        for name in sides
    }
    ratios = [t / o for o, t in zip(wall["qwen_jax"], wall["transformers"], strict=True)]
    return found | {
        "speed_ratio": statistics.median(ratios),
        "speed_ratios": [round(r, 2) for r in ratios],
        "cpu_ratio": statistics.median(cpu["transformers"]) / statistics.median(cpu["qwen_jax"]),
        "equal_ids": float((ours == theirs).mean()),
    }


def _define_flags() -> None:  # not on import: tests import this beside other benchmarks
    flags.DEFINE_integer("rounds", 5, "Timed rounds, both sides taking turns in each.")
    flags.DEFINE_integer("threads", 0, "Threads of PyTorch; 0: as many as there are cores.")
    flags.DEFINE_integer("new", NEW, "New tokens.")
    flags.DEFINE_multi_integer("vocab", list(VOCABULARIES), "Rows of the vocabulary.")
    flags.DEFINE_string("out", "", "Also write the JSON here.")


def main(_):
    torch.set_num_threads(flags.FLAGS.threads or len(os.sched_getaffinity(0)))
    results = []
    for vocab in flags.FLAGS.vocab:
        with tempfile.TemporaryDirectory() as folder:
            make_folder(f"{folder}/model", vocab)
            sides = {
                "qwen_jax": Ours.load(f"{folder}/model", flags.FLAGS.new),
                "transformers": Theirs.load(f"{folder}/model"),
            }
        for batch in BATCHES:
            prompts = np.random.default_rng(batch).integers(0, vocab, (batch, PROMPT))
            row = {"vocabulary": vocab, "batch": batch, "target": TARGETS[batch]}
            row |= measure(sides, prompts, flags.FLAGS.new, flags.FLAGS.rounds)
            results.append(row)
            print(
                f"V {vocab:>7,}  batch {batch}  "
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
        "prompt": PROMPT,
        "new": flags.FLAGS.new,
        "results": results,
    }
    emit(report, flags.FLAGS.out)


if __name__ == "__main__":
    _define_flags()
    app.run(main)
