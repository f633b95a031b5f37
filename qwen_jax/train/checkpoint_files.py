"""Files of a checkpoint folder: names, metadata, checks for damage, deletion.

Nothing here reads arrays or uses Orbax: `checkpoint.py` does, and documents the layout.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from qwen_jax.errors import UserError
from qwen_jax.parallel.distributed import all_gather_text, on_first_process

FORMAT = 1
_STEP = re.compile(r"step_(\d{8,})$")
_LEFTOVER = re.compile(r"step_\d{8,}\.(orbax-checkpoint-tmp.*|deleting)$")
_DAMAGED = re.compile(r"step_\d{8,}\.damaged(-\d+)?$")
_MARKER = "commit_success.txt"


class DamagedCheckpoint(Exception):
    """Error of a checkpoint that cannot be read; the message names the part at fault."""


def jsonable(tree: Any) -> Any:
    """Converts nested containers to what JSON gives back: lists for tuples, plain numbers.

    Non-finite floats become strings.

    Raises:
      TypeError: a value has no JSON form.
    """
    if isinstance(tree, Mapping):
        return {str(key): jsonable(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [jsonable(value) for value in tree]
    if isinstance(tree, (np.generic, np.ndarray, jax.Array)):
        return jsonable(np.asarray(tree).tolist())
    if isinstance(tree, float) and not math.isfinite(tree):
        return str(tree)
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"{tree!r} of type {type(tree).__name__} cannot be stored as JSON.")


def digest(facts: Mapping) -> str:
    """Returns the SHA-256, in hex, of the JSON of `facts` without its entry "digest"."""
    text = json.dumps({k: v for k, v in facts.items() if k != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_facts(path: epath.Path) -> dict:
    """Reads what `Checkpoints.save` stored beside the arrays of the checkpoint at `path`.

    Returns:
      format, step, identity (the run's fingerprint), info, leaves and digest, by these names.

    Raises:
      DamagedCheckpoint: the metadata cannot be read or differs from its digest.
      UserError: another program, or another version of the format, wrote it.
    """
    try:
        text = (path / "_CHECKPOINT_METADATA").read_text()
        metadata = json.loads(text)
        facts = metadata["custom_metadata"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"_CHECKPOINT_METADATA cannot be read: {error}") from error
    if not isinstance(facts, dict) or "qwen_jax" not in facts:
        raise UserError(
            f"{path} is an Orbax checkpoint of another program: use another directory, or move it."
        )
    facts = facts["qwen_jax"]
    if not isinstance(facts, dict) or facts.get("digest") != digest(facts):
        raise DamagedCheckpoint("the digest of _CHECKPOINT_METADATA is wrong")
    if facts["format"] != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {facts['format']}, this version reads {FORMAT}: "
            "use the version that wrote it."
        )
    return facts


def check_metadata(path: epath.Path) -> None:
    """Checks that Orbax's own metadata files exist and are JSON.

    Raises:
      OSError: a file is missing.
      ValueError: a file is not JSON.
    """
    for name in ("_CHECKPOINT_METADATA", "state/_METADATA"):
        json.loads((path / name).read_text())


def check_files(path: epath.Path) -> None:
    """Checks that all files of a checkpoint exist with the sizes they were written with.

    Raises:
      DamagedCheckpoint: names the first file that is missing or has another size.
    """
    if not (path / _MARKER).exists():
        raise DamagedCheckpoint(f"{_MARKER} is missing")
    manifest = path / "files.json"
    if not manifest.exists():
        return  # killed between commit and manifest: complete, and the arrays have checksums
    try:
        sizes = json.loads(manifest.read_text()).items()
    except (ValueError, AttributeError) as error:
        raise DamagedCheckpoint(f"files.json cannot be read: {error}") from error
    for name, size in sizes:
        if not (path / name).exists():
            raise DamagedCheckpoint(f"{name} is missing")
        if (found := (path / name).stat().length) != size:
            raise DamagedCheckpoint(f"{name} has {found} bytes, was written with {size}")


def check_fingerprint(path: epath.Path, saved: dict, now: dict) -> None:
    """Checks that a checkpoint is of this run.

    Args:
      path: the checkpoint, for the message.
      saved: fingerprint stored with the checkpoint.
      now: fingerprint of this run.

    Raises:
      UserError: names the first field in which the fingerprints differ.
    """
    saved, now = dict(_fields(saved)), dict(_fields(now))
    names = [*now, *(name for name in saved if name not in now)]
    different = [n for n in names if n not in saved or n not in now or saved[n] != now[n]]
    if not different:
        return
    first, more = different[0], len(different) - 1
    was, is_now = (repr(side[first]) if first in side else "nothing" for side in (saved, now))
    others = f" ({more} more: {', '.join(different[1:4])})" if more else ""
    raise UserError(
        f"Checkpoint {path} was written with {first} = {was}, this run has {is_now}{others}: go "
        "back to the first value, or use another checkpoint directory for a new run."
    )


def _fields(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields pairs like ("model.num_layers", 24) for every value of a nested mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_leaves(path: epath.Path, saved: dict, wanted: dict, subtree: str) -> None:
    """Checks that a checkpoint has exactly the arrays to be read, with their shapes and dtypes.

    Args:
      path: the checkpoint, for the message.
      saved: leaf name -> {"shape", "dtype"} of all saved arrays.
      wanted: leaf name -> array or `ShapeDtypeStruct` to be read.
      subtree: part of the saved state that is read; "" is all of it.

    Raises:
      UserError: names the first leaf that differs.
    """
    prefix = f"{subtree}/" if subtree else ""
    saved = {name: facts for name, facts in saved.items() if name.startswith(prefix)}
    for name, leaf in wanted.items():
        have = saved.get(name)
        now = f"{list(leaf.shape)} {leaf.dtype}"
        was = f"{have['shape']} {have['dtype']}" if have else "absent"
        if was != now:
            raise UserError(
                f"Checkpoint {path} is of another model or optimizer: leaf {name} is {was} there "
                f"and {now} here; use the configuration it was saved with, or another directory."
            )
    for name, have in saved.items():
        if name not in wanted:
            raise UserError(
                f"Checkpoint {path} is of another model or optimizer: leaf {name} is "
                f"{have['shape']} {have['dtype']} there and absent here; use the configuration it "
                "was saved with, or another directory."
            )


def facts_to_read(directory: str, step: int | None) -> tuple[epath.Path, dict]:
    """Finds a checkpoint for a program that only reads, changing nothing on disk.

    Args:
      directory: folder of checkpoints.
      step: which one; None takes the newest.

    Returns:
      Its path, and what is stored beside its arrays (`read_facts`).

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    root = absolute(directory)
    present = steps(root) if root.is_dir() else []
    if not present:
        raise UserError(f"{root} holds no checkpoint: name the folder that has the step_N folders.")
    if step is not None and step not in present:
        newest = ", ".join(map(str, present[-5:]))
        raise UserError(f"{root} has no checkpoint of step {step}: choose one of {newest}.")
    path = root / step_name(present[-1] if step is None else step)
    try:
        facts = read_facts(path)
        check_files(path)
    except DamagedCheckpoint as problem:
        raise UserError(f"{path} is damaged ({problem}): name an older step.") from problem
    return path, facts


def absolute(directory: str) -> epath.Path:
    """Returns the folder as an absolute path; it may be a URL such as gs://bucket/run."""
    return epath.Path(directory).expanduser().absolute()


def step_name(step: int) -> str:
    """Returns the folder name of the checkpoint of a step, such as step_00000300."""
    return f"step_{step:08d}"


def is_remote(directory: epath.Path) -> bool:
    """Returns whether a folder is in an object store, where the commit marker is written last.

    Object stores have no atomic rename.
    """
    return "://" in str(directory)


def steps(directory: epath.Path) -> list[int]:
    """Returns the steps with a complete checkpoint in a folder, in ascending order.

    Other entries of the folder are ignored. In an object store a checkpoint without its commit
    marker is an interrupted save and left out; locally, where the final name itself is given last,
    it is listed, and reading it reports the damage.
    """
    found = [p for p in directory.iterdir() if _STEP.match(p.name)]
    if is_remote(directory):
        found = [p for p in found if (p / _MARKER).exists()]
    matches = [_STEP.match(p.name) for p in found]
    return sorted(int(match.group(1)) for match in matches if match)


def damaged(directory: epath.Path) -> list[str]:
    """Returns the names of the checkpoints in a folder that were renamed as damaged."""
    return sorted(p.name for p in directory.iterdir() if _DAMAGED.match(p.name))


def write_manifest(path: epath.Path) -> None:
    """Writes files.json into a complete checkpoint: name and size in bytes of its every file."""
    sizes = {str(p.relative_to(path)): p.stat().length for p in _walk(path)}
    partial = path / "files.json.partial"
    partial.write_text(json.dumps(sizes, indent=0))
    partial.replace(path / "files.json")


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    """Yields the path of every file below a folder."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def prepare_directory(directory: epath.Path) -> None:
    """Creates a checkpoint folder, checks it on all processes and removes interrupted saves.

    Raises:
      UserError: it cannot be created or written, or a process does not see what process 0 writes.
    """
    probe = directory / f".probe-{uuid.uuid4().hex}"

    def make() -> str:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
        except OSError as error:
            raise UserError(
                f"Checkpoint directory {directory} cannot be written ({error.strerror or error}): "
                "choose a folder that can be made and written."
            ) from error
        for path in directory.iterdir():
            unfinished = is_remote(path) and _STEP.match(path.name)
            if _LEFTOVER.match(path.name) or (unfinished and not (path / _MARKER).exists()):
                logging.info("Removing %s, left by an interrupted run.", path)
                path.rmtree()
        return probe.name

    name = on_first_process(make)
    blind = [
        i
        for i, seen in enumerate(all_gather_text(str((directory / name).exists())))
        if seen != "True"
    ]
    on_first_process(lambda: (directory / name).unlink())
    if blind:
        raise UserError(
            f"Process {blind[0]} does not see what process 0 writes to {directory}: the checkpoint "
            "directory must be on storage shared by all hosts."
        )


def rename_damaged(path: epath.Path, reason: str) -> None:
    """Renames a checkpoint to `<name>.damaged`, so that its step can be saved again.

    Args:
      path: the checkpoint.
      reason: what is wrong with it, for the log.
    """
    target, number = path.parent / f"{path.name}.damaged", 2
    while target.exists():
        target, number = path.parent / f"{path.name}.damaged-{number}", number + 1
    path.rename(target)
    logging.warning(
        "Checkpoint %s is damaged (%s); it is now %s and an older one is used.",
        path,
        reason,
        target.name,
    )


def remove(path: epath.Path) -> None:
    """Deletes a checkpoint; if killed half-way, what is left does not look complete."""
    if is_remote(path):
        (path / _MARKER).unlink()
        path.rmtree()
    else:
        path.rename(path.parent / f"{path.name}.deleting")
        (path.parent / f"{path.name}.deleting").rmtree()
