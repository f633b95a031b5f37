"""Baselines for language models: bits per byte under gzip, xz and a byte n-gram model.

Bits per byte do not depend on a tokenizer. A model's figure counts the bits of its trained targets
over their bytes (`n_bytes` of a batch): it includes each document's end token, which no baseline
predicts, and excludes each document's first token, which has no context.

Measure one mixture component at a time: where components repeat each other (the docstrings of the
standard library are in its sources too), compressors of the joined text benefit from the
repetition.
"""

from __future__ import annotations

import dataclasses
import gzip
import lzma
from collections.abc import Sequence

from absl import logging

from qwen_jax.corpus.documents import Document
from qwen_jax.errors import UserError
from qwen_jax.evaluate.ngram import MAX_ORDER, train_ngram

CONTEXT_OF = {
    "gzip": ("gzip -9", "the held-out text alone, and of that the last 32 kB"),
    "xz": ("xz -9e", "the held-out text alone, all that came before"),
    "xz_primed": (
        "xz -9e, primed",
        "up to 4 MB of the training text first, then the held-out text; only the growth counts",
    ),
    "ngram": (
        f"byte {MAX_ORDER}-gram",
        "all of the training text, counted (modified Kneser-Ney); of the held-out text the "
        f"{MAX_ORDER - 1} bytes before",
    ),
}
"""For each figure of `Baselines`: its name, and what it has to go by."""


@dataclasses.dataclass(frozen=True)
class Baselines:
    """Bits per byte of the same held-out text under each baseline.

    The compressors read the documents joined in order.

    Attributes:
      train_bytes: UTF-8 bytes of the training text.
      heldout_bytes: UTF-8 bytes of the held-out text.
      gzip: bits per byte of `gzip -9`, without training text.
      xz: bits per byte of `xz -9e`, without training text.
      xz_primed: bits per byte by which an xz -9e file of training text grows when the held-out text
        is
        appended.
      primed_bytes: bytes of training text in `xz_primed`.
      ngram: bits per byte of a byte n-gram model with modified Kneser-Ney smoothing, trained on all
        of the
        training text.
      ngram_order: order of that model.
    """

    train_bytes: int
    heldout_bytes: int
    gzip: float
    xz: float
    xz_primed: float
    primed_bytes: int
    ngram: float
    ngram_order: int

    def table(self) -> str:
        """Returns the figures as aligned lines of text."""
        rows = {
            "gzip -9": self.gzip,
            "xz -9e": self.xz,
            f"xz -9e after {self.primed_bytes / 1e6:.1f} MB of training text": self.xz_primed,
            f"byte {self.ngram_order}-gram, modified Kneser-Ney": self.ngram,
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:{width}}  {value:.4f} bits/byte" for name, value in rows.items())


def compute_baselines(
    train: Sequence[Document],
    heldout: Sequence[Document],
    *,
    ngram_order: int = MAX_ORDER,
    prime_bytes: int = 4_000_000,
) -> Baselines:
    """Computes all baselines; takes some ten seconds for 10 MB of training text.

    Args:
      train: training documents of one split.
      heldout: held-out documents of the same split.
      ngram_order: order of the n-gram model, 1 to 8.
      prime_bytes: approximate bytes of training text for `xz_primed`, complete documents spread
        evenly.

    Raises:
      UserError: either side has no text.
    """
    train_texts = [document.text.encode() for document in train]
    held_texts = [document.text.encode() for document in heldout]
    held = b"".join(held_texts)
    if not held or not any(train_texts):
        side = "training" if held else "held-out"
        raise UserError(f"There is no {side} text for the baselines; check the corpus and split.")
    bits_per = 8 / len(held)
    prime = _sample_evenly(train_texts, prime_bytes)
    model = train_ngram(train_texts, ngram_order)
    result = Baselines(
        train_bytes=sum(map(len, train_texts)),
        heldout_bytes=len(held),
        gzip=len(gzip.compress(held, 9, mtime=0)) * bits_per,
        xz=_xz_size(held) * bits_per,
        xz_primed=(_xz_size(prime + held) - _xz_size(prime)) * bits_per,
        primed_bytes=len(prime),
        ngram=float(model.bits(held_texts).sum()) / len(held),
        ngram_order=ngram_order,
    )
    logging.info("Baselines on %d held-out bytes:\n%s", len(held), result.table())
    return result


def _xz_size(data: bytes) -> int:
    """Returns the size of the data in bytes after xz -9e."""
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def _sample_evenly(texts: Sequence[bytes], limit: int) -> bytes:
    """Returns about `limit` bytes of complete texts, every k-th one, so that no part dominates."""
    stride = max(1, -(-sum(map(len, texts)) // limit))
    return b"".join(texts[::stride])
