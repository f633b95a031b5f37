"""Trains a BPE vocabulary on JSONL documents and writes it in the tiktoken format.

    python -m launch.train_tokenizer --input=a.jsonl,b.jsonl --vocab_size=4096 \
        --output=runs/demo/qwen.tiktoken

4,000 merges on 10 MB of text take a few seconds on one core. --base=cl100k_base.tiktoken extends
cl100k_base, as the report does, without its tokens of several digits.
"""

import os
import time

from absl import flags

from launch import program
from qwen_jax.errors import UserError
from qwen_jax.tokenizer import Tokenizer, load_tokenizer
from qwen_jax.tokenizer.train import JsonlTexts, train_bpe, without_long_numbers

INPUT = flags.DEFINE_list("input", [], "JSONL files, separated by commas.")
FIELD = flags.DEFINE_string("field", "text", "Field of each line that contains the document.")
VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", 4_096, "Number of BPE tokens, including the 256 bytes; control tokens add 208."
)
MIN_COUNT = flags.DEFINE_integer("min_count", 2, "Minimum number of occurrences of a merge.")
BASE = flags.DEFINE_string("base", None, "Vocabulary to extend; its ranks stay in order.")
OUTPUT = flags.DEFINE_string("output", None, "File to write, for example qwen.tiktoken.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace --output if it exists.")


def main() -> None:
    """Trains and writes a vocabulary; all flags are checked before documents are read.

    Raises:
      UserError: a flag is missing or invalid, or a document cannot be read.
    """
    if not INPUT.value:
        raise UserError("--input is missing: give one or more JSONL files, separated by commas.")
    if not OUTPUT.value:
        raise UserError("--output is missing: give the file to write, such as qwen.tiktoken.")
    for path in INPUT.value:
        if not os.path.isfile(path):
            raise UserError(f"--input names {path}, which is not a file.")
    if os.path.exists(OUTPUT.value) and not OVERWRITE.value:
        raise UserError(
            f"--output={OUTPUT.value} already exists: choose another name, or replace it with "
            "--overwrite."
        )
    folder = os.path.dirname(os.path.abspath(OUTPUT.value))
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output cannot be written: {folder} is missing or not writable.")
    base = without_long_numbers(load_tokenizer(BASE.value).ranks) if BASE.value else None
    start = time.monotonic()
    texts = JsonlTexts(tuple(INPUT.value), FIELD.value)
    ranks = train_bpe(texts, VOCAB_SIZE.value, min_count=MIN_COUNT.value, base=base)
    tokenizer = Tokenizer(tuple(ranks))
    tokenizer.save(OUTPUT.value)
    print(
        f"{OUTPUT.value}: {tokenizer.n_ranks:,} ranks and {tokenizer.vocab_size:,} ids, "
        f"sha256 {tokenizer.sha256[:12]}, {time.monotonic() - start:.1f} s"
    )


if __name__ == "__main__":
    program.run(main)
