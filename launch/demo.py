"""Demo: corpus, tokenizer, pretraining and report of a toy Qwen in minutes on a CPU (`make demo`).

    python -m launch.demo --workdir=runs/demo

Prepares the Python standard library of this interpreter as a corpus, trains a tokenizer on it,
packs it, pretrains configs/pretrain.py:demo on a mesh of 8 CPU devices, compares it on held-out
documents with gzip, xz and an n-gram model, and writes WORKDIR/report.html. The recipe can be
changed as for launch.pretrain: --config=configs/pretrain.py:toy, --config.train.steps=200.

Interrupt it at any time; rerunning the same command resumes it, without repeating finished stages.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import platform
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from launch import program
from qwen_jax.artifact import once
from qwen_jax.config import from_config_dict
from qwen_jax.corpus import JsonLines, Manifest, PackConfig
from qwen_jax.corpus.prepare import pack_source, stdlib_sources, write_source
from qwen_jax.data import data_fingerprint, epochs_at
from qwen_jax.errors import UserError
from qwen_jax.evaluate.baselines import CONTEXT_OF, Baselines, compute_baselines
from qwen_jax.generate.dense_sampler import sample
from qwen_jax.model import abstract_params, count_params
from qwen_jax.progress import format_count, format_duration
from qwen_jax.tokenizer import Tokenizer, load_tokenizer
from qwen_jax.tokenizer.tokenizer import CONTROL_TOKENS
from qwen_jax.tokenizer.train import JsonlTexts, train_bpe
from qwen_jax.train.checkpoint import restore_params
from qwen_jax.train.job import PretrainJob, run_fingerprint
from qwen_jax.train.metrics import read_metrics
from qwen_jax.train.pretrain import pretrain
from qwen_jax.train.report import Sample, TrainingReport, score_table, write_report

RECIPE = pathlib.Path(__file__).parent.parent / "configs" / "pretrain.py"
CONFIG = config_flags.DEFINE_config_file("config", f"{RECIPE}:demo", "Recipe.")
WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Folder for all results of the demo.")
STDLIB_BYTES = flags.DEFINE_integer(
    "stdlib_bytes", None, "Approximate limit of the corpus in bytes, for tests."
)

HELDOUT = flags.DEFINE_float("heldout", 0.03, "Share of the modules that are held out.")
flags.set_default(program.CPU_DEVICES, 8)
# Shares of the training tokens. Code is 73 % of the text, but prose has more bits per byte.
WEIGHTS = {"code": 0.6, "prose": 0.4}

PROMPTS = (
    'def read_lines(path, encoding="utf-8"):\n    """',
    "class Queue:\n    def __init__(self, maxsize=0):\n",
    "import os\nimport sys\n\n",
    "    for name in sorted(",
    "This module provides",
)
SAMPLE: dict[str, Any] = {"max_new_tokens": 96, "temperature": 0.8, "top_k": 40, "seed": 0}


@dataclasses.dataclass(frozen=True)
class Demo:
    """Configuration of one demo.

    Attributes:
      workdir: folder of all results.
      job: the pretraining job, with the paths of `workdir` filled in.
    """

    workdir: pathlib.Path
    job: PretrainJob

    @property
    def data(self) -> pathlib.Path:
        """Folder of the documents and packed shards of each source."""
        return self.workdir / "data"

    @property
    def results(self) -> pathlib.Path:
        """Folder of the JSON results of finished stages."""
        return self.workdir / "results"


