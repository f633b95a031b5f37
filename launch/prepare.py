"""Prepares training and held-out data: splits documents and packs them into shards.

    python -m launch.prepare --corpus=stdlib --out=runs/demo/data
    python -m launch.train_tokenizer --vocab_size=3840 --output=runs/demo/tokenizer.tiktoken \
        --input=runs/demo/data/code/train.jsonl,runs/demo/data/prose/train.jsonl
    python -m launch.prepare --corpus=stdlib --out=runs/demo/data --seq_len=256 \
        --tokenizer=runs/demo/tokenizer.tiktoken

`--corpus` lists JSONL files ({"id", "text"} per line, .gz allowed), each a source named after its
file, and `stdlib`, the Python standard library of this machine, which is two sources, `code` and
`prose`. Without `--tokenizer`, the split documents are written, to train a tokenizer on:

    OUT/<source>/train.jsonl, OUT/<source>/heldout.jsonl

With `--tokenizer` they are packed, and the held-out text is also kept, for evaluations that read
text:

    OUT/<source>/train/, OUT/<source>/heldout/, OUT/<source>/heldout.jsonl

Rerunning the same command resumes an interrupted run; finished parts are not repeated.
"""

import pathlib

from absl import flags

from launch import program
from qwen_jax.corpus import PackConfig
from qwen_jax.corpus.prepare import (
    Sides,
    jsonl_source,
    pack_source,
    stdlib_sources,
    write_source,
)
from qwen_jax.errors import UserError
from qwen_jax.tokenizer import Tokenizer, load_tokenizer

CORPUS = flags.DEFINE_list("corpus", [], "`stdlib` and JSONL files, separated by commas.")
OUT = flags.DEFINE_string("out", None, "Folder to write.")
TOKENIZER = flags.DEFINE_string(
    "tokenizer", None, "Vocabulary file or folder; without it, no packing."
)
SEQ_LEN = flags.DEFINE_integer("seq_len", 2048, "Targets per window.")
HELDOUT = flags.DEFINE_float("heldout", 0.03, "Share of documents (stdlib: modules) to hold out.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the split and of the order of documents.")
SHARDS = flags.DEFINE_integer(
    "shards", 1, "Number of training shards per source; held-out data is one."
)
STDLIB_BYTES = flags.DEFINE_integer(
    "stdlib_bytes", None, "Approximate limit of the stdlib corpus in bytes."
)
STDLIB_TESTS = flags.DEFINE_bool(
    "stdlib_tests", False, "Include the tests of the standard library."
)


def collect() -> dict[str, Sides]:
    """Reads the sources of --corpus; returns source name -> train and held-out documents.

    Raises:
      UserError: a file is missing, or two sources have the same name.
    """
    heldout, seed = HELDOUT.value, SEED.value
    sources: dict[str, Sides] = {}
    for entry in CORPUS.value:
        if entry == "stdlib":
            found = stdlib_sources(
                heldout=heldout,
                seed=seed,
                max_bytes=STDLIB_BYTES.value,
                tests=STDLIB_TESTS.value,
            )
        else:
            found = jsonl_source(entry, heldout=heldout, seed=seed)
        for name, sides in found.items():
            if name in sources:
                raise UserError(f"--corpus has two sources named {name!r}; rename one file.")
            sources[name] = sides
    return sources


def prepare_source(folder: pathlib.Path, sides: Sides, tokenizer: Tokenizer | None) -> None:
    """Writes one source and prints its sizes.

    Args:
      folder: folder to write.
      sides: "train" and "heldout" -> documents.
      tokenizer: tokenizer of the packed windows; None writes the documents as JSONL only.

    Raises:
      UserError: a side has no documents, or the folder contains other data.
    """
    if tokenizer is None:
        for side, count in write_source(folder, sides).items():
            print(f"{folder / side}.jsonl: {count:,} documents")
        return
    config = PackConfig(SEQ_LEN.value, seed=SEED.value, shards=SHARDS.value)
    for side, manifest in pack_source(folder, sides, tokenizer, config).items():
        # Every document adds one token without text, its end.
        bytes_per_token = manifest.text_bytes / (manifest.tokens - manifest.documents)
        print(
            f"{folder / side}: {manifest.windows:,} windows of {manifest.seq_len} from "
            f"{manifest.documents:,} documents, {manifest.tokens:,} tokens, "
            f"{bytes_per_token:.2f} bytes/token"
        )


def main() -> None:
    """Splits every source, and packs it or writes it as JSONL.

    Raises:
      UserError: a flag is missing or invalid, or as `collect` and `prepare_source`.
    """
    if not CORPUS.value:
        raise UserError("--corpus is missing: give stdlib, or JSONL files, separated by commas.")
    if not OUT.value:
        raise UserError("--out is missing: give the folder to write.")
    if not 0 <= HELDOUT.value < 1:
        raise UserError(f"--heldout is {HELDOUT.value}; it must be at least 0 and below 1.")
    PackConfig(SEQ_LEN.value, shards=SHARDS.value)  # refuses invalid numbers before files are read
    tokenizer = load_tokenizer(TOKENIZER.value) if TOKENIZER.value else None
    for name, sides in collect().items():
        prepare_source(pathlib.Path(OUT.value) / name, sides, tokenizer)


if __name__ == "__main__":
    program.run(main)
