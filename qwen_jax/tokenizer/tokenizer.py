"""Text to ids and back: Qwen's byte-level BPE with its control tokens."""

from __future__ import annotations

import codecs
import concurrent.futures
import dataclasses
import functools
import itertools
import os
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import tiktoken

from qwen_jax.errors import UserError, nearest
from qwen_jax.tokenizer.huggingface import AddedToken
from qwen_jax.tokenizer.pretokenize import PATTERN, normalize, split_long_whitespace
from qwen_jax.tokenizer.vocabulary import (
    canonical_sha256,
    check_ranks,
    read_vocabulary,
    write_tiktoken,
)

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
# In the order of their ids, the first right after the last rank (tokenization_qwen.py).
CONTROL_TOKENS = (END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(205)))

# Models pad the embedding to a round number of rows (151,936 or 152,064 for 151,851 tokens), and an
# untrained one samples them. Ids further out come from another model's vocabulary.
MAX_PADDING_ROWS = 1_024

AllowedSpecial = Literal["all"] | Collection[str]


@dataclasses.dataclass(frozen=True, repr=False)
class Tokenizer:
    """Immutable tokenizer; safe to share between threads and to send to worker processes.

    Attributes:
      ranks: the bytes of each BPE token; the index is the id.
      added_tokens: other names for control tokens, as Hugging Face folders of Qwen1.5 to Qwen3
        give them; empty for Qwen.

    Raises:
      UserError: the ranks are no byte-level BPE vocabulary, or an added token has no room.
    """

    ranks: tuple[bytes, ...]
    added_tokens: tuple[AddedToken, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "ranks", tuple(self.ranks))
        check_ranks(dict(enumerate(self.ranks)), "the vocabulary")
        # Built now, not in the first call: an error or a wait belongs to the loading.
        _ = self._encoding

    def __repr__(self) -> str:
        return f"Tokenizer(n_ranks={self.n_ranks}, sha256={self.sha256[:12]}...)"

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.ranks, self.added_tokens)

    @property
    def n_ranks(self) -> int:
        """Number of BPE tokens, without the control tokens; 151,643 for Qwen."""
        return len(self.ranks)

    @property
    def vocab_size(self) -> int:
        """Number of ids: ranks and 208 control tokens; 151,851 for Qwen."""
        return self.n_ranks + len(CONTROL_TOKENS)

    @property
    def eod_id(self) -> int:
        """Id of <|endoftext|>, the separator of documents; also used as padding."""
        return self.n_ranks

    @property
    def im_start_id(self) -> int:
        """Id of <|im_start|>, which opens a ChatML turn."""
        return self.n_ranks + 1

    @property
    def im_end_id(self) -> int:
        """Id of <|im_end|>, which closes a ChatML turn."""
        return self.n_ranks + 2

    @functools.cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """Control token -> id, in the order of the ids; read-only."""
        names = dict(enumerate(CONTROL_TOKENS, start=self.n_ranks))
        for token in self.added_tokens:
            if token.id not in names:
                raise UserError(
                    f"Control token {token.text!r} has the id {token.id}: with {self.n_ranks:,} "
                    f"ranks, control tokens have the ids {self.n_ranks} to {self.vocab_size - 1}."
                )
            if token.id <= self.im_end_id and token.text != names[token.id]:
                raise UserError(
                    f"Control token {token.text!r} has the id {token.id}, which is that of "
                    f"{names[token.id]!r} in every Qwen model: this is another model's tokenizer."
                )
            names[token.id] = token.text
        by_name = {name: i for i, name in names.items()}
        if len(by_name) < len(names):
            twice = next(name for i, name in names.items() if by_name[name] != i)
            raise UserError(f"Control token {twice!r} has two ids: each name must have one.")
        return types.MappingProxyType(by_name)

    @functools.cached_property
    def sha256(self) -> str:
        """Hash (hex) of the ranks as canonical tiktoken text: what a checkpoint names.

        For Qwen it is the hash of the released file. Names of added tokens do not enter.
        """
        return canonical_sha256(self.ranks)

    @functools.cached_property
    def token_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, np.int32[vocab_size]; 0 for control tokens.

        Summed over target ids it is the denominator of bits per byte.
        """
        lengths = np.zeros(self.vocab_size, np.int32)
        lengths[: self.n_ranks] = [len(token) for token in self.ranks]
        lengths.setflags(write=False)
        return lengths

    @functools.cached_property
    def _encoding(self) -> tiktoken.Encoding:
        return tiktoken.Encoding(
            "qwen",
            pat_str=PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(self.ranks)},
            special_tokens=dict(self.special_tokens),
        )

    @functools.cached_property
    def _id_bytes(self) -> tuple[bytes, ...]:
        """Bytes of every id that decodes, padding rows included."""
        control = (name.encode() for name in self.special_tokens)
        return (*self.ranks, *control, *itertools.repeat(b"", MAX_PADDING_ROWS))

    @functools.cached_property
    def _id_bytes_without_special(self) -> tuple[bytes, ...]:
        """The same with nothing for control tokens, but for those added as ordinary text."""
        shown = {token.id: token.text.encode() for token in self.added_tokens if not token.special}
        rest = range(self.n_ranks, len(self._id_bytes))
        return (*self.ranks, *(shown.get(i, b"") for i in rest))

    def encode(self, text: str, *, allowed_special: AllowedSpecial = frozenset()) -> list[int]:
        """Returns the ids of `text`.

        The text is NFC-normalised first. Control tokens written out in it are plain text unless
        allowed, so that no document and no user can forge one; the released tokenizer allows all
        by default. Lone surrogates become U+FFFD. For text with more than 65,536 whitespace
        characters or 1,024 combining marks in a row see `pretokenize.py`.

        Args:
          text: any string.
          allowed_special: control tokens to encode as themselves: "all", or their names.

        Raises:
          UserError: not a string, or an unknown control token.
        """
        if not isinstance(text, str):
            raise UserError(
                f"Only a string can be encoded, not {type(text).__name__}: {text!r:.60}."
            )
        allowed = self._check_allowed(allowed_special)
        ids: list[int] = []
        for piece in split_long_whitespace(normalize(text)):
            if allowed:
                ids += self._encoding.encode(piece, allowed_special=allowed, disallowed_special=())
            else:
                ids += self._encoding.encode_ordinary(piece)
        return ids

    def encode_batch(
        self,
        texts: Iterable[str],
        *,
        num_threads: int = 8,
        allowed_special: AllowedSpecial = frozenset(),
    ) -> list[list[int]]:
        """Returns `[encode(text) for text in texts]`, computed by `num_threads` threads."""
        encode = functools.partial(self.encode, allowed_special=allowed_special)
        with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(encode, texts))

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes of one id: of a control token its name, of a padding row nothing.

        Raises:
          UserError: the id is not in [0, vocab_size + 1024).
        """
        return next(self._bytes_of([token_id], skip_special_tokens=False))

    def decode(
        self,
        ids: Sequence[int] | np.ndarray,
        *,
        skip_special_tokens: bool = False,
        errors: str = "replace",
    ) -> str:
        """Returns the text of `ids`, a list or a one-dimensional integer array.

        Padding rows of the embedding, ids from `vocab_size` up to 1,024 further, decode to
        nothing: an untrained model samples them, and that must not end a run.

        Args:
          ids: token ids.
          skip_special_tokens: leave out control tokens (not those that a Hugging Face folder
            marks as ordinary text, such as <think> of Qwen3).
          errors: what to do with bytes that are not UTF-8, as in `bytes.decode`.

        Raises:
          UserError: an id outside [0, vocab_size + 1024), for example a label mask of -100, or an
            id of another vocabulary.
        """
        pieces = self._bytes_of(ids, skip_special_tokens=skip_special_tokens)
        return b"".join(pieces).decode("utf-8", errors)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the ranks as a tiktoken file, which `load_tokenizer` reads, atomically.

        The format has no place for `added_tokens`.
        """
        write_tiktoken(self.ranks, path)

    def _check_allowed(self, allowed: AllowedSpecial) -> set[str]:
        if allowed == "all":
            return set(self.special_tokens)
        allowed = {allowed} if isinstance(allowed, str) else set(allowed)
        for name in sorted(allowed - self.special_tokens.keys()):
            raise UserError(
                f"allowed_special names {name!r}, which is no control token"
                f"{nearest(name, self.special_tokens)}: give names such as {IM_START!r}, or 'all'."
            )
        return allowed

    def _bytes_of(
        self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool
    ) -> Iterator[bytes]:
        array = np.asarray(ids)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise UserError(
                f"Ids must be a flat list of integers, not an array of shape {array.shape} and "
                f"dtype {array.dtype}: decode one sequence at a time."
            )
        table = self._id_bytes_without_special if skip_special_tokens else self._id_bytes
        outside = array[(array < 0) | (array >= len(table))]
        if outside.size:
            raise UserError(
                f"Id {outside[0]} is outside this vocabulary of {self.vocab_size:,} tokens: it is "
                "a mask or padding value, or comes from a model with another vocabulary."
            )
        return map(table.__getitem__, array.tolist())


class IncrementalDecoder:
    """Decodes a stream of ids as they are sampled, never showing half a character.

    For any ids, the strings that `push` returned and the one of `flush`, joined, are exactly
    `tokenizer.decode(ids)`. Bytes of an unfinished character are held back (at most three).
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False, errors: str = "replace"
    ):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, token_id: int) -> str:
        """Returns the text that `token_id` completes, perhaps nothing.

        Raises:
          UserError: as `Tokenizer.decode`; the decoder's state is unchanged then.
        """
        (piece,) = self._tokenizer._bytes_of([token_id], skip_special_tokens=self._skip)
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """Ends the stream: returns what is held back; the decoder can then start another."""
        try:
            return self._utf8.decode(b"", final=True)
        finally:
            self._utf8.reset()


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Loads the tokenizer of a file or a folder; see `vocabulary.read_vocabulary`.

    Raises:
      UserError: there is no vocabulary at `path`.
    """
    vocabulary = read_vocabulary(path)
    return Tokenizer(vocabulary.ranks, vocabulary.added_tokens)
