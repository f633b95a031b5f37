"""Speed of the tokenizer and of its training, each against a named peer in the same run.

    python -m benchmarks.tokenizer --vocabulary=qwen.tiktoken [--megabytes=10]

Encoding is measured against bare tiktoken (what NFC and the guards cost), training against the
BpeTrainer of Hugging Face tokenizers (requirements/dev.txt) on one thread with the same pattern.
The text is the Python standard library's own sources. Seconds are CPU seconds of this process.
"""

import os
import pathlib
import sysconfig
import time
from collections.abc import Callable

from absl import app, flags

from qwen_jax.tokenizer import IncrementalDecoder, Tokenizer, load_tokenizer
from qwen_jax.tokenizer.pretokenize import PATTERN
from qwen_jax.tokenizer.train import train_bpe

VOCABULARY = flags.DEFINE_string("vocabulary", None, "qwen.tiktoken.", required=True)
MEGABYTES = flags.DEFINE_float("megabytes", 10.0, "How much text to use.")
RANKS = flags.DEFINE_integer("ranks", 4_256, "Ranks to train.")


def read_sources(megabytes: float) -> tuple[list[str], list[str], float]:
    """Returns texts to learn from, a tenth as many held out, and the megabytes of the former."""
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


def seconds(function: Callable[[], object]) -> tuple[float, object]:
    """Returns CPU seconds and the result of one call."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def train_peer(texts: list[str], vocab_size: int):
    """Returns a Hugging Face tokenizer trained with the same pattern."""
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
    """Prints one line for each measurement."""
    texts, held_out, size = read_sources(MEGABYTES.value)
    took, tokenizer = seconds(lambda: load_tokenizer(VOCABULARY.value))
    print(f"load                   {took:6.2f} s")
    bare = tokenizer._encoding.encode_ordinary
    took, ids = seconds(lambda: [tokenizer.encode(text) for text in texts])
    print(f"encode                 {size / took:6.1f} MB/s   {size:.1f} MB")
    took, _ = seconds(lambda: [bare(text) for text in texts])
    print(f"encode, bare tiktoken  {size / took:6.1f} MB/s")
    took, _ = seconds(lambda: [tokenizer.decode(row) for row in ids])
    print(f"decode                 {size / took:6.1f} MB/s")
    stream = IncrementalDecoder(tokenizer)
    took, _ = seconds(lambda: [stream.push(i) for i in ids[0]])
    print(f"stream                 {1e6 * took / len(ids[0]):6.2f} µs a token")
    took, ranks = seconds(lambda: train_bpe(texts, RANKS.value))
    ours = sum(map(len, Tokenizer(tuple(ranks)).encode_batch(held_out)))
    print(f"train {RANKS.value:,} ranks      {took:6.2f} s     held out: {ours:,} tokens")
    took, peer = seconds(lambda: train_peer(texts, RANKS.value))
    theirs = sum(len(encoding.ids) for encoding in peer.encode_batch(held_out))
    print(f"train, Hugging Face    {took:6.2f} s     held out: {theirs:,} tokens")


if __name__ == "__main__":
    app.run(main)
