"""Asynchronous sharded checkpoints of any pytree of `jax.Array`, with exact restore.

This is the only module that uses Orbax. Layout of a checkpoint folder::

    <directory>/
      step_00000200/               complete: renamed to this once, after the last byte is written
        _CHECKPOINT_METADATA       JSON; custom_metadata.qwen_jax has format, step, identity (the
                                   fingerprint of the run), info, leaves {path: shape, dtype,
                                   checksum} and a digest of all of these
        state/                     the arrays (Orbax PyTree: Zarr3 chunks in OCDBT files), as
                                   nested dicts: state.params["a"]["b"] is params/a/b
        files.json                 name and size of every file, written right after the rename
      step_00000300.orbax-checkpoint-tmp/   a save in progress or interrupted: ignored, removed
      step_00000200.damaged/                found unreadable on restore: kept for inspection

Guarantees, tested in `tests/train/test_checkpoint.py`: a kill at any moment leaves the newest
complete step readable; a truncated, missing or corrupted file is detected and the step before it is
used; values are exact on any mesh and any number of hosts. See docs/checkpoints.md.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from orbax.checkpoint import v1 as ocp

from qwen_jax.errors import UserError
from qwen_jax.parallel.distributed import all_gather_text, on_first_process
from qwen_jax.train import checkpoint_files as files

# Status codes in errors of TensorStore and XLA when the machine, not the file, is at fault.
_MACHINE_FAILURES = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


@dataclasses.dataclass(frozen=True)
class CheckpointHeader:
    """What a checkpoint records beside its arrays.

    Attributes:
      step: training step, the number of batches consumed.
      fingerprint: description of the run that wrote it, from which alone it can be resumed.
      info: further facts given to `Checkpoints.save`.
    """

    step: int
    fingerprint: dict[str, Any]
    info: dict[str, Any]


class Checkpoints:
    """Checkpoint folder of one run; every process of the job opens it and makes the same calls.

    Saving is asynchronous (the arrays are copied to the host, then written by a thread), sharded
    (every host writes its shards) and atomic. An error of a save in progress is raised by the next
    call. Use it as a context manager, or call `close`, so that the last save is finished.

    Raises:
      UserError: bad retention numbers, or a directory that cannot be used.
    """

    def __init__(
        self, directory: str, *, keep_last: int, keep_every: int | None, fingerprint: Mapping
    ):
        """Opens the folder and removes saves that were interrupted.

        Args:
          directory: folder on storage that every host sees (local path, NFS, gs://); created if
            absent.
          keep_last: number of newest checkpoints that are kept, at least 1.
          keep_every: checkpoints of steps divisible by this number are kept as well; None keeps no
            others.
          fingerprint: JSON-able description of the run (model, tokenizer, data, optimizer); stored
            with every checkpoint and compared by `restore`.
        """
        if keep_last < 1 or (keep_every is not None and keep_every < 1):
            raise UserError(
                f"keep_last={keep_last} and keep_every={keep_every} must be at least 1 (keep_every "
                "may be None): the newest checkpoint is never deleted."
            )
        self._directory = files.absolute(directory)
        self._keep_last, self._keep_every = keep_last, keep_every
        self._fingerprint = files.jsonable(fingerprint)
        self._pending: concurrent.futures.Future | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        files.prepare_directory(self._directory)

    def save(self, step: int, state: Any, info: Mapping, *, wait: bool = False) -> None:
        """Starts to save `state` as checkpoint `step`, unless that step is saved already.

        Waits for the previous save if it is still in progress. After the return the caller may
        donate or overwrite the arrays of `state`.

        Args:
          step: training step, at least 0.
          state: pytree of `jax.Array`, the same global arrays on all processes.
          info: further JSON-able facts (data position, metrics); non-finite floats become strings.
          wait: whether to return only when the checkpoint is complete on disk.
        """
        self.wait()
        path = self._directory / files.step_name(step)
        if on_first_process(path.exists):
            logging.info("Checkpoint %s exists already.", path)
            return
        leaves = _named_leaves(state)
        described = {
            name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "checksum": checksum}
            for (name, leaf), checksum in zip(leaves.items(), _checksums(leaves), strict=True)
        }
        facts = {
            "format": files.FORMAT,
            "step": step,
            "identity": self._fingerprint,
            "info": files.jsonable(info),
            "leaves": described,
        }
        facts["digest"] = files.digest(facts)
        logging.info("Saving checkpoint %s.", path)
        with _context(reading=False):
            response = ocp.save_checkpointables_async(
                path, {"state": _nested(leaves)}, custom_metadata={"qwen_jax": facts}
            )
        self._pending = self._thread.submit(self._finish, response, path)
        if wait:
            self.wait()

    def restore(self, abstract_state: Any) -> tuple[Any, dict] | None:
        """Returns (state, info) of the newest readable checkpoint, or None if the folder has none.

        A damaged checkpoint is logged and renamed to `step_N.damaged`; the one before it is used.

        Args:
          abstract_state: pytree of `jax.ShapeDtypeStruct` (or arrays) with the shardings to
            restore to, on any mesh. A leaf without one is replicated over the mesh of the others.

        Raises:
          UserError: the checkpoint is of another run or model, or all checkpoints are damaged.
        """
        self.wait()
        while True:
            found = on_first_process(self._newest_readable)
            if found is None:
                return None
            path, facts = self._directory / found["name"], found["facts"]
            files.check_fingerprint(path, facts["identity"], self._fingerprint)
            try:
                state = _load(path, facts, abstract_state)
            except files.DamagedCheckpoint as problem:
                on_first_process(functools.partial(files.rename_damaged, path, str(problem)))
                continue
            logging.info("Restored checkpoint %s.", path)
            return state, facts["info"]

    def latest_step(self) -> int | None:
        """Returns the newest complete step on disk, or None; does not check it for damage."""
        return max(on_first_process(lambda: files.steps(self._directory)), default=None)

    def wait(self) -> None:
        """Waits until the save in progress is complete on disk; raises its error if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Finishes the save in progress; raises its error if it failed."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.close()
        except Exception:
            if kind is None:
                raise
            # Only logged: the error that ends the block is the cause.
            logging.exception("The last save failed too.")

    def _newest_readable(self) -> dict | None:
        """Returns {"name", "facts"} of the newest step that passes all checks without its arrays.

        Runs on process 0 only; renames damaged checkpoints. None if there are no checkpoints.

        Raises:
          UserError: all checkpoints are damaged.
        """
        for step in reversed(files.steps(self._directory)):
            path = self._directory / files.step_name(step)
            try:
                facts = files.read_facts(path)
                files.check_files(path)
                return {"name": path.name, "facts": facts}
            except files.DamagedCheckpoint as problem:
                files.rename_damaged(path, str(problem))
        damaged = files.damaged(self._directory)
        if damaged:
            raise UserError(
                f"{self._directory} has no readable checkpoint left, only {', '.join(damaged)}: "
                "put back a copy under its name without '.damaged', or move these away to start "
                "from step 0."
            )
        return None

    def _finish(self, response: ocp.AsyncResponse, path: epath.Path) -> None:
        """Waits for the commit, writes files.json and deletes old checkpoints; runs in a thread.

        Args:
          response: the save that Orbax has in progress.
          path: folder of the checkpoint once it is complete.
        """
        response.result()
        if jax.process_index() != 0:
            return
        files.write_manifest(path)
        logging.info("Checkpoint %s is complete.", path)
        for step in files.steps(self._directory)[: -self._keep_last]:
            if self._keep_every is None or step % self._keep_every:
                files.remove(self._directory / files.step_name(step))


def read_header(directory: str, step: int | None = None) -> CheckpointHeader:
    """Reads what a checkpoint records beside its arrays; changes nothing on disk.

    Args:
      directory: the folder given to `Checkpoints`.
      step: which checkpoint; None reads the newest.

    Raises:
      UserError: there is no such checkpoint, or it is damaged.
    """
    facts = files.facts_to_read(directory, step)[1]
    return CheckpointHeader(facts["step"], facts["identity"], facts["info"])


def restore_params(
    directory: str, abstract_params: Any, *, step: int | None = None, subtree: str = "params"
) -> Any:
    """Reads one sub-tree of a saved state, such as its parameters; changes nothing on disk.

    Args:
      directory: the folder given to `Checkpoints`.
      abstract_params: the sub-tree as `Checkpoints.restore` takes it: shapes, dtypes, shardings.
      step: which checkpoint; None reads the newest.
      subtree: name of the sub-tree in the state ("a/b" for a nested one).

    Returns:
      The sub-tree with the structure of `abstract_params`.

    Raises:
      UserError: the checkpoint is missing, damaged or has other shapes.
    """
    path, facts = files.facts_to_read(directory, step)
    if not any(name.startswith(subtree + "/") for name in facts["leaves"]):
        tops = sorted({name.split("/")[0] for name in facts["leaves"]})
        raise UserError(f"{path} has no {subtree!r}, only {', '.join(tops)}: name one of these.")
    try:
        return _load(path, facts, abstract_params, subtree)
    except files.DamagedCheckpoint as problem:
        raise UserError(f"{path} is damaged ({problem}): name an older step.") from problem


# --- reading and checking one checkpoint -----------------------------------------------------


def _load(path: epath.Path, facts: dict, abstract: Any, subtree: str = "") -> Any:
    """Reads arrays of one checkpoint and verifies their checksums.

    Args:
      path: folder of the checkpoint.
      facts: what is stored beside its arrays.
      abstract: pytree of shapes, dtypes and shardings to read.
      subtree: where in the saved state `abstract` is; "" is the whole state.

    Returns:
      Arrays with the structure of `abstract`.

    Raises:
      UserError: shapes or dtypes differ from those saved.
      files.DamagedCheckpoint: the files cannot be read, or values differ from those saved.
    """
    wanted = _placed(_named_leaves(abstract, subtree))
    files.check_leaves(path, facts["leaves"], wanted, subtree)
    failure: Exception | None = None
    loaded: dict[str, jax.Array] = {}
    try:
        files.check_metadata(path)
    except Exception as error:
        failure = error
    # Before Orbax, which numbers its operations: a process that fails before an operation is
    # numbered would be out of step with the others at the next save.
    _agree_on(failure)
    try:
        # Partial: with a sub-tree, the files of the rest of the state are not opened.
        with _context(reading=True, partial=bool(subtree)):
            tree = ocp.load_checkpointables(path, {"state": _nested(wanted)})["state"]
        found = _named_leaves(tree)
        loaded = {name: found[name] for name in wanted}
    except Exception as error:
        failure = error
    _agree_on(failure)
    for name, checksum in zip(loaded, _checksums(loaded), strict=True):
        if checksum != facts["leaves"][name]["checksum"]:
            raise files.DamagedCheckpoint(f"the values of {name} are not those that were saved")
    return jax.tree.unflatten(jax.tree.structure(abstract), loaded.values())


def _context(*, reading: bool, partial: bool = False) -> ocp.Context:
    """Returns the options of a call to Orbax.

    By default Orbax synchronises the processes by a collective on the devices: from the thread of a
    save it would race with those of the training step, and it waits forever when one process has
    failed. With the processes listed, a save synchronises through the coordinator, with a time
    limit. A read does not synchronise: each process reads alone, and `_agree_on` compares the
    results.

    Args:
      reading: whether the call reads; else it saves.
      partial: whether it reads only a part of the saved tree.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    if jax.process_count() > 1:
        all_processes, own = set(range(jax.process_count())), jax.process_index()
        context.multiprocessing.active_processes = {own} if reading else all_processes
        context.multiprocessing.primary_host = own if reading else 0
    return context


def _agree_on(failure: Exception | None) -> None:
    """Raises an error on all processes if reading failed on any of them.

    Args:
      failure: the error of this process; None if reading succeeded.

    Raises:
      files.DamagedCheckpoint: the files are at fault.
      Exception: a machine is at fault (no memory, no permission, no network); the checkpoint may be
        good, so it is not renamed.
    """
    text, trouble = "", False
    if failure is not None:
        text = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0][:300]}"
        trouble = isinstance(failure, (MemoryError, PermissionError, ConnectionError, TimeoutError))
        trouble |= any(code in str(failure) for code in _MACHINE_FAILURES)
    reports = all_gather_text(f"{'trouble' if trouble else 'damage'} {text}" if text else "")
    found = [(i, *report.split(" ", 1)) for i, report in enumerate(reports) if report]
    for index, kind, message in found:
        if kind == "trouble":
            raise failure or RuntimeError(f"Process {index} could not read a checkpoint: {message}")
    for index, _, message in found:
        raise files.DamagedCheckpoint(
            message if jax.process_count() == 1 else f"process {index}: {message}"
        )


# --- trees -----------------------------------------------------------------------------------


def _named_leaves(tree: Any, subtree: str = "") -> dict[str, Any]:
    """Returns {"params/embed/weight": leaf} in tree order, for a tree of any containers.

    Args:
      tree: pytree of arrays or of `ShapeDtypeStruct`s.
      subtree: prefix of the names, without its slash.

    Raises:
      TypeError: a leaf is not an array of numbers.
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not hasattr(leaf, "shape") or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"state leaf {name} must be a jax.Array of numbers, is {type(leaf)}.")
        leaves[f"{subtree}/{name}" if subtree else name] = leaf
    return leaves


