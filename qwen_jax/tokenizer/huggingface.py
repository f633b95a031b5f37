"""Reads byte-level BPE from Hugging Face files: `tokenizer.json`, or `vocab.json` + `merges.txt`.

Qwen1.5, Qwen2, Qwen2.5 and Qwen3 store the ranks of `qwen.tiktoken` in this form: the id of a token
is its rank, and its bytes are written in GPT-2's printable alphabet. tiktoken merges by rank alone,
so the list of merges is redundant; it is only checked for consistency with the ranks.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.tokenizer.pretokenize import PATTERN


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """Control token that a Hugging Face tokenizer file adds to the BPE vocabulary.

    Attributes:
      id: its token id.
      text: its text, such as "<|im_start|>".
      special: whether decoding with `skip_special_tokens` leaves it out.
    """

    id: int
    text: str
    special: bool = True


def _printable_bytes() -> list[int]:
    """Returns the 188 bytes that GPT-2's alphabet writes as the character of the same code."""
    return [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]


def byte_order() -> list[int]:
    """Returns the 256 bytes in the order of their ranks in GPT-2, cl100k_base and Qwen."""
    printable = _printable_bytes()
    return printable + [byte for byte in range(256) if byte not in set(printable)]


def byte_alphabet() -> dict[str, int]:
    """Returns GPT-2's alphabet, character → byte; other bytes are written U+0100, U+0101, ..."""
    order = byte_order()
    shown = len(_printable_bytes())
    return {chr(byte if i < shown else 256 + i - shown): byte for i, byte in enumerate(order)}


def read_ranks(path: pathlib.Path) -> tuple[dict[int, bytes], tuple[AddedToken, ...]]:
    """Reads ranks and control tokens from Hugging Face tokenizer files.

    Args:
      path: a `vocab.json`, read together with `merges.txt` and, if there is one,
        `tokenizer_config.json` in the same folder; or a file in the format of `tokenizer.json`.

    Returns:
      (rank → bytes of the token, control tokens that the files define).

    Raises:
      UserError: a file is missing or not JSON, the model is not byte-level BPE, merges are in
        another order than the ids, or the pattern splits text differently from Qwen's.
    """
    document = _load_json(path)
    try:
        if path.name == "vocab.json":
            vocab, merges = document, _read_merges(path.with_name("merges.txt"))
            added = _read_added_tokens(path.with_name("tokenizer_config.json"))
        else:
            vocab, merges = _bpe_model(document, path)
            _check_pattern(document, path)
            added = _parse_added_tokens(document.get("added_tokens", []))
        names = {token.text for token in added}
        by_id = _token_bytes({text: i for text, i in vocab.items() if text not in names}, path)
        _check_merges(by_id, merges, path)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} does not have the format of a Hugging Face tokenizer ({type(error).__name__}: "
            f"{error}): fetch the file of a Qwen model again."
        ) from None
    return by_id, added


