"""A checkpoint folder as files: names, what is stored beside the arrays, checks, retention.

Nothing here reads an array or knows Orbax; `checkpoint.py` does, and has the layout.
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
from qwen_jax.parallel.distributed import from_all_processes, on_first_process

FORMAT = 1
_STEP = re.compile(r"step_(\d{8,})$")
_LEFTOVER = re.compile(r"step_\d{8,}\.(orbax-checkpoint-tmp.*|deleting)$")
_SET_ASIDE = re.compile(r"step_\d{8,}\.damaged(-\d+)?$")
_MARKER = "commit_success.txt"


class Damaged(Exception):
    """This checkpoint cannot be read; the message says which part."""


def jsonable(tree: Any) -> Any:
    """Returns `tree` as JSON gives it back: lists for tuples, plain numbers, no NaN."""
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
    """Returns the SHA-256 of `facts` without its own entry "digest"."""
    text = json.dumps({k: v for k, v in facts.items() if k != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_facts(path: epath.Path) -> dict:
    """Returns what `save` stored beside the arrays; raises Damaged, or UserError if foreign."""
    try:
        text = (path / "_CHECKPOINT_METADATA").read_text()
        metadata = json.loads(text)
        facts = metadata["custom_metadata"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"_CHECKPOINT_METADATA cannot be read: {error}") from error
    if not isinstance(facts, dict) or "qwen_jax" not in facts:
        raise UserError(
            f"{path} is an Orbax checkpoint of another program: use another directory, or move it."
        )
    facts = facts["qwen_jax"]
    if not isinstance(facts, dict) or facts.get("digest") != digest(facts):
        raise Damaged("the digest of _CHECKPOINT_METADATA is wrong")
    if facts["format"] != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {facts['format']}, this version reads {FORMAT}: "
            "use the version that wrote it."
        )
    return facts


def check_metadata(path: epath.Path) -> None:
    """Raises OSError or ValueError when Orbax's own description is not there or not JSON."""
    for name in ("_CHECKPOINT_METADATA", "state/_METADATA"):
        json.loads((path / name).read_text())


def check_files(path: epath.Path) -> None:
    """Raises Damaged naming a file that is missing or has another size than when written."""
    if not (path / _MARKER).exists():
        raise Damaged(f"{_MARKER} is missing")
    manifest = path / "files.json"
    if not manifest.exists():
        return  # killed between commit and this list: complete, the arrays have their checksums
    try:
        sizes = json.loads(manifest.read_text()).items()
    except (ValueError, AttributeError) as error:
        raise Damaged(f"files.json cannot be read: {error}") from error
    for name, size in sizes:
        if not (path / name).exists():
            raise Damaged(f"{name} is missing")
        if (found := (path / name).stat().length) != size:
            raise Damaged(f"{name} has {found} bytes, was written with {size}")


def check_identity(path: epath.Path, saved: dict, now: dict) -> None:
    """Raises UserError naming the first field in which two identities differ."""
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
    """Yields ("model.num_layers", 24) for every value of a nested mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_leaves(path: epath.Path, saved: dict, wanted: dict, subtree: str) -> None:
    """Raises UserError naming the first leaf in which checkpoint and model differ."""
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
    """Path and facts of one checkpoint for a program that only reads."""
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
    except Damaged as problem:
        raise UserError(f"{path} is damaged ({problem}): name an older step.") from problem
    return path, facts


def absolute(directory: str) -> epath.Path:
    """Returns the folder as an absolute path; it may be a URL such as gs://bucket/run."""
    return epath.Path(directory).expanduser().absolute()


def step_name(step: int) -> str:
    """Returns the folder name of a complete checkpoint."""
    return f"step_{step:08d}"


def is_remote(directory: epath.Path) -> bool:
    """Whether this is an object store: no atomic rename there, the commit marker comes last."""
    return "://" in str(directory)


def steps(directory: epath.Path) -> list[int]:
    """Returns the complete steps, oldest first; whatever else lies in the folder is not ours.

    Locally a missing marker is damage, for the name itself came last; remotely it is a save cut
    short.
    """
    found = [p for p in directory.iterdir() if _STEP.match(p.name)]
    if is_remote(directory):
        found = [p for p in found if (p / _MARKER).exists()]
    return sorted(int(_STEP.match(p.name).group(1)) for p in found)


def damaged(directory: epath.Path) -> list[str]:
    """Returns the names of the checkpoints that were set aside."""
    return sorted(p.name for p in directory.iterdir() if _SET_ASIDE.match(p.name))


def write_manifest(path: epath.Path) -> None:
    """Writes files.json: name and size of every file of a complete checkpoint."""
    sizes = {str(p.relative_to(path)): p.stat().length for p in _walk(path)}
    partial = path / "files.json.partial"
    partial.write_text(json.dumps(sizes, indent=0))
    partial.replace(path / "files.json")


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def prepare_directory(directory: epath.Path) -> None:
    """Makes the folder, proves that all processes see and may write it, removes cut-short saves."""
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
                logging.info("Removing %s, left by a run that was stopped.", path)
                path.rmtree()
        return probe.name

    name = on_first_process(make)
    blind = [
        i
        for i, seen in enumerate(from_all_processes(str((directory / name).exists())))
        if seen != "True"
    ]
    on_first_process(lambda: (directory / name).unlink())
    if blind:
        raise UserError(
            f"Process {blind[0]} does not see what process 0 writes to {directory}: the checkpoint "
            "directory must be on storage shared by all hosts."
        )


def set_aside(path: epath.Path, reason: str) -> None:
    """Renames a damaged checkpoint, so that its step can be saved again and nothing is lost."""
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
    """Deletes a checkpoint so that a kill half-way leaves no step that looks complete."""
    if is_remote(path):
        (path / _MARKER).unlink()
        path.rmtree()
    else:
        path.rename(path.parent / f"{path.name}.deleting")
        (path.parent / f"{path.name}.deleting").rmtree()
