"""Packing of documents into shuffled, tokenised, fixed-length training windows (report §2.1).

As in the report, documents are shuffled and merged, then cut to the context length. Documents are
ordered by a hash of (seed, document id), so the result does not depend on the order of the input;
each is followed by `<|endoftext|>`; and the stream is cut into windows of `seq_len + 1` tokens that
overlap by one, so that each token of the stream is predicted exactly once. No loss is computed on
the first token of a document, whose context is another document (the last token of a document *is*
trained to predict `<|endoftext|>`), nor on the padding of the last window.

Three stages keep memory bounded and make an interruption cost only minutes:

1. *Census*: one pass over the documents counts bytes and computes a digest that identifies them.
2. *Runs*: documents are read `run_bytes` of text at a time, tokenised, sorted by key and written to
  `<out>.partial/run-XXXXX.*`. A completed run is reused after an interruption.
3. *Merge*: the sorted runs are merged in key order and windows are written to shards in
  `<out>.partial/final`, which is renamed to `<out>` when complete.

Memory: about 6 · `run_bytes` for the current run, plus about 60 bytes per document of the corpus
for the global order. (The merge maps the runs into memory; those pages are clean, so the system can
reclaim them.) Disk: 4 bytes per token beside the output until the rename.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from absl import logging
from array_record.python import array_record_module

from qwen_jax.corpus.documents import Document
from qwen_jax.corpus.records import (
    FORMAT,
    MANIFEST,
    Manifest,
    Shard,
    check_shards,
    cut_windows,
    differences,
    encode_window,
    read_manifest,
    write_manifest,
)
from qwen_jax.errors import UserError
from qwen_jax.progress import Progress

# UTF-8 bytes per call of the tokenizer; bounds the number of Python integers in memory.
_ENCODE_BYTES = 1 << 20
_KEY = np.dtype([("high", "<u8"), ("low", "<u8")])


class PackTokenizer(Protocol):
    """Interface of the tokenizers that packing accepts, such as `qwen_jax.tokenizer.Tokenizer`."""

    @property
    def eod_id(self) -> int:
        """Id of the end-of-document token."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    def sha256(self) -> str:
        """Hash of the vocabulary, hexadecimal."""

    @property
    def token_lengths(self) -> np.ndarray:
        """UTF-8 bytes of each token id, int [vocab_size]."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Returns the token ids of each text, with special tokens encoded as plain text."""


@dataclasses.dataclass(frozen=True)
class PackConfig:
    """Parameters of packing.

    Attributes:
      seq_len: targets per window T.
      seed: seed of the document order.
      shards: number of output files; fewer if there are fewer windows.
      run_bytes: UTF-8 bytes of text that are tokenised and sorted in memory at a time; does not
        affect the result.

    Raises:
      UserError: a number is out of range.
    """

    seq_len: int
    seed: int = 0
    shards: int = 1
    run_bytes: int = 1 << 26

    def __post_init__(self):
        for name in ("seq_len", "shards", "run_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1.")


@dataclasses.dataclass(frozen=True)
class _Census:
    """Size and identity of a set of documents.

    Attributes:
      documents: number of documents.
      text_bytes: UTF-8 bytes of all texts.
      digest: order-independent hash of the set, hexadecimal.
    """

    documents: int
    text_bytes: int
    digest: str


@dataclasses.dataclass(frozen=True)
class _SortedRun:
    """Tokenised documents of one run, in key order; n is their number.

    Attributes:
      keys: sort key of each document, `_KEY` [n].
      lengths: tokens of each document, uint64 [n].
      tokens: tokens of all documents, concatenated, uint32.
      ids: id of each document.
    """

    keys: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray
    ids: list[str]


