"""Training a vocabulary: exact byte-level BPE whose merges are those that tiktoken will make.

Merging is done on bytes, not on pairs of ids. tiktoken joins any two neighbours whose bytes
together are a token, whichever pair first made it, so a candidate here is the joined bytes, and it
is merged wherever two neighbours spell it. Training therefore ends with each word in the very
pieces that the encoder will produce, and every token can be reached (proof: within the span of a
token no other merge ever crossed its edges, so encoding the token alone repeats its history).
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import BinaryIO

import regex
from absl import logging

from qwen_jax.errors import UserError, nearest
from qwen_jax.tokenizer.huggingface import byte_order
from qwen_jax.tokenizer.pretokenize import PATTERN, normalize, split_long_whitespace
from qwen_jax.tokenizer.tokenizer import Tokenizer

_LOG_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class JsonlTexts:
    """The documents of JSONL files: on each line a JSON object with the text in one field.

    Lines end at "\n" only: U+2028 and its kin are ordinary characters of a document. Blank lines
    are skipped. Can be read any number of times; its length, at most one too large per blank line,
    costs a pass over the bytes.

    Attributes:
      paths: files, read in this order.
      field: the key of the text.
    """

    paths: tuple[str, ...]
    field: str = "text"

    def __len__(self) -> int:
        lines = 0
        for path in self.paths:
            with _open(path) as file:
                lines += sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
        return lines

    def __iter__(self) -> Iterator[str]:
        """Yields the texts.

        Raises:
          UserError: a file that cannot be read, a line that is no JSON object or lacks the text.
        """
        for path in self.paths:
            with _open(path) as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield self._text_of(line, f"{path}, line {number}")

    def _text_of(self, line: bytes, place: str) -> str:
        try:
            document = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{place}, is not JSON ({error}): one object a line is wanted."
            ) from None
        if not isinstance(document, dict):
            raise UserError(f"{place}, holds a {type(document).__name__}: an object is wanted.")
        if self.field not in document:
            raise UserError(
                f"{place}, has no field {self.field!r}{nearest(self.field, document)}: it has "
                f"{', '.join(map(repr, document)) or 'none'}."
            )
        text = document[self.field]
        if not isinstance(text, str):
            raise UserError(
                f"{place}: field {self.field!r} holds a {type(text).__name__}: a string is wanted."
            )
        return text


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None


def count_pretokens(texts: Iterable[str]) -> collections.Counter[str]:
    """Returns how often each pre-token occurs in `texts`, normalised and split as for encoding."""
    find_all = regex.compile(PATTERN).findall
    counts: collections.Counter[str] = collections.Counter()
    progress = _Progress("Counting", "documents", len(texts) if isinstance(texts, Sized) else None)
    for text in texts:
        for piece in split_long_whitespace(normalize(text)):
            counts.update(find_all(piece))
        progress.step()
    return counts


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    min_count: int = 2,
    base: Sequence[bytes] | None = None,
) -> list[bytes]:
    """Returns the ranks of a vocabulary learnt from `texts`.

    The first 256 are the single bytes in the order that Qwen has them, or else the ranks of
    `base`; each further one joins the two neighbours that are most frequent. Of candidates of equal
    count the one whose bytes sort first is taken, so equal texts, in any order, give equal ranks.

    Args:
      texts: documents; read once.
      vocab_size: number of ranks to make, those of the start included and the 208 control tokens
        not. Fewer come back when nothing occurs `min_count` times any more; a log line says so.
      min_count: least number of occurrences of a merge.
      base: ranks to go on from, which stay as they are. The report starts from cl100k_base so
        (section 2.2): see `without_long_numbers`.

    Raises:
      UserError: `vocab_size` below the start, `min_count` below 1, no text at all, or a `base` that
        is no vocabulary.
    """
    start = len(base) if base is not None else 256
    if vocab_size < start:
        what = "ranks that the base has" if base is not None else "single bytes"
        raise UserError(f"vocab_size is {vocab_size:,}: it must be at least the {start:,} {what}.")
    if min_count < 1:
        raise UserError(f"min_count is {min_count}: it must be at least 1.")
    pretokens = count_pretokens(texts)
    if not pretokens:
        raise UserError("There is no text to learn a vocabulary from: the documents are empty.")
    return merge_pretokens(pretokens, vocab_size, min_count=min_count, base=base)


def without_long_numbers(ranks: Sequence[bytes]) -> list[bytes]:
    """Returns `ranks` without the numbers of several digits, which single digits never reach.

    Applied to cl100k_base it drops 1,100 tokens and leaves the first 99,156 ranks of Qwen.
    """
    return [token for token in ranks if len(token) < 2 or not token.isdigit()]


def merge_pretokens(
    pretokens: Mapping[str, int],
    vocab_size: int,
    *,
    min_count: int = 2,
    base: Sequence[bytes] | None = None,
) -> list[bytes]:
    """Returns the ranks learnt from counted pre-tokens; see `train_bpe`."""
    ranks = [bytes([byte]) for byte in byte_order()] if base is None else list(base)
    known = frozenset(ranks)
    words, weights = _split_words(pretokens, ranks)
    counts, where = _index_pairs(words, weights)
    heap = [(-count, joined) for joined, count in counts.items() if count >= min_count]
    heapq.heapify(heap)
    progress = _Progress("Merging", "tokens", vocab_size - len(ranks))
    while len(ranks) < vocab_size and heap:
        negative, token = heapq.heappop(heap)
        count = counts[token]
        if count != -negative:
            # An entry from before other merges took occurrences away: put it in its place.
            if count >= min_count:
                heapq.heappush(heap, (-count, token))
            continue
        # A base can hold a token that its own merges never made; a new one may bring it about.
        if token not in known:
            ranks.append(token)
        for joined, delta in _merge_everywhere(token, words, weights, where).items():
            counts[joined] += delta
            if delta > 0 and counts[joined] >= min_count:
                heapq.heappush(heap, (-counts[joined], joined))
        progress.step()
    if len(ranks) < vocab_size:
        logging.warning(
            "Only %d tokens instead of %d: no pair occurs %d times any more; give more text.",
            len(ranks),
            vocab_size,
            min_count,
        )
    return ranks


def _split_words(
    pretokens: Mapping[str, int], ranks: Sequence[bytes]
) -> tuple[list[list[bytes]], list[int]]:
    """Returns the pre-tokens of more than one token, split by `ranks`, and their counts."""
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


class _Progress:
    """Logs every ten seconds how far a loop is and, if its length is known, when it will end."""

    def __init__(self, what: str, unit: str, total: int | None):
        self._what, self._unit, self._total = what, unit, total
        self._done = 0
        self._start = self._shown = time.monotonic()

    def step(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._shown < _LOG_SECONDS:
            return
        self._shown = now
        of, left = "", ""
        if self._total:
            seconds = (now - self._start) / self._done * max(self._total - self._done, 0)
            of, left = f" of {self._total:,}", f", about {seconds:.0f} s to go"
        logging.info("%s: %s%s %s%s", self._what, f"{self._done:,}", of, self._unit, left)
