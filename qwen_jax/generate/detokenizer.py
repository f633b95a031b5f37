"""Ids to text as they come: never half a character, never the beginning of a stop string."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Sequence

from qwen_jax.errors import UserError
from qwen_jax.tokenizer.tokenizer import IncrementalDecoder, Tokenizer


class _Matcher:
    """Follows one stop string through the text a character at a time (Knuth, Morris, Pratt 1977).

    `matched` is the length of its longest beginning that the text so far ends with.
    """

    def __init__(self, stop: str):
        self.stop, self.matched = stop, 0
        # For each length of a beginning: the length of its longest own beginning that ends it.
        self._shorter = [0] * (len(stop) + 1)
        length = 0
        for i in range(1, len(stop)):
            while length and stop[i] != stop[length]:
                length = self._shorter[length]
            length += stop[i] == stop[length]
            self._shorter[i + 1] = length

    def push(self, character: str) -> bool:
        """Takes one more character; True when the stop string is complete with it."""
        while self.matched and character != self.stop[self.matched]:
            self.matched = self._shorter[self.matched]
        self.matched += character == self.stop[self.matched]
        return self.matched == len(self.stop)


class TextStream:
    """The text of one answer, given out as soon as it is certain.

    For any split of the ids into pushes, the pieces of `push` and `finish`, joined, are
    `tokenizer.decode(ids, skip_special_tokens=True)` up to the first stop string. The first is the
    one that is complete first; of several complete with the same character, the longest. What is
    held back is a character's first bytes and the longest text that a stop string may begin with.

    Attributes:
      stopped: the stop string that was found, which ends the text; None so far.
      kept: how many of the tokens pushed belong to the text given out: the fewest that spell it.
        After `finish` without a stop string it is all of them.
      seen: tokens taken; those pushed after a stop string was found are not.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        """Starts an empty text.

        Args:
          tokenizer: of the ids.
          stop: strings that end the text and are not part of it.

        Raises:
          UserError: `stop` is a lone string, or has something that is not a string or is empty.
        """
        check_stop(stop)
        self.stopped: str | None = None
        self.kept = self.seen = 0
        self._decoder = IncrementalDecoder(tokenizer, skip_special_tokens=True)
        # Longest first, so that it is the first found of those complete at once.
        self._matchers = [_Matcher(s) for s in sorted(set(stop), key=lambda s: (-len(s), s))]
        self._held = ""
        self._given = self._decoded = 0  # characters given out, and decoded in all
        self._ends: collections.deque[int] = collections.deque()  # `_decoded` after each later id

    def push(self, ids: Iterable[int]) -> str:
        """Returns the text that has become certain with `ids`, perhaps none; none after a stop.

        Raises:
          UserError: an id outside the vocabulary; the ids before it were taken.
        """
        pieces = []
        for token_id in ids:
            if self.stopped is not None:
                break
            text = self._decoder.push(int(token_id))
            self.seen += 1
            self._ends.append(self._decoded + len(text))
            pieces.append(self._take(text))
        return "".join(pieces)

    def finish(self) -> str:
        """Ends the text: returns what was held back (bytes of half a character as U+FFFD)."""
        if self.stopped is not None:
            return ""
        rest = self._take(self._decoder.flush())
        if self.stopped is None:
            rest, self._held = rest + self._held, ""
            self._ends.clear()
            self.kept = self.seen
        return rest

    def _take(self, text: str) -> str:
        """What of the held text and `text` is certain; looks for stop strings in it."""
        if not text:
            return ""
        self._decoded += len(text)
        whole, self._held = self._held + text, ""
        keep = len(whole)
        if self._matchers:
            keep = self._find(text, len(whole) - len(text))
        if self.stopped is None:
            self._held = whole[keep:]
        self._given += keep
        if self._given:
            while self._ends and self._reached < self._given:
                self._reached = self._ends.popleft()
                self.kept += 1
        return whole[:keep]

    _reached = 0  # characters that the kept tokens spell, perhaps more than are given out

    def _find(self, text: str, offset: int) -> int:
        """Feeds the matchers; returns how many characters of held + `text` are certain."""
        for at, character in zip(itertools.count(offset + 1), text, strict=False):
            found = [m.stop for m in self._matchers if m.push(character)]
            if found:
                self.stopped = found[0]
                return at - len(found[0])
        return offset + len(text) - max(m.matched for m in self._matchers)


def check_stop(stop: Sequence[str]) -> None:
    """Refuses what is no list of stop strings.

    Raises:
      UserError: it is a lone string, or has something that is not a string or is empty.
    """
    if isinstance(stop, str):
        raise UserError(f"stop is the string {stop!r}; give a list of strings.")
    for text in stop:
        if not isinstance(text, str) or not text:
            raise UserError(f"A stop string is {text!r}; it must be a text that is not empty.")