def _nested(leaves: Mapping[str, Any]) -> dict:
    """Converts {"a/b": x} to {"a": {"b": x}}: plain dicts, readable without this code's classes."""
    tree: dict = {}
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


def _placed(leaves: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns abstract leaves with concrete shardings.

    A leaf without a sharding is replicated over the mesh of the others; without any mesh it goes to
    the first device of this process.
    """
    named = [s for x in leaves.values() if isinstance(s := x.sharding, jax.NamedSharding)]
    meshes = [s.mesh for s in named if isinstance(s.mesh, jax.sharding.Mesh)]
    mesh = meshes[0] if meshes else jax.sharding.get_mesh()

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = leaf.sharding
        if sharding is None:
            single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            sharding = single if mesh.empty else jax.NamedSharding(mesh, jax.P())
        elif isinstance(sharding, jax.NamedSharding):
            # Shardings from `jax.eval_shape` may refer to an abstract mesh only.
            concrete = isinstance(sharding.mesh, jax.sharding.Mesh)
            sharding = sharding if concrete else jax.NamedSharding(mesh, sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return {name: place(leaf) for name, leaf in leaves.items()}


def _checksums(leaves: Mapping[str, jax.Array]) -> list[int]:
    """Computes a 32-bit checksum of each array that is the same on every mesh.

    The checksum is Σ wordᵢ·wᵢ mod 2³² with odd weights wᵢ made from the position i. Integer sums do
    not depend on their order, hence not on the sharding. Any single changed bit is detected, as it
    changes the sum by ±2ᵏ·odd ≠ 0.
    """
    sums: dict[str, int] = {}
    for mesh in {getattr(leaf.sharding, "mesh", None) for leaf in leaves.values()}:
        here = {n: x for n, x in leaves.items() if getattr(x.sharding, "mesh", None) == mesh}
        # One program for all, then a wait: several small programs with collectives in flight can
        # block each other forever where many CPU devices share few cores.
        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            sums |= jax.device_get(_checksum_all(here))
    return [int(sums[name]) for name in leaves]


@jax.jit
def _checksum_all(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the uint32 checksum of every array; see `_checksums`."""
    return {name: _checksum(leaf) for name, leaf in leaves.items()}


def _checksum(x: jax.Array) -> jax.Array:
    """Returns the uint32 checksum of an array of any shape and numeric dtype; see `_checksums`."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}")
    words = bits.astype(jnp.uint32)
    sharding = jax.typeof(words).sharding
    place = None if sharding.mesh.empty else sharding
    position = jnp.uint32(0)
    for axis in range(words.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis, out_sharding=place)
        position = position * jnp.uint32(words.shape[axis]) + index
    position = position * jnp.uint32(0x9E3779B1)
    weights = (position ^ (position >> 15)) | jnp.uint32(1)
    return jnp.sum(words * weights, dtype=jnp.uint32)
