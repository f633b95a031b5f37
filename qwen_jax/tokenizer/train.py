"""Training a vocabulary: exact byte-level BPE whose merges are those that tiktoken will make.

Merging is done on bytes, not on pairs of ids. tiktoken joins any two neighbours whose bytes
together are a token, whichever pair first made it, so a candidate here is the joined bytes, and it
is merged wherever two neighbours spell it. Training therefore ends with each word in the very
pieces that the encoder will produce, and every token can be reached (proof: within the span of a
token no other merge ever crossed its edges, so encoding the token alone repeats its history).
"""

from __future__ import annotations

import collections
import heapq
import itertools
import time
from collections.abc import Iterable, Mapping

import regex
from absl import logging

from qwen_jax.errors import UserError
from qwen_jax.tokenizer.huggingface import byte_order
from qwen_jax.tokenizer.pretokenize import PATTERN, normalize, split_long_whitespace

_LOG_SECONDS = 10.0


def count_pretokens(texts: Iterable[str]) -> collections.Counter[str]:
    """Returns how often each pre-token occurs in `texts`, normalised and split as for encoding."""
    find_all = regex.compile(PATTERN).findall
    counts: collections.Counter[str] = collections.Counter()
    characters, start = 0, time.monotonic()
    shown = start
    for number, text in enumerate(texts, start=1):
        for piece in split_long_whitespace(normalize(text)):
            counts.update(find_all(piece))
        characters += len(text)
        now = time.monotonic()
        if now - shown > _LOG_SECONDS:
            shown = now
            logging.info(
                "Counting: %d documents, %.1f million characters, %.1f million a second",
                number,
                characters / 1e6,
                characters / 1e6 / (now - start),
            )
    return counts


def train_bpe(texts: Iterable[str], vocab_size: int, *, min_count: int = 2) -> list[bytes]:
    """Returns the ranks of a vocabulary learnt from `texts`.

    The first 256 are the single bytes in the order that Qwen has them; each further one joins the
    two neighbours that are most frequent. Of candidates of equal count the one whose bytes sort
    first is taken, so equal texts, in any order, give equal ranks.

    Args:
      texts: documents; read once.
      vocab_size: number of ranks to make, the 256 bytes included and the 208 control tokens not.
        Fewer come back when nothing occurs `min_count` times any more; a log line says so.
      min_count: least number of occurrences of a merge.

    Raises:
      UserError: `vocab_size` below 256, `min_count` below 1, or no text at all.
    """
    if vocab_size < 256:
        raise UserError(f"vocab_size is {vocab_size}: at least the 256 single bytes are needed.")
    if min_count < 1:
        raise UserError(f"min_count is {min_count}: it must be at least 1.")
    pretokens = count_pretokens(texts)
    if not pretokens:
        raise UserError("There is no text to learn a vocabulary from: the documents are empty.")
    return merge_pretokens(pretokens, vocab_size, min_count=min_count)


def merge_pretokens(
    pretokens: Mapping[str, int], vocab_size: int, *, min_count: int = 2
) -> list[bytes]:
    """Returns the ranks learnt from counted pre-tokens; see `train_bpe`."""
    singles = [bytes([byte]) for byte in range(256)]
    ranks = [bytes([byte]) for byte in byte_order()]
    encoded = ((text.encode("utf-8"), count) for text, count in pretokens.items())
    several = [(piece, count) for piece, count in encoded if len(piece) > 1]
    words = [[singles[byte] for byte in piece] for piece, _ in several]
    weights = [count for _, count in several]
    counts, where = _index_pairs(words, weights)
    heap = [(-count, joined) for joined, count in counts.items() if count >= min_count]
    heapq.heapify(heap)
    progress = _MergeProgress(vocab_size)
    while len(ranks) < vocab_size and heap:
        negative, token = heapq.heappop(heap)
        count = counts[token]
        if count != -negative:
            # An entry from before other merges took occurrences away: put it in its place.
            if count >= min_count:
                heapq.heappush(heap, (-count, token))
            continue
        ranks.append(token)
        for joined, delta in _merge_everywhere(token, words, weights, where).items():
            counts[joined] += delta
            if delta > 0 and counts[joined] >= min_count:
                heapq.heappush(heap, (-counts[joined], joined))
        progress.report(len(ranks), count)
    if len(ranks) < vocab_size:
        logging.warning(
            "Only %d tokens instead of %d: no pair occurs %d times any more; give more text.",
            len(ranks),
            vocab_size,
            min_count,
        )
    return ranks


def _index_pairs(
    words: list[list[bytes]], weights: list[int]
) -> tuple[dict[bytes, int], dict[bytes, list[int]]]:
    """Returns, for the joined bytes of neighbours, their count and the words that have them."""
    counts: dict[bytes, int] = collections.defaultdict(int)
    where: dict[bytes, list[int]] = collections.defaultdict(list)
    for index, word in enumerate(words):
        weight = weights[index]
        for left, right in itertools.pairwise(word):
            joined = left + right
            counts[joined] += weight
            _note(where[joined], index)
    return counts, where


def _note(places: list[int], index: int) -> None:
    """Adds the word now being worked on to the places of a candidate, unless it was just added."""
    if not places or places[-1] != index:
        places.append(index)


def _merge_everywhere(
    token: bytes, words: list[list[bytes]], weights: list[int], where: dict[bytes, list[int]]
) -> dict[bytes, int]:
    """Joins neighbours that spell `token` in every word, left to right.

    Returns:
      the change that this makes to the count of every candidate, `token` included.
    """
    change: dict[bytes, int] = collections.defaultdict(int)
    for index in where.pop(token):
        word, weight = words[index], weights[index]
        merged: list[bytes] = []
        i = 0
        # A word can be listed twice, or have lost the pair since: then nothing matches.
        while i < len(word):
            left = word[i]
            if i + 1 == len(word) or left + word[i + 1] != token:
                merged.append(left)
                i += 1
                continue
            right = word[i + 1]
            change[token] -= weight
            if merged:
                change[merged[-1] + left] -= weight
                change[merged[-1] + token] += weight
                _note(where[merged[-1] + token], index)
            i += 2
            if i < len(word):
                change[right + word[i]] -= weight
                change[token + word[i]] += weight
                _note(where[token + word[i]], index)
            merged.append(token)
        words[index] = merged
    return change


class _MergeProgress:
    """Logs every ten seconds how far the merging is."""

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size
        self._start = self._shown = time.monotonic()

    def report(self, n_ranks: int, count: int) -> None:
        now = time.monotonic()
        if now - self._shown < _LOG_SECONDS:
            return
        self._shown = now
        seconds = (now - self._start) / (n_ranks - 256) * (self._vocab_size - n_ranks)
        logging.info(
            "Merging: %d of %d tokens, last count %d, at most %.0f s to go",
            n_ranks,
            self._vocab_size,
            count,
            seconds,
        )