class StageTimer:
    """Printer of the current stage and, at its end, of the time it took."""

    def __init__(self, total: int):
        """Starts before the first of `total` stages."""
        self._total, self._number = total, 0

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Context manager around the stage called `name`."""
        self._number += 1
        print(f"{self._number}/{self._total} {name} …", flush=True)
        start = time.monotonic()
        yield
        print(f"    {format_duration(time.monotonic() - start)}", flush=True)


def make_tokenizer(demo: Demo) -> Tokenizer:
    """Trains the vocabulary on the training documents, to fill the model's embedding rows.

    Raises:
      UserError: the working folder has another vocabulary.
    """
    path = pathlib.Path(demo.job.tokenizer)
    files = [demo.data / name / "train.jsonl" for name in WEIGHTS]
    ranks = demo.job.model.vocab_size - len(CONTROL_TOKENS)
    key = {"ranks": ranks, "texts": [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]}

    def train() -> str:
        """Trains and saves the vocabulary; returns its SHA-256."""
        tokenizer = Tokenizer(tuple(train_bpe(JsonlTexts(tuple(map(str, files))), ranks)))
        if path.exists() and load_tokenizer(path).sha256 != tokenizer.sha256:
            raise UserError(
                f"{path} is the vocabulary of another recipe or corpus; choose another --workdir"
            )
        tokenizer.save(path)
        return tokenizer.sha256

    trained = once(demo.results / "tokenizer.json", key, train)
    tokenizer = load_tokenizer(path)
    if tokenizer.sha256 != trained:
        raise UserError(
            f"{path} has been changed since it was trained; delete it and {demo.results}"
        )
    return tokenizer


def pretrain_demo(
    demo: Demo, tokenizer: Tokenizer, packed: dict[str, dict[str, Manifest]]
) -> dict[str, dict[str, float]]:
    """Pretrains the model, resuming from its newest checkpoint.

    Args:
      demo: the job.
      tokenizer: its tokenizer.
      packed: source -> "train" and "heldout" -> manifest of the packed folder.

    Returns:
      Source -> fields of `HeldOut` of the trained model.

    Raises:
      TrainingStopped: training was asked to stop before its last step.
    """
    job = demo.job
    key = {
        "run": run_fingerprint(job, tokenizer, data_fingerprint(job.data)),
        "heldout": {name: sides["heldout"].content() for name, sides in packed.items()},
        "steps": job.train.steps,
        "microbatches": job.train.microbatches,
        "mesh": dataclasses.asdict(job.mesh),
        "options": dataclasses.asdict(job.options),
    }

    def train() -> dict:
        """Runs the training; returns source -> fields of `HeldOut`."""
        outcome = pretrain(job, str(demo.workdir))
        if not outcome.finished:
            raise TrainingStopped(outcome.step)
        return {name: dataclasses.asdict(found) for name, found in outcome.evaluations.items()}

    return once(demo.results / "held_out.json", key, train)


class TrainingStopped(Exception):
    """Error of training that was asked to stop after saving; the argument is its step."""


def compute_source_baselines(
    demo: Demo, packed: dict[str, dict[str, Manifest]]
) -> dict[str, Baselines]:
    """Computes bits per byte of each source's held-out text under gzip, xz and an n-gram model.

    Args:
      demo: where the documents are.
      packed: source -> "train" and "heldout" -> manifest of the packed folder.
    """
    found = {}
    for name, sides in packed.items():
        # The manifests of the packed folders have a digest of the documents.
        key = {side: manifest.documents_digest for side, manifest in sides.items()}
        texts = [JsonLines(demo.data / name / f"{side}.jsonl") for side in ("train", "heldout")]

        def compute(texts=texts) -> dict:
            """Returns the fields of `Baselines` for (train, held-out) documents."""
            return dataclasses.asdict(compute_baselines(*map(list, texts)))

        found[name] = Baselines(**once(demo.results / f"baselines-{name}.json", key, compute))
    return found


def generate_samples(demo: Demo, tokenizer: Tokenizer, result: dict) -> list[Sample]:
    """Generates continuations of `PROMPTS` by the last checkpoint, greedily and by sampling.

    Args:
      demo: the job.
      tokenizer: its tokenizer.
      result: what `pretrain_demo` returned, which identifies the model in the saved result.
    """
    model = demo.job.model
    key = {"model": result, "tokenizer": tokenizer.sha256, "prompts": PROMPTS, "options": SAMPLE}
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]

    def compute() -> list[dict]:
        """Returns the fields of one `Sample` per prompt."""
        params = restore_params(str(demo.workdir / "checkpoints"), abstract_params(model))
        methods = {
            "greedy": SAMPLE | {"temperature": 0.0},
            f"sampled at temperature {SAMPLE['temperature']}, top-k {SAMPLE['top_k']}": SAMPLE,
        }
        sampled = {
            name: sample(
                params,
                prompts,
                model,
                demo.job.options,
                **options,
                stop_id=tokenizer.eod_id,
                vocab_size=tokenizer.vocab_size,
            )
            for name, options in methods.items()
        }
        return [
            {
                "prompt": prompt,
                "continuations": {
                    name: tokenizer.decode(rows[i]) for name, rows in sampled.items()
                },
            }
            for i, prompt in enumerate(PROMPTS)
        ]

    return [Sample(**entry) for entry in once(demo.results / "samples.json", key, compute)]


def make_report(
    demo: Demo, result: dict, baseline_scores: dict[str, Baselines], generated: list[Sample]
) -> TrainingReport:
    """Returns the content of the report page.

    Args:
      demo: the job and the folder of its metrics.
      result: source -> fields of `HeldOut` of the trained model.
      baseline_scores: source -> bits per byte of the baselines.
      generated: continuations by the model.
    """
    job = demo.job
    model = f"Qwen, {format_count(count_params(job.model))} parameters"
    scores = {model: {name: found["bits_per_byte"] for name, found in result.items()}}
    notes = {
        model: "the probability of every token but a document's first, including its end (which "
        f"has bits but no bytes), given at most {job.data.seq_len} tokens of the same document; "
        "trained on part of the training text"
    }
    for field, (baseline, note) in CONTEXT_OF.items():
        scores[baseline] = {name: getattr(found, field) for name, found in baseline_scores.items()}
        notes[baseline] = note
    metrics = read_metrics(demo.workdir / "metrics.jsonl")
    rates = [row["tokens_per_second"] for row in metrics if "tokens_per_second" in row]
    tokens = job.train.steps * job.data.global_batch * job.data.seq_len
    epochs = epochs_at(job.data, job.train.steps).values()
    mesh = {axis: size for axis, size in dataclasses.asdict(job.mesh).items() if size != 1}
    facts = {
        "parameters": format_count(count_params(job.model)),
        "layers × channels": f"{job.model.n_layers} × {job.model.d_model}",
        "vocabulary": f"{job.model.vocab_size:,}",
        "training tokens": format_count(tokens),
        "passes over " + " and ".join(WEIGHTS): " and ".join(f"{e:.2f}" for e in epochs),
        "steps": f"{job.train.steps:,}",
        "tokens per second": f"{statistics.median(rates):,.0f}" if rates else "–",
        "CPU devices": " × ".join(f"{size} {axis}" for axis, size in mesh.items()),
    }
    return TrainingReport(
        title="A toy Qwen, from the standard library to a report",
        summary=f"Corpus: the standard library of Python {platform.python_version()}, its sources "
        "(code) and its docstrings, comments and reference pages (prose). Tokenizer, data, "
        f"pretraining and sampling by qwen_jax on JAX {jax.__version__}.",
        facts=facts,
        scores=scores,
        notes=notes,
        metrics=metrics,
        samples=generated,
        config=json.dumps(dataclasses.asdict(job), indent=2),
    )


def make_demo() -> Demo:
    """Builds the demo from the recipe of --config, with all paths inside --workdir.

    Raises:
      UserError: `--workdir` is empty, or the recipe is invalid.
    """
    if not WORKDIR.value:
        raise UserError("--workdir is empty: give a folder for all results of the demo")
    workdir = pathlib.Path(WORKDIR.value)
    job = from_config_dict(PretrainJob, CONFIG.value)
    folders = {name: workdir / "data" / name for name in WEIGHTS}
    sources = ",".join(f"{folders[name]}/train={share}" for name, share in WEIGHTS.items())
    job = dataclasses.replace(
        job,
        tokenizer=str(workdir / "tokenizer.tiktoken"),
        data=dataclasses.replace(job.data, sources=sources),
        eval=",".join(f"{name}={folder}/heldout" for name, folder in folders.items()),
    )
    return Demo(workdir, job)


def main() -> None:
    """Runs all stages in order; each leaves a complete result on disk, or none."""
    demo, stage = make_demo(), StageTimer(7)
    with stage(f"documents: the standard library of Python {platform.python_version()}"):
        sources = stdlib_sources(heldout=HELDOUT.value, seed=0, max_bytes=STDLIB_BYTES.value)
        for name, sides in sources.items():
            counts = write_source(demo.data / name, sides)
            print(f"    {name}: " + ", ".join(f"{n:,} {side}" for side, n in counts.items()))
    with stage("tokenizer"):
        tokenizer = make_tokenizer(demo)
        print(f"    {tokenizer.n_ranks:,} ranks and {len(CONTROL_TOKENS)} control tokens")
    with stage("pack"):
        pack_config = PackConfig(demo.job.data.seq_len)
        packed = {
            name: pack_source(demo.data / name, sides, tokenizer, pack_config)
            for name, sides in sources.items()
        }
        for name, manifests in packed.items():
            tokens = ", ".join(f"{m.tokens:,} tokens {side}" for side, m in manifests.items())
            print(f"    {name}: {tokens}")
    with stage("baselines: gzip, xz and an n-gram model of the same text"):
        baseline_scores = compute_source_baselines(demo, packed)
    with stage(f"pretrain: {format_count(count_params(demo.job.model))} parameters"):
        try:
            result = pretrain_demo(demo, tokenizer, packed)
        except TrainingStopped as stopped:
            print(f"stopped at step {stopped}; run the same command to resume")
            return
    with stage("samples"):
        generated = generate_samples(demo, tokenizer, result)
    with stage("report"):
        report = make_report(demo, result, baseline_scores, generated)
        write_report(demo.workdir / "report.html", report)
    print(f"\n{score_table(report.scores)}\n\n* lowest   report: {demo.workdir / 'report.html'}")


if __name__ == "__main__":
    program.run(main, recipe=PretrainJob)
