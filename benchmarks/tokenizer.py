"""Speed of the tokenizer and of training one, each beside a named peer in the same run.

    python -m benchmarks.tokenizer --vocabulary=qwen.tiktoken [--megabytes=10] [--out=FILE.json]

Encoding is compared with bare tiktoken (the difference is the cost of NFC normalisation and of the
guards), training with the BpeTrainer of Hugging Face tokenizers (requirements/dev.txt) on one
thread with the same pattern. The text is the source code of Python's standard library. Seconds are
CPU seconds of this process.

Prints a line per measurement and, as its last line, one JSON object, which --out saves.
"""

from __future__ import annotations

import os
import pathlib
import sysconfig
import time
from collections.abc import Callable
from typing import Any, TypeVar

from absl import app, flags

from benchmarks.report import emit
from qwen_jax.tokenizer import IncrementalDecoder, Tokenizer, load_tokenizer
from qwen_jax.tokenizer.pretokenize import PATTERN
from qwen_jax.tokenizer.train import train_bpe

VOCABULARY = flags.DEFINE_string("vocabulary", None, "Path of qwen.tiktoken.", required=True)
MEGABYTES = flags.DEFINE_float("megabytes", 10.0, "Amount of text to use.")
RANKS = flags.DEFINE_integer("ranks", 4_256, "Vocabulary entries to train.")
OUT = flags.DEFINE_string("out", "", "Also write the JSON to this file.")

T = TypeVar("T")


def read_sources(megabytes: float) -> tuple[list[str], list[str], float]:
    """Returns (training texts, a tenth as many held-out texts, megabytes of the training texts).

    megabytes: upper bound for the training texts.
    """
    texts, held_out, size = [], [], 0
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for i, path in enumerate(sorted(root.rglob("*.py"))):
        if "site-packages" in path.parts or size >= megabytes * 1e6:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if i % 11:
            texts.append(text)
            size += len(text.encode())
        else:
            held_out.append(text)
    return texts, held_out, size / 1e6


def cpu_seconds(function: Callable[[], T]) -> tuple[float, T]:
    """Returns (CPU seconds of one call, its result)."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def train_peer(texts: list[str], vocab_size: int) -> Any:
    """Returns a Hugging Face tokenizer trained on `texts` with our pretokenization pattern."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    import tokenizers
    from tokenizers import pre_tokenizers

    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    peer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    peer.train_from_iterator(texts, trainer)
    return peer


def main(_: list[str]) -> None:
    """Measures loading, encoding, decoding, streaming and training."""
    texts, held_out, megabytes = read_sources(MEGABYTES.value)
    report: dict[str, Any] = {"benchmark": "tokenizer", "megabytes": megabytes}
    seconds, tokenizer = cpu_seconds(lambda: load_tokenizer(VOCABULARY.value))
    report["load_seconds"] = seconds
    print(f"load                   {seconds:6.2f} s")
    encode_bare = tokenizer._encoding.encode_ordinary
    seconds, ids = cpu_seconds(lambda: [tokenizer.encode(text) for text in texts])
    report["encode_mb_per_second"] = megabytes / seconds
    print(f"encode                 {megabytes / seconds:6.1f} MB/s   {megabytes:.1f} MB")
    seconds, _ = cpu_seconds(lambda: [encode_bare(text) for text in texts])
    report["encode_bare_tiktoken_mb_per_second"] = megabytes / seconds
    print(f"encode, bare tiktoken  {megabytes / seconds:6.1f} MB/s")
    seconds, _ = cpu_seconds(lambda: [tokenizer.decode(row) for row in ids])
    report["decode_mb_per_second"] = megabytes / seconds
    print(f"decode                 {megabytes / seconds:6.1f} MB/s")
    stream = IncrementalDecoder(tokenizer)
    seconds, _ = cpu_seconds(lambda: [stream.push(i) for i in ids[0]])
    report["stream_microseconds_per_token"] = 1e6 * seconds / len(ids[0])
    print(f"stream                 {1e6 * seconds / len(ids[0]):6.2f} µs per token")
    seconds, ranks = cpu_seconds(lambda: train_bpe(texts, RANKS.value))
    ours = sum(map(len, Tokenizer(tuple(ranks)).encode_batch(held_out)))
    report |= {"train_seconds": seconds, "held_out_tokens": ours}
    print(f"train {RANKS.value:,} ranks      {seconds:6.2f} s     held out: {ours:,} tokens")
    seconds, peer = cpu_seconds(lambda: train_peer(texts, RANKS.value))
    theirs = sum(len(encoding.ids) for encoding in peer.encode_batch(held_out))
    report |= {"train_hugging_face_seconds": seconds, "held_out_tokens_hugging_face": theirs}
    print(f"train, Hugging Face    {seconds:6.2f} s     held out: {theirs:,} tokens")
    emit(report, OUT.value)


if __name__ == "__main__":
    app.run(main)
