"""What a model has to beat: bits per byte of held-out text under gzip, xz and a byte n-gram model.

Bits per byte do not depend on a tokenizer. A model's figure counts the bits of its trained targets
over their bytes (`n_bytes` of a batch): it pays for each document's end, which no baseline here
predicts, and not for each document's first token, which has no context.

Give one mixture component at a time: where components repeat each other (the docstrings of the
standard library are in its sources too), compressors of the joined text profit from the repetition.
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

SEES = {
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
    """Bits per byte of the same held-out text, documents joined in order for the compressors.

    Attributes:
      train_bytes, heldout_bytes: UTF-8 bytes of the texts.
      gzip: `gzip -9`, no training text. xz: `xz -9e`, no training text.
      xz_primed: growth of an xz -9e file of `primed_bytes` of training text when the held-out text
        is appended.
      ngram: byte n-gram model of order `ngram_order`, modified Kneser-Ney, trained on all of the
        training text.
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
        """The figures as aligned lines of text."""
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
    """Computes all baselines; some ten seconds for 10 MB of training text.

    Args:
      train, heldout: documents of the two sides of one split.
      ngram_order: of the n-gram model, 1 to 8.
      prime_bytes: training text given to `xz_primed`, in whole documents spread evenly.

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
    prime = _spread(train_texts, prime_bytes)
    model = train_ngram(train_texts, ngram_order)
    result = Baselines(
        train_bytes=sum(map(len, train_texts)),
        heldout_bytes=len(held),
        gzip=len(gzip.compress(held, 9, mtime=0)) * bits_per,
        xz=_xz(held) * bits_per,
        xz_primed=(_xz(prime + held) - _xz(prime)) * bits_per,
        primed_bytes=len(prime),
        ngram=float(model.bits(held_texts).sum()) / len(held),
        ngram_order=ngram_order,
    )
    logging.info("Baselines on %d held-out bytes:\n%s", len(held), result.table())
    return result


def _xz(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def _spread(texts: Sequence[bytes], limit: int) -> bytes:
    """About `limit` bytes of whole texts, every k-th, so that no part of the corpus dominates."""
    stride = max(1, -(-sum(map(len, texts)) // limit))
    return b"".join(texts[::stride])
