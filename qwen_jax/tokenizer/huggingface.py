"""Byte-level BPE in Hugging Face dress: `tokenizer.json`, or `vocab.json` with `merges.txt`.

Qwen1.5, Qwen2, Qwen2.5 and Qwen3 carry the ranks of `qwen.tiktoken` this way: the id of a token is
its rank, and its bytes are spelt in GPT-2's printable alphabet. tiktoken merges by rank alone,
so the list of merges adds nothing; it is read only to prove that it says the same.
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
    """A control token: its id, how it is written, and whether `skip_special_tokens` drops it."""

    id: int
    text: str
    special: bool = True


def _printable_bytes() -> list[int]:
    """Returns the bytes that GPT-2's alphabet shows as themselves (188 of them)."""
    return [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]


def byte_order() -> list[int]:
    """Returns the 256 bytes in the order of their ranks in GPT-2, cl100k_base and Qwen."""
    printable = _printable_bytes()
    return printable + [byte for byte in range(256) if byte not in set(printable)]


def byte_alphabet() -> dict[str, int]:
    """Returns GPT-2's character -> byte: unprintable bytes are written U+0100, U+0101, ..."""
    order = byte_order()
    shown = len(_printable_bytes())
    return {chr(byte if i < shown else 256 + i - shown): byte for i, byte in enumerate(order)}


def read(path: pathlib.Path) -> tuple[dict[int, bytes], tuple[AddedToken, ...]]:
    """Reads `tokenizer.json` (any name but `vocab.json`), or `vocab.json` and its neighbours.

    Returns:
      rank -> token bytes, and the control tokens named in the file (or, beside `vocab.json`, in
      `tokenizer_config.json`).

    Raises:
      UserError: not JSON, not byte-level BPE, merges missing or in another order than the ids, or
        a pattern that splits text differently from Qwen.
    """
    document = _load_json(path)
    try:
        if path.name == "vocab.json":
            vocab, merges = document, _read_merges(path.with_name("merges.txt"))
            added = _added_from_config(path.with_name("tokenizer_config.json"))
        else:
            vocab, merges = _model_of(document, path)
            _check_pattern(document, path)
            added = _parse_added(document.get("added_tokens", []))
        names = {token.text for token in added}
        by_id = _to_bytes({text: i for text, i in vocab.items() if text not in names}, path)
        _check_merges(by_id, merges, path)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not laid out as a Hugging Face tokenizer ({type(error).__name__}: "
            f"{error}): fetch the file of a Qwen model again."
        ) from None
    return by_id, added


def _load_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise UserError(
            f"{path} is not JSON: it is damaged, cut short, or a Git LFS pointer; fetch it again."
        ) from None
    if not isinstance(document, dict):
        raise UserError(f"{path} holds a {type(document).__name__}: a JSON object was expected.")
    return document


def _model_of(document: dict[str, Any], path: pathlib.Path) -> tuple[dict[str, Any], list[Any]]:
    model = document.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    vocab = model.get("vocab") if kind == "BPE" else None
    merges = model.get("merges") if kind == "BPE" else None
    if not isinstance(vocab, dict) or not isinstance(merges, list) or model.get("byte_fallback"):
        raise UserError(
            f"{path} describes a model of type {kind!r}: only byte-level BPE with a vocabulary "
            "and merges, as in Qwen1.5 to Qwen3, can be read."
        )
    return vocab, merges


def _check_pattern(document: dict[str, Any], path: pathlib.Path) -> None:
    """Refuses a tokenizer.json that would split the same text into other pre-tokens."""
    parts = document.get("pre_tokenizer") or {}
    parts = parts.get("pretokenizers", [parts])
    patterns = [part["pattern"].get("Regex") for part in parts if "pattern" in part]
    if patterns != [PATTERN]:
        raise UserError(
            f"{path} splits text by {patterns}: only the pattern of Qwen (cl100k_base with single "
            "digits) can be used, so take the tokenizer of a Qwen model."
        )


def _read_merges(path: pathlib.Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path} is missing: vocab.json is read together with merges.txt.")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [
        line
        for i, line in enumerate(lines)
        if line and not (i == 0 and line.startswith("#version"))
    ]


def _added_from_config(path: pathlib.Path) -> tuple[AddedToken, ...]:
    if not path.is_file():
        return ()
    named = _load_json(path).get("added_tokens_decoder", {})
    return _parse_added([{**entry, "id": int(i)} for i, entry in named.items() if i.isdigit()])


def _parse_added(entries: list[dict[str, Any]]) -> tuple[AddedToken, ...]:
    tokens = [AddedToken(entry["id"], entry["content"], entry["special"]) for entry in entries]
    return tuple(sorted(tokens, key=lambda token: token.id))


def _to_bytes(vocab: dict[str, Any], path: pathlib.Path) -> dict[int, bytes]:
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
    """Checks that the i-th merge makes the i-th token that is no single byte."""
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
                f"{path}: merge {number}, {text!r}, does not make {token!r}, the token of that "
                "place: only vocabularies whose ids follow the merges, as Qwen's do, can be read."
            )