def pack(
    documents: Iterable[Document],
    out: str | os.PathLike,
    tokenizer: PackTokenizer,
    config: PackConfig,
) -> Manifest:
    """Packs `documents` into windows at `out`; does nothing if they are already packed there.

    Args:
      documents: documents with unique ids, iterable several times (a sequence or a `JsonLines`).
      out: folder to create. If it contains the windows of the same documents, tokenizer, seq_len,
        seed and shards, nothing is done.
      tokenizer: encodes text without parsing special tokens.
      config: parameters of packing.

    Returns:
      The manifest, as in `out/manifest.json`.

    Raises:
      UserError: there are no documents or no tokens; an id occurs twice; a text encodes to the
        end-of-document token; `out` contains something else; or another process is packing into
        `out`.
    """
    if iter(documents) is documents:
        raise TypeError("documents can be iterated only once; pass a list or a JsonLines.")
    out = pathlib.Path(out)
    census = _take_census(documents)
    if census.documents == 0:
        raise UserError(f"There are no documents to pack into {out}; check the corpus and split.")
    wanted = _fingerprint(census, tokenizer, config)
    partial = out.with_name(out.name + ".partial")
    if (done := _existing_output(out, wanted)) is not None:
        if partial.is_dir():  # An earlier run was killed between rename and clean-up.
            with _lock(partial / "lock", out):
                shutil.rmtree(partial)
        return done
    partial.mkdir(parents=True, exist_ok=True)
    with _lock(partial / "lock", out):
        _discard_other_packing(partial, wanted)
        empty = _write_runs(documents, census, partial, tokenizer, config)
        manifest = _merge(partial, wanted, empty, tokenizer, config)
        _publish(partial, out, manifest)
    logging.info(
        "Packed %d documents (%.1f MB, %d tokens) into %d windows of %d at %s.",
        manifest.documents,
        manifest.text_bytes / 1e6,
        manifest.tokens,
        manifest.windows,
        manifest.seq_len,
        out,
    )
    return manifest


def _document_hash(document: Document) -> int:
    """Returns a 128-bit hash of a document's id and text."""
    payload = f"{len(document.id)}:{document.id}:{document.text}".encode()
    return int.from_bytes(hashlib.blake2b(payload, digest_size=16).digest(), "big")


def _take_census(documents: Iterable[Document]) -> _Census:
    """Counts the documents and computes their digest.

    Hashes are added modulo 2^128, so the digest identifies the set of documents, not their order.
    """
    count = total = digest = 0
    progress = Progress("Reading", None, "B")
    for document in documents:
        count += 1
        size = len(document.text.encode())
        total += size
        progress.add(size)
        digest = (digest + _document_hash(document)) % 2**128
    return _Census(count, total, f"{digest:032x}")


def _fingerprint(census: _Census, tokenizer: PackTokenizer, config: PackConfig) -> dict[str, Any]:
    """Returns everything that determines the result of packing, in JSON types."""
    return {
        "format": FORMAT,
        "seq_len": config.seq_len,
        "seed": config.seed,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "documents_digest": census.digest,
        "text_bytes": census.text_bytes,
        "shards": config.shards,
    }


def _existing_output(out: pathlib.Path, wanted: dict[str, Any]) -> Manifest | None:
    """Returns the manifest at `out` if it is complete and has the wanted fingerprint.

    None if `out` does not exist or is empty.

    Raises:
      UserError: `out` contains something else.
    """
    if not out.exists():
        return None
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST).is_file()):
        raise UserError(f"{out} exists and is not a packed data folder; choose another output.")
    if not (out / MANIFEST).is_file():
        return None
    manifest = read_manifest(out)
    shards = min(wanted["shards"], manifest.windows)
    found = manifest.content() | {"shards": len(manifest.shards)}
    different = differences(found, wanted | {"shards": shards})
    if different:
        raise UserError(
            f"{out} already contains other data: {different}; choose another output or delete it."
        )
    check_shards(out, manifest, deep=True)
    logging.info("%s already contains exactly this data; nothing to do.", out)
    return manifest


@contextlib.contextmanager
def _lock(path: pathlib.Path, out: pathlib.Path) -> Iterator[None]:
    """Context manager that holds an exclusive advisory lock, which ends with the process.

    Args:
      path: the lock file.
      out: output folder, for the error message.

    Raises:
      UserError: another process holds the lock.
    """
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"Another process is packing into {out}; wait for it or choose another output."
            ) from None
        yield


def _discard_other_packing(partial: pathlib.Path, wanted: dict[str, Any]) -> None:
    """Deletes from `partial` what an interrupted packing with another fingerprint left there."""
    path = partial / "fingerprint.json"
    text = json.dumps(wanted)
    if path.is_file() and path.read_text("utf-8") == text:
        return
    for old in partial.iterdir():
        if old.name != "lock":
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    _write_atomic(path, text.encode())