def _load_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
      UserError: the file is not JSON or contains no object.
    """
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise UserError(
            f"{path} is not JSON: it is damaged, truncated, or a Git LFS pointer; fetch it again."
        ) from None
    if not isinstance(document, dict):
        raise UserError(f"{path} is a JSON {type(document).__name__}: an object was expected.")
    return document


def _bpe_model(document: dict[str, Any], path: pathlib.Path) -> tuple[dict[str, Any], list[Any]]:
    """Returns the vocabulary (token text → id) and the merges of a `tokenizer.json` object.

    Args:
      document: the JSON object.
      path: its file, for messages.

    Raises:
      UserError: the model is not byte-level BPE.
    """
    model = document.get("model")
    if not isinstance(model, dict):
        model = {}
    kind = model.get("type")
    vocab = model.get("vocab") if kind == "BPE" else None
    merges = model.get("merges") if kind == "BPE" else None
    if not isinstance(vocab, dict) or not isinstance(merges, list) or model.get("byte_fallback"):
        raise UserError(
            f"{path} describes a model of type {kind!r}: only byte-level BPE with a vocabulary "
            "and merges, as in Qwen1.5 to Qwen3, can be read."
        )
    return vocab, merges


def _check_pattern(document: dict[str, Any], path: pathlib.Path) -> None:
    """Checks that a `tokenizer.json` object splits text with Qwen's pattern.

    Args:
      document: the JSON object.
      path: its file, for messages.

    Raises:
      UserError: it has another pattern.
    """
    parts = document.get("pre_tokenizer") or {}
    parts = parts.get("pretokenizers", [parts])
    patterns = [part["pattern"].get("Regex") for part in parts if "pattern" in part]
    if patterns != [PATTERN]:
        raise UserError(
            f"{path} splits text by {patterns}: only the pattern of Qwen (cl100k_base with single "
            "digits) can be used, so take the tokenizer of a Qwen model."
        )


def _read_merges(path: pathlib.Path) -> list[str]:
    """Returns the lines of a `merges.txt` without the version line; each is "left right".

    Raises:
      UserError: the file does not exist.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing: vocab.json is read together with merges.txt.")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [
        line
        for i, line in enumerate(lines)
        if line and not (i == 0 and line.startswith("#version"))
    ]


def _read_added_tokens(path: pathlib.Path) -> tuple[AddedToken, ...]:
    """Returns the control tokens of a `tokenizer_config.json`, none if the file does not exist."""
    if not path.is_file():
        return ()
    by_id = _load_json(path).get("added_tokens_decoder", {})
    return _parse_added_tokens(
        [{**entry, "id": int(i)} for i, entry in by_id.items() if i.isdigit()]
    )


def _parse_added_tokens(entries: list[dict[str, Any]]) -> tuple[AddedToken, ...]:
    """Converts JSON entries {id, content, special} into control tokens, sorted by id."""
    tokens = [AddedToken(entry["id"], entry["content"], entry["special"]) for entry in entries]
    return tuple(sorted(tokens, key=lambda token: token.id))


def _token_bytes(vocab: dict[str, Any], path: pathlib.Path) -> dict[int, bytes]:
    """Converts a vocabulary from token text → id into id → token bytes.

    Args:
      vocab: the text is in GPT-2's alphabet.
      path: its file, for messages.

    Raises:
      UserError: an id is not an integer or is used twice, or a character is not in the alphabet.
    """
    alphabet = byte_alphabet()
    by_id: dict[int, bytes] = {}
    for text, i in vocab.items():
        if not isinstance(i, int) or i in by_id:
            raise UserError(f"{path} gives token {text!r} the id {i!r}: ids must differ.")
        try:
            by_id[i] = bytes([alphabet[character] for character in text])
        except KeyError as error:
            raise UserError(
                f"{path}: token {text!r} has the character {error.args[0]!r}, which is not in the "
                "alphabet of byte-level BPE, so this is not a Qwen vocabulary."
            ) from None
    return by_id


def _check_merges(by_id: dict[int, bytes], merges: list[Any], path: pathlib.Path) -> None:
    """Checks that the i-th merge produces the i-th token of more than one byte.

    Args:
      by_id: id → token bytes.
      merges: "left right" or [left, right] in GPT-2's alphabet, in order.
      path: their file, for messages.

    Raises:
      UserError: the number of merges or one of their results differs.
    """
    alphabet = byte_alphabet()
    made = [token for _, token in sorted(by_id.items()) if len(token) > 1]
    if len(made) != len(merges):
        raise UserError(
            f"{path} has {len(made):,} tokens of several bytes but {len(merges):,} merges: "
            "the two must agree; fetch the files again."
        )
    for number, (merge, token) in enumerate(zip(merges, made, strict=True), start=1):
        text = merge if isinstance(merge, str) else " ".join(merge)
        if bytes(alphabet.get(c, 0) for c in text.replace(" ", "", 1)) != token:
            raise UserError(
                f"{path}: merge {number}, {text!r}, does not produce {token!r}, the token of that "
                "rank: only vocabularies whose ids follow the merges, as Qwen's do, can be read."
            )
