"""Incremental detokenisation: complete characters only, with stop strings held back."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Sequence

from qwen_jax.errors import UserError
from qwen_jax.tokenizer.tokenizer import IncrementalDecoder, Tokenizer


class _StopMatcher:
    """Searches a text for one stop string, one character at a time (Knuth, Morris, Pratt 1977).

    Attributes:
      stop: the stop string.
      matched: length of the longest prefix of `stop` that is a suffix of the text so far.
    """

    def __init__(self, stop: str):
        """Starts with an empty text; `stop` is not empty."""
        self.stop, self.matched = stop, 0
        # By length of a prefix of `stop`: the length of its longest proper prefix that is also its
        # suffix.
        self._failure = [0] * (len(stop) + 1)
        length = 0
        for i in range(1, len(stop)):
            while length and stop[i] != stop[length]:
                length = self._failure[length]
            length += stop[i] == stop[length]
            self._failure[i + 1] = length

    def push(self, character: str) -> bool:
        """Appends a character to the text; returns whether the text now ends with `stop`."""
        while self.matched and character != self.stop[self.matched]:
            self.matched = self._failure[self.matched]
        self.matched += character == self.stop[self.matched]
        return self.matched == len(self.stop)


class StreamDecoder:
    """Decodes the tokens of one answer to text as they are generated, up to a stop string.

    For any split of the ids into calls of `push`, the results of `push` and `finish` joined are
    `tokenizer.decode(ids, skip_special_tokens=True)` up to the first stop string: the one that is
    completed first, and the longest of those completed by the same character. Held back are only
    the first bytes of an incomplete character and the longest suffix that is a prefix of a stop
    string.

    Attributes:
      stop_string: the stop string that ended the text; None if none was found so far.
      num_text_tokens: the fewest leading tokens that spell the returned text; after `finish`
        without a stop string, all tokens.
      num_tokens: tokens decoded; tokens pushed after a stop string was found are not.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        """Creates a decoder with an empty text.

        Args:
          tokenizer: the tokenizer of the ids.
          stop: strings that end the text and are not part of it.

        Raises:
          UserError: `stop` is a single string, or contains an empty string or a non-string.
        """
        check_stop_strings(stop)
        self.stop_string: str | None = None
        self.num_text_tokens = self.num_tokens = 0
        self._decoder = IncrementalDecoder(tokenizer, skip_special_tokens=True)
        # Longest first, because the first match is taken if one character completes several.
        self._matchers = [_StopMatcher(s) for s in sorted(set(stop), key=lambda s: (-len(s), s))]
        self._held_back = ""  # decoded text that is not certain yet
        self._num_returned = self._num_decoded = 0  # characters
        # `_num_decoded` after each token that is not in `num_text_tokens`.
        self._token_ends: collections.deque[int] = collections.deque()
        self._num_spelled = 0  # characters of the first `num_text_tokens` tokens

    def push(self, ids: Iterable[int]) -> str:
        """Decodes token ids and returns the text that has become certain, which may be empty.

        Ids after a stop string are ignored.

        Raises:
          UserError: an id is outside the vocabulary; the ids before it were decoded.
        """
        pieces = []
        for token_id in ids:
            if self.stop_string is not None:
                break
            text = self._decoder.push(int(token_id))
            self.num_tokens += 1
            self._token_ends.append(self._num_decoded + len(text))
            pieces.append(self._append(text))
        return "".join(pieces)

    def finish(self) -> str:
        """Ends the text and returns what was held back, an incomplete character as U+FFFD."""
        if self.stop_string is not None:
            return ""
        rest = self._append(self._decoder.flush())
        if self.stop_string is None:
            rest, self._held_back = rest + self._held_back, ""
            self._token_ends.clear()
            self.num_text_tokens = self.num_tokens
        return rest

    def _append(self, text: str) -> str:
        """Appends decoded text and returns the part of all held-back text that is now certain.

        Sets `stop_string` if the text contains one, and updates `num_text_tokens`.
        """
        if not text:
            return ""
        self._num_decoded += len(text)
        num_held_back = len(self._held_back)
        available, self._held_back = self._held_back + text, ""
        certain = len(available)
        if self._matchers:
            certain = self._match(text, num_held_back)
        if self.stop_string is None:
            self._held_back = available[certain:]
        self._num_returned += certain
        if self._num_returned:
            while self._token_ends and self._num_spelled < self._num_returned:
                self._num_spelled = self._token_ends.popleft()
                self.num_text_tokens += 1
        return available[:certain]

    def _match(self, text: str, offset: int) -> int:
        """Searches new text for stop strings and sets `stop_string` if one is found.

        Args:
          text: the new text.
          offset: number of held-back characters before it.

        Returns:
          The number of characters, of held-back and new text together, that are certain.
        """
        for end, character in zip(itertools.count(offset + 1), text, strict=False):
            # Every matcher must receive the character, so this is a list.
            found = [m.stop for m in self._matchers if m.push(character)]
            if found:
                self.stop_string = found[0]
                return end - len(found[0])
        return offset + len(text) - max(m.matched for m in self._matchers)


def check_stop_strings(stop: Sequence[str]) -> None:
    """Checks that `stop` is a list of non-empty strings.

    Raises:
      UserError: it is a single string, or contains an empty string or a non-string.
    """
    if isinstance(stop, str):
        raise UserError(f"stop is the string {stop!r}; give a list of strings.")
    for text in stop:
        if not isinstance(text, str) or not text:
            raise UserError(f"stop contains {text!r}; every stop string must be a non-empty text.")