def _write_atomic(path: pathlib.Path, data: bytes) -> None:
    """Writes a file through a temporary file, synchronised to disk."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _sync_folder(folder: pathlib.Path) -> None:
    """Synchronises the entries of a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _batches_of_bytes(documents: Iterable[Document], limit: int) -> Iterator[list[Document]]:
    """Yields lists of consecutive documents of about `limit` UTF-8 bytes, at least one each."""
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document.text.encode())
        if size >= limit:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _write_runs(
    documents: Iterable[Document],
    census: _Census,
    partial: pathlib.Path,
    tokenizer: PackTokenizer,
    config: PackConfig,
) -> int:
    """Writes the runs that are missing and returns the number of documents without a token.

    Args:
      documents: all documents.
      census: their size, for the progress log.
      partial: folder of the runs.
      tokenizer: tokenizer of the windows.
      config: parameters of packing.

    Raises:
      UserError: as `_tokenise_and_sort`.
    """
    progress = Progress("Tokenising", census.text_bytes, "B")
    empty = number = 0
    for number, chunk in enumerate(_batches_of_bytes(documents, config.run_bytes)):
        wanted = f"{sum(map(_document_hash, chunk)) % 2**128:032x}"
        # The index is written last and has the chunk's digest, so it marks a complete run.
        index = partial / f"run-{number:05d}.json"
        known = json.loads(index.read_text("utf-8")) if index.is_file() else {}
        if known.get("digest") == wanted:
            progress.skip(sum(len(document.text.encode()) for document in chunk))
        else:
            run = _tokenise_and_sort(chunk, tokenizer, config.seed, progress)
            index.unlink(missing_ok=True)
            for name in ("keys", "lengths", "tokens"):
                with open(partial / f"run-{number:05d}.{name}.npy", "wb") as file:
                    np.save(file, getattr(run, name))
                    file.flush()
                    os.fsync(file.fileno())
            known = {"digest": wanted, "empty": len(chunk) - len(run.ids), "ids": run.ids}
            _write_atomic(index, json.dumps(known).encode())
        empty += known["empty"]
    # Runs beyond the last belong to an interrupted packing with a smaller run_bytes.
    for index in partial.glob("run-*.json"):
        if int(index.stem.removeprefix("run-")) > number:
            index.unlink()
    return empty


def _tokenise_and_sort(
    chunk: list[Document], tokenizer: PackTokenizer, seed: int, progress: Progress
) -> _SortedRun:
    """Tokenises a chunk of documents and sorts it by key.

    Raises:
      UserError: a document encodes to the end-of-document token.
    """
    ids, arrays = [], []
    for batch in _batches_of_bytes(chunk, _ENCODE_BYTES):
        encoded = tokenizer.encode_batch([document.text for document in batch])
        for document, tokens in zip(batch, encoded, strict=True):
            array = np.asarray(tokens, "<u4")
            if (array == tokenizer.eod_id).any():
                raise UserError(
                    f"Document {document.id!r} encodes to the end-of-document token "
                    f"{tokenizer.eod_id}; use a tokenizer that does not parse special tokens."
                )
            if array.size:
                ids.append(document.id)
                arrays.append(array)
        progress.add(sum(len(document.text.encode()) for document in batch))
    keys = np.frombuffer(
        b"".join(
            hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest() for name in ids
        ),
        _KEY,
    )
    order = np.lexsort((keys["low"], keys["high"]))
    return _SortedRun(
        keys=keys[order],
        lengths=np.array([array.size for array in arrays], "<u8")[order],
        tokens=np.concatenate([arrays[i] for i in order]) if arrays else np.zeros(0, "<u4"),
        ids=[ids[i] for i in order],
    )


