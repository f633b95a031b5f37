"""Trains BPE vocabularies on bytes, with exactly the merges that tiktoken's encoder performs.

Merge candidates are byte strings, not pairs of ids: tiktoken merges any two adjacent tokens whose
concatenated bytes are a token, no matter which pair created it. A candidate is therefore the
concatenation, merged wherever two adjacent tokens form it. After training, each word is divided
exactly as the encoder divides it, and every token is reachable (proof: within the span of a token
no other merge ever crossed its edges, so encoding its bytes alone repeats the same merges).

Terms: a word is a pre-token (see `pretokenize.py`) as a list of its current tokens.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import BinaryIO

import regex
from absl import logging

from qwen_jax.errors import UserError, nearest
from qwen_jax.progress import Progress
from qwen_jax.tokenizer.huggingface import byte_order
from qwen_jax.tokenizer.pretokenize import PATTERN, normalize, split_long_whitespace
from qwen_jax.tokenizer.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class JsonlTexts:
    """Iterable over the texts of JSONL files, one JSON object per line with the text in a field.

    Lines end at "\\n" only; other line separators such as U+2028 belong to the document. Blank
    lines are skipped. It can be iterated any number of times.

    Attributes:
      paths: files, read in this order.
      field: key of the text in each object.
    """

    paths: tuple[str, ...]
    field: str = "text"

    def __len__(self) -> int:
        """Returns the number of lines, blank ones included; reads all files."""
        lines = 0
        for path in self.paths:
            with _open(path) as file:
                lines += sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
        return lines

    def __iter__(self) -> Iterator[str]:
        """Yields the text of each line.

        Raises:
          UserError: a file cannot be read, or a line is not a JSON object with the text field.
        """
        for path in self.paths:
            with _open(path) as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield self._text_of(line, f"{path}, line {number}")

    def _text_of(self, line: bytes, place: str) -> str:
        """Returns the text in one line of JSON.

        Args:
          line: the line.
          place: its file and line number, for messages.

        Raises:
          UserError: it is not a JSON object with a string in the text field.
        """
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{place}, is not JSON ({error}): every line must be one object."
            ) from None
        if not isinstance(document, dict):
            raise UserError(f"{place}, is a JSON {type(document).__name__}: it must be an object.")
        if self.field not in document:
            raise UserError(
                f"{place}, has no field {self.field!r}{nearest(self.field, document)}: it has "
                f"{', '.join(map(repr, document)) or 'none'}."
            )
        text = document[self.field]
        if not isinstance(text, str):
            raise UserError(
                f"{place}: field {self.field!r} is a {type(text).__name__}: it must be a string."
            )
        return text


def _open(path: str) -> BinaryIO:
    """Opens a file for reading bytes.

    Raises:
      UserError: it cannot be opened.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None


def count_pretokens(texts: Iterable[str]) -> collections.Counter[str]:
    """Returns how often each pre-token occurs in texts, normalised and split as for encoding."""
    find_all = regex.compile(PATTERN).findall
    counts: collections.Counter[str] = collections.Counter()
    progress = Progress("count", len(texts) if isinstance(texts, Sized) else None, "documents")
    for text in texts:
        for piece in split_long_whitespace(normalize(text)):
            counts.update(find_all(piece))
        progress.add(1)
    return counts


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    min_count: int = 2,
    base: Sequence[bytes] | None = None,
) -> list[bytes]:
    """Trains a BPE vocabulary on texts and returns its tokens (bytes) in order of rank.

    It starts from the 256 single bytes in Qwen's order, or from `base`, and adds the most frequent
    concatenation of two adjacent tokens at a time. Among candidates of equal count the first in
    byte order is taken, so the result does not depend on the order of the texts.

    Args:
      texts: documents; iterated once.
      vocab_size: number of tokens to return, including those of the start but not the 208 control
        tokens. Fewer are returned, with a warning, if no candidate occurs `min_count` times.
      min_count: minimum number of occurrences of a new token.
      base: existing vocabulary to extend; its ranks are kept. The report extends cl100k_base this
        way (section 2.2); see `without_long_numbers`.

    Raises:
      UserError: `vocab_size` is less than the start, `min_count` is below 1, there is no text, or
        `base` is not a valid vocabulary.
    """
    start = len(base) if base is not None else 256
    if vocab_size < start:
        unit = "ranks of the base" if base is not None else "single bytes"
        raise UserError(f"vocab_size is {vocab_size:,}: it must be at least the {start:,} {unit}.")
    if min_count < 1:
        raise UserError(f"min_count is {min_count}: it must be at least 1.")
    pretokens = count_pretokens(texts)
    if not pretokens:
        raise UserError("There is no text to train a vocabulary on: the documents are empty.")
    return merge_pretokens(pretokens, vocab_size, min_count=min_count, base=base)


