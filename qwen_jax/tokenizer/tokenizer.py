"""Qwen's tokenizer: byte-level BPE with control tokens, encoding, decoding, streaming decoding."""

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
CONTROL_TOKENS = (END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(205)))
"""Control tokens in the order of their ids, which follow the last rank (tokenization_qwen.py)."""

MAX_PADDING_ROWS = 1_024
"""Number of ids from `vocab_size` on that decode to nothing. Models pad the embedding to a round
number of rows (151,936 or 152,064 for 151,851 tokens), and untrained ones sample the padding."""

AllowedSpecial = Literal["all"] | Collection[str]
"""Control tokens to encode as such where they occur in text: all, or those with the given names."""


@dataclasses.dataclass(frozen=True, repr=False)
class Tokenizer:
    """Byte-level BPE tokenizer with 208 control tokens; immutable, thread-safe, picklable.

    Ids are, in this order: BPE tokens by rank, control tokens, padding rows of the embedding.

    Attributes:
      ranks: bytes of each BPE token; the index is its rank and its id.
      added_tokens: control tokens with other names than the default, as Hugging Face folders of
        Qwen1.5 to Qwen3 define them; empty for Qwen v1.

    Raises:
      UserError: the ranks are not a byte-level BPE vocabulary, or an added token has an id outside
        the range of control tokens.
    """

    ranks: tuple[bytes, ...]
    added_tokens: tuple[AddedToken, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple(self.ranks))
        check_ranks(dict(enumerate(self.ranks)), "the vocabulary")
        # Built here and not on first use, so that loading takes the time and raises the errors.
        _ = self._encoding

    def __repr__(self) -> str:
        return f"Tokenizer(n_ranks={self.n_ranks}, sha256={self.sha256[:12]}...)"

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.ranks, self.added_tokens)

    @property
    def n_ranks(self) -> int:
        """Number of BPE tokens, excluding control tokens; 151,643 for Qwen."""
        return len(self.ranks)

    @property
    def vocab_size(self) -> int:
        """Number of ids, BPE tokens and 208 control tokens; 151,851 for Qwen."""
        return self.n_ranks + len(CONTROL_TOKENS)

    @property
    def eod_id(self) -> int:
        """Id of <|endoftext|> (end of document), the separator of documents; also padding."""
        return self.n_ranks

    @property
    def im_start_id(self) -> int:
        """Id of <|im_start|>, the first token of a ChatML turn."""
        return self.n_ranks + 1

    @property
    def im_end_id(self) -> int:
        """Id of <|im_end|>, the last token of a ChatML turn."""
        return self.n_ranks + 2

    @functools.cached_property
    def special_tokens(self) -> Mapping[str, int]:
        """Read-only mapping from the name of each control token to its id, in order of the ids."""
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
            repeated = next(name for i, name in names.items() if by_name[name] != i)
            raise UserError(f"Control token {repeated!r} has two ids: each name must have one.")
        return types.MappingProxyType(by_name)

    @functools.cached_property
    def sha256(self) -> str:
        """SHA-256 (hex) of the ranks in canonical tiktoken form, which identifies the vocabulary.

        Checkpoints and shards record it. For Qwen it is the hash of the released file; added tokens
        do not affect it.
        """
        return canonical_sha256(self.ranks)

    @functools.cached_property
    def token_lengths(self) -> np.ndarray:
        """Number of bytes of each id, read-only int32 [vocab_size]; 0 for control tokens.

        Its sum over target ids is the denominator of bits per byte.
        """
        lengths = np.zeros(self.vocab_size, np.int32)
        lengths[: self.n_ranks] = [len(token) for token in self.ranks]
        lengths.setflags(write=False)
        return lengths

    @functools.cached_property
    def _encoding(self) -> tiktoken.Encoding:
        """The tiktoken encoder of the ranks and control tokens."""
        return tiktoken.Encoding(
            "qwen",
            pat_str=PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(self.ranks)},
            special_tokens=dict(self.special_tokens),
        )

    @functools.cached_property
    def _id_bytes(self) -> tuple[bytes, ...]:
        """Bytes of each id in [0, vocab_size + MAX_PADDING_ROWS); padding rows are empty."""
        control = (name.encode() for name in self.special_tokens)
        return (*self.ranks, *control, *itertools.repeat(b"", MAX_PADDING_ROWS))

    @functools.cached_property
    def _id_bytes_without_special(self) -> tuple[bytes, ...]:
        """Like `_id_bytes`, but control tokens are empty too, except added ones not `special`."""
        shown = {token.id: token.text.encode() for token in self.added_tokens if not token.special}
        rest = range(self.n_ranks, len(self._id_bytes))
        return (*self.ranks, *(shown.get(i, b"") for i in rest))

    def encode(self, text: str, *, allowed_special: AllowedSpecial = frozenset()) -> list[int]:
        """Returns the token ids of a string.

        The text is NFC-normalised first. The name of a control token in it is encoded as plain text
        unless allowed, so that documents and user input cannot inject control tokens; the released
        tokenizer allows all by default. Lone surrogates become U+FFFD. Runs of more than 65,536
        whitespace characters or 1,024 combining marks are split (see `pretokenize.py`).

        Args:
          text: any string.
          allowed_special: control tokens to encode as such: "all", or their names.

        Raises:
          UserError: `text` is not a string, or a name is not that of a control token.
        """
        if not isinstance(text, str):
            raise UserError(
                f"Only a string can be encoded, not {type(text).__name__}: {text!r:.60}."
            )
        allowed = self._resolve_allowed(allowed_special)
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
        """Returns the token ids of each text, as `encode` does, computed by several threads.

        Args:
          texts: strings.
          num_threads: number of threads; tiktoken releases the GIL.
          allowed_special: control tokens to encode as such: "all", or their names.
        """
        encode = functools.partial(self.encode, allowed_special=allowed_special)
        with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(encode, texts))

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes of one id: a control token's name in UTF-8, b"" for a padding row.

        Raises:
          UserError: the id is not in [0, vocab_size + 1024).
        """
        return next(self._pieces([token_id], skip_special_tokens=False))

    def decode(
        self,
        ids: Sequence[int] | np.ndarray,
        *,
        skip_special_tokens: bool = False,
        errors: str = "replace",
    ) -> str:
        """Returns the text of a sequence of token ids.

        Ids from `vocab_size` to `vocab_size` + 1023, padding rows of the embedding, decode to
        nothing: untrained models sample them, which must not stop a run.

        Args:
          ids: list or one-dimensional integer array.
          skip_special_tokens: whether to leave out control tokens, except those that a Hugging Face
            folder marks as not special, such as Qwen3's <think>.
          errors: handling of bytes that are not valid UTF-8, as in `bytes.decode`.

        Raises:
          UserError: an id is outside [0, vocab_size + 1024), such as a label mask of -100 or an id
            of another vocabulary.
        """
        pieces = self._pieces(ids, skip_special_tokens=skip_special_tokens)
        return b"".join(pieces).decode("utf-8", errors)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the ranks to a tiktoken file, atomically; `load_tokenizer` reads it.

        `added_tokens` are not saved: the format cannot store them.

        Raises:
          UserError: the folder does not exist.
        """
        write_tiktoken(self.ranks, path)

    def _resolve_allowed(self, allowed: AllowedSpecial) -> set[str]:
        """Returns the names of the allowed control tokens as a set.

        Raises:
          UserError: a name is not that of a control token.
        """
        if allowed == "all":
            return set(self.special_tokens)
        allowed = {allowed} if isinstance(allowed, str) else set(allowed)
        for name in sorted(allowed - self.special_tokens.keys()):
            raise UserError(
                f"allowed_special contains {name!r}, which is not a control token"
                f"{nearest(name, self.special_tokens)}: give names such as {IM_START!r}, or 'all'."
            )
        return allowed

    def _pieces(
        self, ids: Sequence[int] | np.ndarray, *, skip_special_tokens: bool
    ) -> Iterator[bytes]:
        """Yields the bytes of each id in turn; see `decode` for arguments and errors."""
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
    """Streaming decoder that returns text as token ids arrive, in complete characters only.

    For any ids, the results of `push` and the final `flush` concatenate to `tokenizer.decode(ids)`.
    At most three bytes, of an incomplete UTF-8 character, are buffered.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = False, errors: str = "replace"
    ):
        """Creates a decoder for one stream; the options are those of `Tokenizer.decode`."""
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, token_id: int) -> str:
        """Appends one id to the stream and returns the characters it completes, possibly none.

        Raises:
          UserError: the id is invalid (see `Tokenizer.decode`); the state is then unchanged.
        """
        (piece,) = self._tokenizer._pieces([token_id], skip_special_tokens=self._skip)
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """Ends the stream and returns the text of buffered bytes; resets the decoder for reuse."""
        try:
            return self._utf8.decode(b"", final=True)
        finally:
            self._utf8.reset()


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Loads the tokenizer in a file or a folder; `vocabulary.read_vocabulary` has the formats.

    Raises:
      UserError: there is no valid vocabulary at `path`.
    """
    vocabulary = read_vocabulary(path)
    return Tokenizer(vocabulary.ranks, vocabulary.added_tokens)
