"""From text to pre-tokens: the normal form, the splitting pattern, and how far runs may go.

BPE merges never cross a pre-token, so this file decides what a token can be. The encoder
(`tokenizer.py`) and the trainer (`train.py`) share it.
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

# Past about a million characters of whitespace the regular expression inside tiktoken overflows
# its stack and raises a BaseException, which would kill a worker. Ordinary text never has 65,536.
MAX_WHITESPACE_RUN = 65_536
# NFC sorts each run of combining marks in quadratic time: 100,000 marks take 5 to 10 seconds.
# Unicode's stream-safe format (UAX 15) allows 30 in a row.
MAX_COMBINING_RUN = 1_024

# Combining class 0, yet they decompose into combining marks.
_DECOMPOSE_INTO_MARKS = frozenset("\u0f73\u0f75\u0f81")


def _is_mark(character: str) -> bool:
    return unicodedata.combining(character) > 0 or character in _DECOMPOSE_INTO_MARKS


def _cut_runs(text: str, inside: Callable[[str], bool], limit: int) -> list[str]:
    """Cuts `text` inside every run of `inside` characters longer than `limit`, every `limit`.

    Text without such a run comes back whole. Only every `limit`-th character is looked at, since
    a longer run cannot hide between two of them: the check costs nothing on ordinary text.
    """
    cuts = []
    position = 0
    while position < len(text):
        if inside(text[position]):
            start, end = position, position + 1
            while start > 0 and inside(text[start - 1]):
                start -= 1
            while end < len(text) and inside(text[end]):
                end += 1
            cuts.extend(range(start + limit, end, limit))
            position = end
        position += limit
    if not cuts:
        return [text]
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def normalize(text: str) -> str:
    """Returns `text` in Unicode normal form C, as the released tokenizer does before encoding.

    Surrogate pairs are joined and lone surrogates, which have no UTF-8 form, become U+FFFD. A run
    of more than `MAX_COMBINING_RUN` combining marks is normalised in parts, so that hostile input
    costs linear time; any other text gets exactly NFC.
    """
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    pieces = _cut_runs(text, _is_mark, MAX_COMBINING_RUN)
    return "".join(unicodedata.normalize("NFC", piece) for piece in pieces)


def split_long_whitespace(text: str) -> list[str]:
    """Cuts `text` where it has more than `MAX_WHITESPACE_RUN` whitespace characters in a row.

    The pieces joined are `text`. Text with shorter runs is one piece, so its ids are those of
    plain tiktoken; inside a longer run a pre-token ends at each cut, which can change a few ids.
    """
    return _cut_runs(text, str.isspace, MAX_WHITESPACE_RUN)