def without_long_numbers(ranks: Sequence[bytes]) -> list[bytes]:
    """Returns a vocabulary without its tokens of several digits, unreachable with Qwen's pattern.

    Applied to cl100k_base it drops 1,100 tokens and leaves the first 99,156 ranks of Qwen.

    Args:
      ranks: bytes of each token, in order of rank.
    """
    return [token for token in ranks if len(token) < 2 or not token.isdigit()]


def merge_pretokens(
    pretokens: Mapping[str, int],
    vocab_size: int,
    *,
    min_count: int = 2,
    base: Sequence[bytes] | None = None,
) -> list[bytes]:
    """Trains a BPE vocabulary on counted pre-tokens and returns its tokens in order of rank.

    Args:
      pretokens: number of occurrences of each pre-token; see `count_pretokens`.
      vocab_size: number of tokens to return, as in `train_bpe`.
      min_count: minimum number of occurrences of a new token.
      base: existing vocabulary to extend; None for the 256 single bytes.
    """
    ranks = [bytes([byte]) for byte in byte_order()] if base is None else list(base)
    known = frozenset(ranks)
    words, weights = _split_words(pretokens, ranks)
    counts, where = _index_pairs(words, weights)
    heap = [(-count, joined) for joined, count in counts.items() if count >= min_count]
    heapq.heapify(heap)
    progress = Progress("merge", vocab_size - len(ranks), "tokens")
    while len(ranks) < vocab_size and heap:
        negative, token = heapq.heappop(heap)
        count = counts[token]
        if count != -negative:
            # A stale entry: other merges have since removed occurrences. Reinsert it if needed.
            if count >= min_count:
                heapq.heappush(heap, (-count, token))
            continue
        # A base may contain a token that its own merges never produce, but a new one may.
        if token not in known:
            ranks.append(token)
        for joined, delta in _apply_merge(token, words, weights, where).items():
            counts[joined] += delta
            if delta > 0 and counts[joined] >= min_count:
                heapq.heappush(heap, (-counts[joined], joined))
        progress.add(1)
    if len(ranks) < vocab_size:
        logging.warning(
            "Only %d tokens instead of %d: no other pair occurs %d times; give more text.",
            len(ranks),
            vocab_size,
            min_count,
        )
    return ranks


def _split_words(
    pretokens: Mapping[str, int], ranks: Sequence[bytes]
) -> tuple[list[list[bytes]], list[int]]:
    """Encodes pre-tokens with a vocabulary, dropping those that are a single token.

    Args:
      pretokens: number of occurrences of each pre-token.
      ranks: the vocabulary.

    Returns:
      (words, number of occurrences of each).
    """
    encode = Tokenizer(tuple(ranks)).encode
    words, weights = [], []
    for text, count in pretokens.items():
        word = [ranks[i] for i in encode(text)]
        if len(word) > 1:
            words.append(word)
            weights.append(count)
    return words, weights


def _index_pairs(
    words: list[list[bytes]], weights: list[int]
) -> tuple[dict[bytes, int], dict[bytes, list[int]]]:
    """Counts and indexes the merge candidates of all words.

    Args:
      words: pre-tokens as lists of tokens.
      weights: number of occurrences of each word.

    Returns:
      (candidate → number of its occurrences, candidate → indices of the words that contain it).
    """
    counts: dict[bytes, int] = collections.defaultdict(int)
    where: dict[bytes, list[int]] = collections.defaultdict(list)
    for index, word in enumerate(words):
        weight = weights[index]
        for left, right in itertools.pairwise(word):
            joined = left + right
            counts[joined] += weight
            _append_new(where[joined], index)
    return counts, where


def _append_new(indices: list[int], index: int) -> None:
    """Appends a word's index to a candidate's list of words, unless it is already the last one."""
    if not indices or indices[-1] != index:
        indices.append(index)


def _apply_merge(
    token: bytes, words: list[list[bytes]], weights: list[int], where: dict[bytes, list[int]]
) -> dict[bytes, int]:
    """Merges adjacent tokens whose bytes are `token` in every word, from left to right.

    Args:
      token: bytes of the new token.
      words: pre-tokens as lists of tokens; updated in place.
      weights: number of occurrences of each word.
      where: candidate → indices of the words that contain it; updated in place.

    Returns:
      Candidate → change of its number of occurrences, for all that change, `token` included.
    """
    change: dict[bytes, int] = collections.defaultdict(int)
    for index in where.pop(token):
        word, weight = words[index], weights[index]
        merged: list[bytes] = []
        i = 0
        # A word may be listed twice or no longer contain the pair; then nothing matches.
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
                _append_new(where[merged[-1] + token], index)
            i += 2
            if i < len(word):
                change[right + word[i]] -= weight
                change[token + word[i]] += weight
                _append_new(where[token + word[i]], index)
            merged.append(token)
        words[index] = merged
    return change