def _merge(
    partial: pathlib.Path,
    wanted: dict[str, Any],
    empty: int,
    tokenizer: PackTokenizer,
    config: PackConfig,
) -> Manifest:
    """Merges the sorted runs and writes their windows to shards in `partial/final`.

    Args:
      partial: folder of the runs.
      wanted: fingerprint of this packing.
      empty: number of documents without a token.
      tokenizer: tokenizer of the windows.
      config: parameters of packing.

    Returns:
      The manifest; not written yet.

    Raises:
      UserError: there are no tokens, or an id occurs twice.
    """
    final = partial / "final"
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir()
    stems = sorted(index.with_suffix("") for index in partial.glob("run-*.json"))
    keys = np.concatenate([np.load(f"{stem}.keys.npy") for stem in stems])
    lengths = [np.load(f"{stem}.lengths.npy") for stem in stems]
    run_of = np.repeat(np.arange(len(stems)), [len(part) for part in lengths])
    order = np.lexsort((keys["low"], keys["high"]))
    _check_unique(keys, order, stems)
    if not order.size:
        raise UserError("The documents have no tokens: all texts are empty.")
    total = int(sum(int(part.sum()) for part in lengths)) + len(order)
    windows = max(1, -(-(total - 1) // config.seq_len))

    def documents_in_order() -> Iterator[np.ndarray]:
        """Yields the tokens of all documents in key order."""
        tokens = [np.load(f"{stem}.tokens.npy", mmap_mode="r") for stem in stems]
        ends = [np.concatenate([[0], np.cumsum(part)]).astype(np.int64) for part in lengths]
        next_in_run = [0] * len(stems)
        for run in run_of[order]:
            at = next_in_run[run]
            next_in_run[run] += 1
            yield np.asarray(tokens[run][ends[run][at] : ends[run][at + 1]])

    stream = cut_windows(documents_in_order(), config.seq_len, tokenizer.eod_id)
    shards, target_tokens, target_bytes = _write_shards(
        stream, windows, final, config.shards, tokenizer.token_lengths
    )
    return Manifest(
        format=FORMAT,
        seq_len=config.seq_len,
        seed=config.seed,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        documents=len(order),
        empty_documents=empty,
        text_bytes=wanted["text_bytes"],
        documents_digest=wanted["documents_digest"],
        tokens=total,
        target_tokens=target_tokens,
        target_bytes=target_bytes,
        windows=windows,
        shards=shards,
    )


def _publish(partial: pathlib.Path, out: pathlib.Path, manifest: Manifest) -> None:
    """Completes `partial/final`, renames it to `out`, and deletes `partial`."""
    write_manifest(partial / "final", manifest)
    _sync_folder(partial / "final")
    if out.is_dir():
        out.rmdir()  # Empty, as checked before; fails if it was filled in the meantime.
    os.replace(partial / "final", out)
    _sync_folder(out.parent)
    shutil.rmtree(partial)


def _check_unique(keys: np.ndarray, order: np.ndarray, stems: list[pathlib.Path]) -> None:
    """Checks that no document id occurs twice; equal ids have equal keys.

    Args:
      keys: keys of all documents, run after run, `_KEY` [n].
      order: permutation that sorts `keys`.
      stems: paths of the runs, without suffix.

    Raises:
      UserError: two documents have the same id.
    """
    ordered = keys[order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    if not same.size:
        return
    position = int(order[same[0]])
    for stem in stems:
        ids = json.loads(stem.with_suffix(".json").read_text("utf-8"))["ids"]
        if position < len(ids):
            raise UserError(
                f"The document id {ids[position]!r} occurs more than once; ids must be unique."
            )
        position -= len(ids)
    raise AssertionError("a key belongs to no run")


def _write_shards(
    stream: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]],
    windows: int,
    final: pathlib.Path,
    shards: int,
    token_lengths: np.ndarray,
) -> tuple[tuple[Shard, ...], int, int]:
    """Writes `windows` records into shards of nearly equal size.

    Args:
      stream: token ids, segment ids and loss mask of each window, as `cut_windows` yields them.
      windows: number of windows in `stream`.
      final: folder of the shards.
      shards: number of files; fewer if there are fewer windows.
      token_lengths: UTF-8 bytes of each token id, int [vocab_size].

    Returns:
      The shards, and the number and UTF-8 bytes of the targets that carry loss.
    """
    shards = min(shards, windows)
    progress = Progress("Writing windows", windows, "windows")
    written, target_tokens, target_bytes = [], 0, 0
    for number in range(shards):
        count = (number + 1) * windows // shards - number * windows // shards
        path = final / f"windows-{number:05d}-of-{shards:05d}.array_record"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for _ in range(count):
            tokens, segment_ids, mask = next(stream)
            n_bytes = int(token_lengths[tokens[1:][mask.astype(bool)]].sum())
            target_tokens += int(mask.sum())
            target_bytes += n_bytes
            writer.write(encode_window(tokens, segment_ids, mask, n_bytes))
            progress.add(1)
        writer.close()
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        written.append(Shard(path.name, count, path.stat().st_size, sha256))
    assert next(stream, None) is None, "more windows than the lengths promised"
    return tuple(written), target_tokens, target_bytes
