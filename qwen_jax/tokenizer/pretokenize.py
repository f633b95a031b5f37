"""Pre-tokenization: Unicode normalisation, the splitting pattern, and limits on long runs.

BPE merges never cross the boundary of a pre-token. The encoder (`tokenizer.py`) and the vocabulary
trainer (`train.py`) share this file.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

# The pattern of cl100k_base with one change: a number is split into single digits, `\p{N}` where
# cl100k has `\p{N}{1,3}` (Qwen report, section 2.2; the released tokenization_qwen.py).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

MAX_WHITESPACE_RUN = 65_536
"""Longest run of whitespace characters that is not split. At about a million, tiktoken's regular
expression overflows its stack and raises a BaseException, which would end a worker process."""
MAX_COMBINING_RUN = 1_024
"""Longest run of combining marks that is normalised as a whole. NFC sorts a run in quadratic time:
100,000 marks take 5 to 10 seconds. Unicode's stream-safe format (UAX 15) allows 30."""

# Characters of combining class 0 that decompose into combining marks.
_DECOMPOSE_INTO_MARKS = frozenset("\u0f73\u0f75\u0f81")


def _is_mark(character: str) -> bool:
    """Returns whether a character is a combining mark or decomposes into some."""
    return unicodedata.combining(character) > 0 or character in _DECOMPOSE_INTO_MARKS


def _split_runs(text: str, in_run: Callable[[str], bool], limit: int) -> list[str]:
    """Splits text so that no run of certain characters is longer than `limit`.

    A run is a maximal sequence of characters for which `in_run` is true; it is split after every
    `limit` characters. To be fast on ordinary text, only every `limit`-th character is tested: a
    longer run contains one of them.

    Args:
      text: any string.
      in_run: whether a character belongs to a run.
      limit: maximum length of a run in characters.

    Returns:
      Consecutive pieces that concatenate to `text`; [text] if no run is too long.
    """
    cuts: list[int] = []
    position = 0
    while position < len(text):
        if in_run(text[position]):
            start, end = position, position + 1
            while start > 0 and in_run(text[start - 1]):
                start -= 1
            while end < len(text) and in_run(text[end]):
                end += 1
            cuts.extend(range(start + limit, end, limit))
            position = end
        position += limit
    if not cuts:
        return [text]
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def normalize(text: str) -> str:
    """Returns text in Unicode normal form C (NFC), as the released tokenizer does before encoding.

    Surrogate pairs are joined; lone surrogates, which UTF-8 cannot encode, become U+FFFD. A run of
    more than `MAX_COMBINING_RUN` combining marks is normalised in parts, so that malicious input
    takes linear time; the result for any other text is exactly its NFC.
    """
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    pieces = _split_runs(text, _is_mark, MAX_COMBINING_RUN)
    return "".join(unicodedata.normalize("NFC", piece) for piece in pieces)


def split_long_whitespace(text: str) -> list[str]:
    """Splits text inside runs of more than `MAX_WHITESPACE_RUN` whitespace characters.

    Each piece is then encoded on its own. A pre-token ends at each split, which can change a few
    ids in such a run; text without one stays a single piece and has exactly tiktoken's ids.

    Returns:
      Consecutive pieces that concatenate to `text`.
    """
    return _split_runs(text, str.isspace, MAX_WHITESPACE_RUN)
