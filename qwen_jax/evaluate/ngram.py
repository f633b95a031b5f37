"""A byte n-gram language model with modified Kneser-Ney smoothing, in numpy.

A strong baseline for small language models on small corpora: it uses all of the training text,
trains
in seconds, and its probabilities are exact, so its bits per byte compare directly with a model's.

Source: S. F. Chen and J. Goodman, "An Empirical Study of Smoothing Techniques for Language
Modeling", 1998, section 3 (interpolated form, three discounts per order, equations 15 to 17).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from qwen_jax.errors import UserError

MAX_ORDER = 8  # An n-gram is one uint64, its last byte lowest.


@dataclasses.dataclass(frozen=True)
class _OrderCounts:
    """Counts of one order n of the model; all arrays are sorted by code.

    Attributes:
      grams: uint64 [G], codes of the G observed n-grams.
      counts: int64 [G], occurrences at the highest order; below it, the number of different bytes
        that
        precede the n-gram.
      discounts: float64 [G], amount subtracted from each count.
      contexts: uint64 [C], codes of the C different contexts (the first n − 1 bytes).
      totals: int64 [C], sum of counts of each context.
      reserved: float64 [C], sum of discounts of each context, the mass given to the next lower
        order.
    """

    grams: np.ndarray
    counts: np.ndarray
    discounts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    reserved: np.ndarray


@dataclasses.dataclass(frozen=True)
class ByteNgram:
    """A trained model of p(byte | the preceding order − 1 bytes); documents start after zero bytes.

    Attributes:
      orders: counts of each order, unigrams first.
    """

    orders: tuple[_OrderCounts, ...]

    def bits(self, texts: Sequence[bytes]) -> np.ndarray:
        """Returns −log2 of each text's probability, float64 [len(texts)], without its end."""
        codes, owner = _codes(texts)
        cost = -np.log2(self._probability(codes))
        return np.bincount(owner, weights=cost, minlength=len(texts))

    def probabilities(self, contexts: Sequence[bytes]) -> np.ndarray:
        """Returns the distribution of the byte after each context, float64 [len(contexts), 256]."""
        last, owner = _codes([context + b"\0" for context in contexts])
        is_end = np.append(owner[1:] != owner[:-1], True)
        codes = last[is_end, None] + np.arange(256, dtype=np.uint64)
        return self._probability(codes.ravel()).reshape(len(contexts), 256)

    def _probability(self, codes: np.ndarray) -> np.ndarray:
        """Returns the probability of the last byte of each code, uint64 [n].

        Interpolates upwards from the uniform distribution; an unseen context leaves the lower
        order's value.
        """
        p = np.full(codes.shape, 1 / 256)
        for n, order in enumerate(self.orders, start=1):
            code = codes & _mask(n)
            gram, found = _find(order.grams, code)
            context, known = _find(order.contexts, code >> np.uint64(8))
            kept = np.where(found, order.counts[gram] - order.discounts[gram], 0.0)
            interpolated = (kept + order.reserved[context] * p) / order.totals[context]
            p = np.where(known, interpolated, p)
        return p


def train_ngram(texts: Sequence[bytes], order: int = MAX_ORDER) -> ByteNgram:
    """Trains a byte n-gram model of the given order (order − 1 bytes of context).

    Takes about a second for 10 MB, and about 60 bytes of memory per byte of text.

    Raises:
      UserError: no text, or an order outside 1..8.
    """
    if not 1 <= order <= MAX_ORDER:
        raise UserError(f"The n-gram order is {order}; it must be 1 to {MAX_ORDER}.")
    codes, _ = _codes(texts)
    if not codes.size:
        raise UserError("The n-gram model has no training text; give it non-empty documents.")
    orders = []
    # Highest order: occurrences. Each lower one counts the types of the order above (their first
    # byte dropped), i.e. in how many different left contexts an n-gram was seen.
    for n in range(order, 0, -1):
        codes, counts = np.unique(codes & _mask(n), return_counts=True)
        orders.append(_count_order(codes, counts))
    return ByteNgram(tuple(reversed(orders)))


def _count_order(grams: np.ndarray, counts: np.ndarray) -> _OrderCounts:
    """Returns discounts and context sums for n-grams (uint64 [G], sorted) with counts int64 [G]."""
    contexts, starts = np.unique(grams >> np.uint64(8), return_index=True)
    discounts = _discounts(counts)[np.minimum(counts, 3)]
    return _OrderCounts(
        grams=grams,
        counts=counts,
        discounts=discounts,
        contexts=contexts,
        totals=np.add.reduceat(counts, starts),
        reserved=np.add.reduceat(discounts, starts),
    )


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Returns the discounts of counts 0, 1, 2 and ≥ 3, float64 [4] (Chen & Goodman, equation 17).

    If the text is too small for the estimate, half of 1, 2 and 3. Never 0, so that every byte keeps
    a
    probability, and never more than the count.
    """
    n1, n2, n3, n4 = (int((counts == i).sum()) for i in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return np.array([0.0, 0.5, 1.0, 1.5])
    y = n1 / (n1 + 2 * n2)
    estimates = np.array([1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return np.concatenate([[0.0], np.clip(estimates, 0.01, [1.0, 2.0, 3.0])])


def _mask(n: int) -> np.uint64:
    """Returns the uint64 mask that keeps the last n bytes of a code."""
    return np.uint64(2 ** (8 * n) - 1)


def _find(table: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (index, found) of each code in a sorted table; absent codes get any index."""
    index = np.minimum(np.searchsorted(table, codes), len(table) - 1)
    return index, table[index] == codes


def _codes(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each byte of each text the code of the 8 bytes ending with it, and its text's
    index.
    """
    pad = bytes(MAX_ORDER - 1)
    data = np.frombuffer(b"".join(pad + text for text in texts), np.uint8)
    lengths = np.array([len(text) for text in texts], np.int64)
    owner = np.repeat(np.arange(len(texts)), lengths)
    at = np.arange(owner.size) + (owner + 1) * len(pad)
    codes = np.zeros(owner.size, np.uint64)
    for back in range(MAX_ORDER):
        codes |= data[at - back].astype(np.uint64) << np.uint64(8 * back)
    return codes, owner
