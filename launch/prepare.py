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

import filecmp
import os
import pathlib
from collections.abc import Iterable

from absl import flags

from launch import program
from qwen_jax.corpus import Document, JsonLines, PackConfig, Subset, pack, stdlib, write_jsonl
from qwen_jax.errors import UserError
from qwen_jax.tokenizer import load_tokenizer

CORPUS = flags.DEFINE_list("corpus", [], "`stdlib` and JSONL files, separated by commas.")
OUT = flags.DEFINE_string("out", None, "Folder to write.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Vocabulary file or folder; none: no packing.")
SEQ_LEN = flags.DEFINE_integer("seq_len", 2048, "Targets per window.")
HELDOUT = flags.DEFINE_float("heldout", 0.03, "Share of documents (stdlib: modules) to hold out.")
SEED = flags.DEFINE_integer("seed", 0, "Of the split and of the order of documents.")
SHARDS = flags.DEFINE_integer("shards", 1, "Files per source for training; held-out is one file.")
STDLIB_BYTES = flags.DEFINE_integer("stdlib_bytes", None, "At most about so much of stdlib.")
STDLIB_TESTS = flags.DEFINE_bool("stdlib_tests", False, "With the library's own tests.")

Sides = dict[str, Iterable[Document]]
"""{"train": documents, "heldout": documents}."""


def collect() -> dict[str, Sides]:
    """Source name -> both sides of its split."""
    sources: dict[str, Sides] = {}
    for entry in CORPUS.value:
        if entry == "stdlib":
            corpus = stdlib.load(
                heldout=HELDOUT.value,
                seed=SEED.value,
                max_bytes=STDLIB_BYTES.value,
                tests=STDLIB_TESTS.value,
            )
            found = {
                component: {
                    "train": [d for d in corpus.train if d.source == component],
                    "heldout": [d for d in corpus.heldout if d.source == component],
                }
                for component in stdlib.COMPONENTS
            }
        else:
            lines = JsonLines(entry)
            name = lines.path.name.removesuffix(".gz").removesuffix(".jsonl")
            found = {
                name: {
                    "train": Subset(lines, HELDOUT.value, SEED.value, held=False),
                    "heldout": Subset(lines, HELDOUT.value, SEED.value, held=True),
                }
            }
        for name, sides in found.items():
            if name in sources:
                raise UserError(f"--corpus has two sources named {name!r}; rename one file.")
            sources[name] = sides
    return sources


def keep(path: pathlib.Path, documents: Iterable[Document]) -> int:
    """Writes documents to `path` unless they are there; refuses to replace others."""
    new = path.with_name(path.name + ".new")
    count = write_jsonl(new, documents)
    if path.exists() and not filecmp.cmp(new, path, shallow=False):
        new.unlink()
        raise UserError(f"{path} already holds other documents; delete it or choose another --out.")
    os.replace(new, path)
    return count


def prepare_source(folder: pathlib.Path, sides: Sides, tokenizer) -> None:
    """Writes everything of one source."""
    for side, documents in sides.items():
        if side == "heldout" and HELDOUT.value == 0:
            continue
        if next(iter(documents), None) is None:
            raise UserError(
                f"The {side} side of {folder.name} has no documents; change --heldout or --seed."
            )
        if tokenizer is None:
            count = keep(folder / f"{side}.jsonl", documents)
            print(f"{folder / side}.jsonl: {count:,} documents")
            continue
        shards = SHARDS.value if side == "train" else 1
        config = PackConfig(SEQ_LEN.value, seed=SEED.value, shards=shards)
        done = pack(documents, folder / side, tokenizer, config)
        if side == "heldout":
            keep(folder / "heldout.jsonl", documents)
        print(
            f"{folder / side}: {done.windows:,} windows of {done.seq_len} from "
            f"{done.documents:,} documents, {done.tokens:,} tokens, "
            f"{done.text_bytes / (done.tokens - done.documents):.2f} bytes/token"
        )


def main() -> None:
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
    program.run(main)
