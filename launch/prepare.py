"""Makes packed training and held-out data from documents.

    python -m launch.prepare --corpus=stdlib --out=runs/demo/data
    python -m launch.train_tokenizer --vocab_size=3840 --output=runs/demo/tokenizer.tiktoken \
        --input=runs/demo/data/code/train.jsonl,runs/demo/data/prose/train.jsonl
    python -m launch.prepare --corpus=stdlib --out=runs/demo/data --seq_len=256 \
        --tokenizer=runs/demo/tokenizer.tiktoken

`--corpus` is a list of JSONL files ({"id", "text"} per line, .gz allowed), each a source named
after its file, and `stdlib`, the Python standard library of this machine, which is two sources,
`code` and `prose`. Without `--tokenizer`, the split documents are written for training one:

    OUT/<source>/train.jsonl, OUT/<source>/heldout.jsonl

With it, they are packed, and the text of the held-out side is kept beside for other measures:

    OUT/<source>/train/, OUT/<source>/heldout/, OUT/<source>/heldout.jsonl

Can be killed and started again: it goes on where it was, and does nothing that is done.
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
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Vocabulary file or folder; none: no packing.")
SEQ_LEN = flags.DEFINE_integer("seq_len", 2048, "Targets per window.")
HELDOUT = flags.DEFINE_float("heldout", 0.03, "Share of documents (stdlib: modules) to hold out.")
SEED = flags.DEFINE_integer("seed", 0, "Of the split and of the order of documents.")
SHARDS = flags.DEFINE_integer("shards", 1, "Files per source for training; held-out is one file.")
STDLIB_BYTES = flags.DEFINE_integer("stdlib_bytes", None, "At most about so much of stdlib.")
STDLIB_TESTS = flags.DEFINE_bool("stdlib_tests", False, "With the library's own tests.")


def collect() -> dict[str, Sides]:
    """Source name -> both sides of its split."""
    split = {"heldout": HELDOUT.value, "seed": SEED.value}
    sources: dict[str, Sides] = {}
    for entry in CORPUS.value:
        if entry == "stdlib":
            size = {"max_bytes": STDLIB_BYTES.value, "tests": STDLIB_TESTS.value}
            found = stdlib_sources(**split, **size)
        else:
            found = jsonl_source(entry, **split)
        for name, sides in found.items():
            if name in sources:
                raise UserError(f"--corpus has two sources named {name!r}; rename one file.")
            sources[name] = sides
    return sources


def prepare_source(folder: pathlib.Path, sides: Sides, tokenizer: Tokenizer | None) -> None:
    """Writes everything of one source, and says what there is."""
    if tokenizer is None:
        for side, count in write_source(folder, sides).items():
            print(f"{folder / side}.jsonl: {count:,} documents")
        return
    config = PackConfig(SEQ_LEN.value, seed=SEED.value, shards=SHARDS.value)
    for side, done in pack_source(folder, sides, tokenizer, config).items():
        print(
            f"{folder / side}: {done.windows:,} windows of {done.seq_len} from "
            f"{done.documents:,} documents, {done.tokens:,} tokens, "
            f"{done.text_bytes / (done.tokens - done.documents):.2f} bytes/token"
        )


def run() -> None:
    """Collects, splits, and writes or packs every source."""
    if not CORPUS.value:
        raise UserError("--corpus is missing: give stdlib, or JSONL files, separated by commas.")
    if not OUT.value:
        raise UserError("--out is missing: give the folder to write.")
    if not 0 <= HELDOUT.value < 1:
        raise UserError(f"--heldout is {HELDOUT.value}; it must be a share in [0, 1).")
    PackConfig(SEQ_LEN.value, shards=SHARDS.value)  # Refuses bad numbers before any reading.
    tokenizer = load_tokenizer(TOKENIZER.value) if TOKENIZER.value else None
    for name, sides in collect().items():
        prepare_source(pathlib.Path(OUT.value) / name, sides, tokenizer)


if __name__ == "__main__":
    program.run(run)
