"""Checkpoints: exact values on any mesh, no loss by kills or damage, clear refusals."""

from __future__ import annotations

import itertools
import json
import logging
import os
import pathlib
import random
import resource
import shutil
import signal
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from qwen_jax.errors import UserError
from qwen_jax.train import checkpoint
from qwen_jax.train.checkpoint import CheckpointHeader, Checkpoints, read_header, restore_params
from tests import multiprocess
from tests.train.states import FINGERPRINT, State, abstract, assert_state, make_mesh, state_at

pytestmark = pytest.mark.filterwarnings("error::DeprecationWarning")
MESHES = {"8": (1, 8, 1, 1), "4x2": (1, 4, 1, 2), "2x2x2": (2, 2, 1, 2), "1": (1, 1, 1, 1)}


@pytest.fixture
def mesh():
    mesh = make_mesh(1, 4, 1, 2)
    with jax.set_mesh(mesh):
        yield mesh


def open_at(directory, **changes) -> Checkpoints:
    settings = {"keep_last": 3, "keep_every": None, "fingerprint": FINGERPRINT}
    return Checkpoints(str(directory), **{**settings, **changes})


def save_steps(directory, mesh, *steps: int, **changes) -> None:
    with open_at(directory, **changes) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_at(step, mesh), {"position": step * 8})


def folders(directory) -> set[str]:
    return {path.name for path in pathlib.Path(directory).iterdir()}


# --- exactness -------------------------------------------------------------------------------


def test_an_empty_folder_has_nothing_to_restore(tmp_path, mesh):
    with open_at(tmp_path / "new" / "run") as checkpoints:
        assert checkpoints.restore(abstract(mesh)) is None
        assert checkpoints.latest_step() is None


def test_restored_state_and_info_equal_those_saved(tmp_path, mesh):
    info = {"position": 24, "loss": 2.5, "shards": ("a", "b"), "none": None}
    with open_at(tmp_path) as checkpoints:
        checkpoints.save(3, state_at(3, mesh), info)
        state, restored_info = checkpoints.restore(abstract(mesh))
        assert checkpoints.latest_step() == 3
    assert_state(state, 3, mesh)
    assert restored_info == {"position": 24, "loss": 2.5, "shards": ["a", "b"], "none": None}


@pytest.mark.parametrize("to", MESHES)
@pytest.mark.parametrize("source", ["4x2", "1"])
def test_restore_onto_another_mesh_is_exact(tmp_path, source, to):
    with jax.set_mesh(make_mesh(*MESHES[source])) as _:
        save_steps(tmp_path, make_mesh(*MESHES[source]), 7)
    new = make_mesh(*MESHES[to])
    with jax.set_mesh(new), open_at(tmp_path) as checkpoints:
        state, _ = checkpoints.restore(abstract(new))
        assert_state(state, 7, new)


def test_abstract_leaves_without_a_concrete_sharding_get_one(tmp_path, mesh):
    save_steps(tmp_path, mesh, 1)
    # As `eval_shape` under a mesh returns them: abstract mesh, no sharding for a counter.
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape,
            x.dtype,
            sharding=jax.NamedSharding(mesh.abstract_mesh, x.sharding.spec) if x.ndim else None,
        ),
        abstract(mesh),
    )
    with open_at(tmp_path) as checkpoints:
        state, _ = checkpoints.restore(like)
    assert_state(state, 1, mesh)


def test_the_state_may_be_donated_right_after_save_returns(tmp_path, mesh):
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 77, s), donate_argnums=0)
    with open_at(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            state = state_at(step, mesh, width=512)
            checkpoints.save(step, state, {})
            for _ in range(3):
                state = overwrite(state)
            jax.block_until_ready(state)
            restored, _ = checkpoints.restore(abstract(mesh, width=512))
            assert_state(restored, step, mesh, width=512)


def test_repeated_saves_do_not_accumulate_memory(tmp_path, mesh):
    def resident() -> int:
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024

    state = state_at(1, mesh, width=512)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with open_at(tmp_path, keep_last=1) as checkpoints:
        for step in range(1, 25):
            checkpoints.save(step, state, {}, wait=True)
            if step == 8:
                early = resident()
    # One state kept per save would be 16 by now.
    assert resident() - early < 4 * size


def test_a_second_resume_continues_where_the_first_ended(tmp_path, mesh):
    for resume in range(3):
        with open_at(tmp_path, keep_last=2) as checkpoints:
            found = checkpoints.restore(abstract(mesh))
            start = 0 if found is None else int(found[0].step)
            assert start == resume * 2
            if found is not None:
                assert_state(found[0], start, mesh)
                assert found[1] == {"position": start * 8}
            for step in (start + 1, start + 2):
                checkpoints.save(step, state_at(step, mesh), {"position": step * 8})
    assert folders(tmp_path) == {"step_00000005", "step_00000006"}


def test_saving_an_existing_step_keeps_the_first(tmp_path, mesh):
    with open_at(tmp_path) as checkpoints:
        checkpoints.save(4, state_at(4, mesh), {"first": True})
        checkpoints.save(4, state_at(5, mesh), {"first": False}, wait=True)
        state, info = checkpoints.restore(abstract(mesh))
    assert_state(state, 4, mesh)
    assert info == {"first": True}


def test_non_finite_metrics_do_not_stop_a_save(tmp_path, mesh):
    info = {"loss": float("nan"), "norm": np.float32(np.inf), "step": np.int64(3)}
    with open_at(tmp_path) as checkpoints:
        checkpoints.save(1, state_at(1, mesh), info)
        assert checkpoints.restore(abstract(mesh))[1] == {"loss": "nan", "norm": "inf", "step": 3}
    text = (tmp_path / "step_00000001" / "_CHECKPOINT_METADATA").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


# --- retention -------------------------------------------------------------------------------


def test_retention_keeps_the_newest_and_every_nth(tmp_path, mesh):
    save_steps(tmp_path, mesh, *range(1, 9), keep_last=2, keep_every=3)
    assert folders(tmp_path) == {f"step_{s:08d}" for s in (3, 6, 7, 8)}


def test_retention_keeps_at_least_one(tmp_path, mesh):
    save_steps(tmp_path, mesh, 1, 2, 3, keep_last=1)
    assert folders(tmp_path) == {"step_00000003"}
    with pytest.raises(UserError, match=r"keep_last=0 .* must be at least 1"):
        open_at(tmp_path, keep_last=0)


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {**FINGERPRINT["model"], "num_layers": 4}},
         r"step_00000002 was written with model.num_layers = 2, this run has 4: go back"),
        ({"model": {**FINGERPRINT["model"], "rope": {"theta": 1e6}}},
         r"model.rope.theta = 10000.0,"),
        ({"optimizer": {"betas": (0.9, 0.999), "mu_dtype": "bfloat16"}},
         r"optimizer.betas = \[0.9, 0.95\], this run has \[0.9, 0.999\]"),
        ({"data": "x"}, r"data = nothing, this run has 'x'"),
        ({"tokenizer": {}}, r"sha256 = 'ab12', this run has nothing"),
        ({"tokenizer": {"sha256": "cd"}, "model": {"num_layers": 4}},
         r"model.num_layers = 2, this run has 4 \(3 more: tokenizer.sha256, "),
    ],
)  # fmt: skip
def test_another_fingerprint_is_refused_naming_the_field(tmp_path, mesh, change, message):
    save_steps(tmp_path, mesh, 1, 2)
    with (
        open_at(tmp_path, fingerprint={**FINGERPRINT, **change}) as checkpoints,
        pytest.raises(UserError, match=message),
    ):
        checkpoints.restore(abstract(mesh))
    with open_at(tmp_path) as checkpoints:
        assert_state(checkpoints.restore(abstract(mesh))[0], 2, mesh)


def test_another_shape_dtype_or_tree_is_refused_naming_the_leaf(tmp_path, mesh):
    save_steps(tmp_path, mesh, 1)
    like = abstract(mesh)
    wider = abstract(mesh, width=64)
    as_float = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), like
    )
    more = State(like.step, {**like.params, "head": like.params["embed"]}, like.opt_state)
    less = State(like.step, {"layers": like.params["layers"]}, like.opt_state)
    cases = {
        r"leaf params/embed/weight is \[64, 32\] float32 there and \[64, 64\] float32 here": wider,
        r"leaf step is \[\] int32 there and \[\] float32 here": as_float,
        r"leaf params/head/weight is absent there and \[64, 32\] float32 here": more,
        r"leaf params/embed/weight is \[64, 32\] float32 there and absent here": less,
    }
    with open_at(tmp_path) as checkpoints:
        for message, tree in cases.items():
            with pytest.raises(UserError, match=message):
                checkpoints.restore(tree)
        assert_state(checkpoints.restore(like)[0], 1, mesh)
    assert folders(tmp_path) == {"step_00000001"}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("precious")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"Checkpoint directory .*file.* cannot be written"):
            open_at(directory)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    directory = "/proc/checkpoints"  # refused even to root
    if os.geteuid():
        tmp_path.chmod(0o555)
        directory = tmp_path / "below"
    with pytest.raises(UserError, match=r"cannot be written \(.+\): choose a folder"):
        open_at(directory)


def test_foreign_content_is_not_touched(tmp_path, mesh):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "other.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "step_3").mkdir()
    (tmp_path / "100").mkdir()
    before = folders(tmp_path)
    save_steps(tmp_path, mesh, 1, 2, 3, keep_last=1)
    assert folders(tmp_path) == before | {"step_00000003"}
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_checkpoint_of_another_program_is_refused_and_kept(tmp_path, mesh):
    ocp.save(tmp_path / "step_00000009", {"w": np.ones(3)}, custom_metadata={"theirs": 1})
    with open_at(tmp_path) as checkpoints, pytest.raises(UserError, match="of another program"):
        checkpoints.restore(abstract(mesh))
    assert folders(tmp_path) == {"step_00000009"}


# --- damage ----------------------------------------------------------------------------------


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def _half(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _zero(path: pathlib.Path) -> None:
    os.truncate(path, 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # inside Orbax
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("listed", [True, False], ids=["", "without-files.json"])
@pytest.mark.parametrize("damage", [_half, _zero, pathlib.Path.unlink])
def test_any_damaged_file_is_detected_and_the_step_before_is_used(
    tmp_path, mesh, damage, listed, caplog
):
    save_steps(tmp_path / "good", mesh, 1, 2)
    names = [p.relative_to(tmp_path / "good" / "step_00000002") for p in _files(
        tmp_path / "good" / "step_00000002")]  # fmt: skip
    names = [n for n in names if n.name != "files.json"]
    assert len(names) >= 7
    if not listed:  # killed before the manifest was written: only files needed to read are checked
        names = [n for n in names if "d" in n.parts or n.name in (
            "_CHECKPOINT_METADATA", "_METADATA")]  # fmt: skip
    for number, name in enumerate(names):
        run = tmp_path / f"run{number}"
        shutil.copytree(tmp_path / "good", run)
        damage(run / "step_00000002" / name)
        if not listed:
            (run / "step_00000002" / "files.json").unlink()
        caplog.clear()
        with open_at(run) as checkpoints:
            with caplog.at_level(logging.WARNING, logger="absl"):
                state, info = checkpoints.restore(abstract(mesh))
            assert_state(state, 1, mesh)
            assert info == {"position": 8}
            assert f"{run}/step_00000002 is damaged" in caplog.text, name
            if listed and name.name != "_CHECKPOINT_METADATA":
                assert str(name) in caplog.text
            assert folders(run) == {"step_00000001", "step_00000002.damaged"}
            # The step can be saved again, beside the damaged one.
            checkpoints.save(2, state_at(2, mesh), {}, wait=True)
            assert_state(checkpoints.restore(abstract(mesh))[0], 2, mesh)


def test_a_flipped_bit_is_detected(tmp_path, mesh):
    save_steps(tmp_path / "good", mesh, 1, 2)
    rng, count = random.Random(0), 0
    for number in range(8):
        run = tmp_path / f"run{number}"
        shutil.copytree(tmp_path / "good", run)
        # The largest file holds the values; Orbax alone returns wrong numbers here.
        path = max(_files(run / "step_00000002" / "state"), key=lambda p: p.stat().st_size)
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with open_at(run) as checkpoints:
            state, _ = checkpoints.restore(abstract(mesh))
        detected = "step_00000002.damaged" in folders(run)
        assert_state(state, 1 if detected else 2, mesh)  # a few bytes of the file are padding
        count += detected
    assert count >= 6


def test_a_changed_number_in_the_metadata_is_damage_and_not_another_fingerprint(tmp_path, mesh):
    save_steps(tmp_path, mesh, 1, 2)
    path = tmp_path / "step_00000002" / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace('"num_layers": 2', '"num_layers": 3'))
    with open_at(tmp_path) as checkpoints:
        assert_state(checkpoints.restore(abstract(mesh))[0], 1, mesh)


def test_when_all_are_damaged_the_run_does_not_start_from_zero(tmp_path, mesh):
    save_steps(tmp_path, mesh, 1, 2)
    for step in (1, 2):
        _zero(tmp_path / f"step_0000000{step}" / "_CHECKPOINT_METADATA")
    for _ in range(2):  # nor when a scheduler starts it again
        with (
            open_at(tmp_path) as checkpoints,
            pytest.raises(UserError, match=r"no readable checkpoint left, only step_00000001\.dam"),
        ):
            checkpoints.restore(abstract(mesh))
    assert folders(tmp_path) == {"step_00000001.damaged", "step_00000002.damaged"}


def test_a_step_damaged_twice_leaves_two_renamed_copies(tmp_path, mesh):
    for _ in range(2):
        save_steps(tmp_path, mesh, 1, 2)
        _zero(tmp_path / "step_00000002" / "_CHECKPOINT_METADATA")
        with open_at(tmp_path) as checkpoints:
            checkpoints.restore(abstract(mesh))
    assert {"step_00000002.damaged", "step_00000002.damaged-2"} <= folders(tmp_path)


def test_out_of_memory_does_not_mark_a_checkpoint_damaged(tmp_path, mesh, monkeypatch):
    save_steps(tmp_path, mesh, 1)

    def out_of_memory(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with open_at(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.ocp, "load_checkpointables", out_of_memory)
            with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
                checkpoints.restore(abstract(mesh))
        assert_state(checkpoints.restore(abstract(mesh))[0], 1, mesh)


def test_an_error_of_a_save_in_progress_is_raised_by_the_next_call(tmp_path, mesh):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    calls = {
        "save": lambda c: c.save(3, state_at(3, mesh), {}),
        "wait": lambda c: c.wait(),
        "restore": lambda c: c.restore(abstract(mesh)),
        "close": lambda c: c.close(),
    }
    for name, call in calls.items():
        with open_at(tmp_path / name) as checkpoints:
            checkpoints.save(1, state_at(1, mesh), {}, wait=True)
            # No file may exceed 64 KiB, which looks like a full disk to the writer.
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
            try:
                checkpoints.save(2, state_at(2, mesh, width=256), {})
                with pytest.raises(Exception, match=r"(?i)too large|file size"):
                    call(checkpoints)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        with open_at(tmp_path / name) as checkpoints:
            assert_state(checkpoints.restore(abstract(mesh))[0], 1, mesh)
        # A writer thread of the failed save may still be running; a later start removes its files.
        for _ in range(50):
            if folders(tmp_path / name) == {"step_00000001"}:
                break
            time.sleep(0.1)
            open_at(tmp_path / name).close()
        assert folders(tmp_path / name) == {"step_00000001"}


# --- reading without a run -------------------------------------------------------------------


def test_header_and_params_can_be_read_from_the_folder_alone(tmp_path, mesh):
    save_steps(tmp_path, mesh, 1, 2, 3)
    before = folders(tmp_path)
    fingerprint = json.loads(json.dumps(FINGERPRINT))
    assert read_header(str(tmp_path)) == CheckpointHeader(3, fingerprint, {"position": 24})
    assert read_header(str(tmp_path), step=2).info == {"position": 16}
    one = make_mesh(1, 1, 1, 1)
    with jax.set_mesh(one):
        params = restore_params(str(tmp_path), abstract(one).params, step=2)
        layers = restore_params(
            str(tmp_path), abstract(one).params["layers"], step=2, subtree="params/layers"
        )
    wanted = state_at(2, one).params
    assert jax.tree.all(jax.tree.map(np.array_equal, params, wanted))
    assert jax.tree.all(jax.tree.map(np.array_equal, layers, wanted["layers"]))
    assert folders(tmp_path) == before


def test_params_restored_without_a_mesh_go_to_one_device(tmp_path):
    mesh = make_mesh(1, 4, 1, 2)
    with jax.set_mesh(mesh):
        save_steps(tmp_path, mesh, 2)
        wanted = state_at(2, mesh).params
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), wanted)
    params = restore_params(str(tmp_path), like)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, wanted))
    assert {d for x in jax.tree.leaves(params) for d in x.devices()} == {jax.devices()[0]}


def test_reading_without_a_run_refuses_clearly_and_changes_nothing(tmp_path, mesh):
    like = abstract(mesh).params
    with pytest.raises(UserError, match=r"nowhere holds no checkpoint"):
        read_header(str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
    save_steps(tmp_path, mesh, 1, 2)
    with pytest.raises(UserError, match=r"no checkpoint of step 5: choose one of 1, 2"):
        restore_params(str(tmp_path), like, step=5)
    with pytest.raises(UserError, match=r"has no 'weights', only opt_state, params, step"):
        restore_params(str(tmp_path), like, subtree="weights")
    with pytest.raises(UserError, match=r"leaf params/embed/weight is \[64, 32\]"):
        restore_params(str(tmp_path), abstract(mesh, width=64).params)
    largest = max(_files(tmp_path / "step_00000002" / "state"), key=lambda p: p.stat().st_size)
    _half(largest)
    with pytest.raises(UserError, match=rf"step_00000002 is damaged \(.*{largest.name}"):
        restore_params(str(tmp_path), like)
    assert folders(tmp_path) == {"step_00000001", "step_00000002"}


# --- checksums -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool", "int8"])
def test_checksum_depends_on_every_bit_but_not_on_the_mesh(dtype):
    values = np.random.default_rng(0).integers(0, 2, (8, 16)).astype(dtype)
    sums = set()
    for shape in MESHES.values():
        mesh = make_mesh(*shape)
        with jax.set_mesh(mesh):
            for spec in (jax.P("fsdp", "tensor"), jax.P("tensor", None), jax.P()):
                array = jax.device_put(values, jax.NamedSharding(mesh, spec))
                sums.add(checkpoint._checksums({"x": array})[0])
    sums.add(checkpoint._checksums({"x": jnp.asarray(values)})[0])
    assert len(sums) == 1
    (right,) = sums
    assert checkpoint._checksums({"x": jnp.asarray(values[::-1])})[0] != right
    rng = np.random.default_rng(1)
    for _ in range(20):
        flipped = values.copy()
        raw = flipped.view(np.uint8).reshape(-1)
        raw[rng.integers(raw.size)] ^= 1 if dtype == "bool" else 1 << rng.integers(8)
        assert checkpoint._checksums({"x": jnp.asarray(flipped)})[0] != right


def test_object_store_step_is_complete_once_its_marker_exists(tmp_path, mesh, monkeypatch):
    """The rules for storage without atomic renames, applied to a local folder."""
    monkeypatch.setattr(checkpoint.files, "is_remote", lambda path: True)
    save_steps(tmp_path, mesh, 1, 2, 3, 4, keep_last=2)
    assert folders(tmp_path) == {"step_00000003", "step_00000004"}
    (tmp_path / "step_00000004" / "commit_success.txt").unlink()
    assert read_header(str(tmp_path)).step == 3
    with open_at(tmp_path) as checkpoints:
        assert_state(checkpoints.restore(abstract(mesh))[0], 3, mesh)
    assert folders(tmp_path) == {"step_00000003"}


# --- kill -9 ---------------------------------------------------------------------------------


def _save_forever(directory: str) -> None:
    mesh = make_mesh(1, 2, 1, 1)
    with jax.set_mesh(mesh), open_at(directory, keep_last=2) as checkpoints:
        found = checkpoints.restore(abstract(mesh, width=512))
        start = 0 if found is None else int(found[0].step)
        if found is not None:
            assert_state(found[0], start, mesh, width=512)
        for step in itertools.count(start + 1):
            checkpoints.save(step, state_at(step, mesh, width=512), {"position": step})
            if step > start + 1:  # this call has waited for the previous save
                print(f"complete {step - 1}", flush=True)


@pytest.mark.slow
def test_a_kill_at_any_moment_of_a_save_loses_nothing_complete(tmp_path):
    rng = random.Random(7)
    mesh = make_mesh(1, 4, 1, 2)
    interrupted_saves = 0
    for _ in range(4):
        with multiprocess.start(
            _save_forever, processes=1, devices=2, directory=str(tmp_path)
        ) as group:
            group.wait_for_output(0, "complete")
            time.sleep(0.3 * rng.random())
            deadline = time.monotonic() + 30
            while not list(tmp_path.glob("*.orbax-checkpoint-tmp")):
                assert time.monotonic() < deadline, group.output(0)
            time.sleep(0.02 * rng.random())
            group.send_signal(0, signal.SIGKILL)
            group.processes[0].wait()
            complete = int(group.output(0).rsplit("complete ", 1)[1].split()[0])
        interrupted_saves += bool(list(tmp_path.glob("*.orbax-checkpoint-tmp")))
        with jax.set_mesh(mesh), open_at(tmp_path, keep_last=2) as checkpoints:
            state, info = checkpoints.restore(abstract(mesh, width=512))
        step = int(state.step)
        assert step >= complete
        assert info == {"position": step}
        assert_state(state, step, mesh, width=512)
        assert not [name for name in folders(tmp_path) if not name[5:].isdigit()]
    assert interrupted_saves >= 2


# --- several processes -----------------------------------------------------------------------


def _flip_a_bit(folder: pathlib.Path) -> None:
    path = max(_files(folder / "state"), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _fail_on_process_1(error: Exception):
    """Makes Orbax's read fail on process 1; the other must not wait for it."""
    real = ocp.load_checkpointables

    def load(path, *args, **kwargs):
        tree = real(path, *args, **kwargs)
        if jax.process_index() == 1 and path.name == "step_00000004":
            raise error
        return tree

    return mock.patch.object(checkpoint.ocp, "load_checkpointables", load)


def _two_processes(shared: str, single: str, own: str) -> list[str]:
    mesh = make_mesh(1, 4, 1, 2)
    first = jax.process_index() == 0
    with jax.set_mesh(mesh):
        # Restore what a single process saved on another mesh.
        with open_at(single) as checkpoints:
            assert_state(checkpoints.restore(abstract(mesh))[0], 7, mesh)
        train = jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.sum(x).astype(x.dtype), s))
        with open_at(shared) as checkpoints:
            for step in (1, 2, 3, 4):
                state = state_at(step, mesh)
                checkpoints.save(step, state, {"position": step * 8})
                for _ in range(3):  # collectives of the training while the save runs
                    state = train(state)
            checkpoints.wait()
            assert checkpoints.latest_step() == 4
            assert_state(checkpoints.restore(abstract(mesh))[0], 4, mesh)
            # A machine failure or damage on one process is reported on all.
            with _fail_on_process_1(MemoryError("none left")):
                with pytest.raises(RuntimeError if first else MemoryError, match="none left"):
                    checkpoints.restore(abstract(mesh))
                assert checkpoints.latest_step() == 4
            with _fail_on_process_1(ValueError("DATA_LOSS")):
                assert_state(checkpoints.restore(abstract(mesh))[0], 3, mesh)
            checkpoints.save(4, state_at(4, mesh), {}, wait=True)
            if first:
                _flip_a_bit(pathlib.Path(shared, "step_00000004"))
            state, info = checkpoints.restore(abstract(mesh))
            assert_state(state, 3, mesh)
            assert info == {"position": 24}
            checkpoints.save(4, state_at(4, mesh), {}, wait=True)
    messages = []
    for directory, fingerprint in (
        (f"{own}/{jax.process_index()}", FINGERPRINT),  # a local disk in each host
        (shared, {**FINGERPRINT, "data": 1}),
    ):
        try:
            with open_at(directory, fingerprint=fingerprint) as checkpoints:
                checkpoints.restore(abstract(mesh))
        except UserError as error:
            messages.append(str(error))
    return messages


@pytest.mark.slow
def test_two_processes_save_and_one_restores_and_the_reverse(tmp_path, mesh):
    save_steps(tmp_path / "single", make_mesh(1, 8, 1, 1), 7)
    results = multiprocess.run(
        _two_processes,
        processes=2,
        devices=4,
        shared=str(tmp_path / "shared"),
        single=str(tmp_path / "single"),
        own=str(tmp_path / "own"),
    )
    for not_shared, other_run in results:
        assert "Process 1 does not see what process 0 writes" in not_shared
        assert "data = nothing, this run has 1" in other_run
    assert folders(tmp_path / "shared") == {
        "step_00000002", "step_00000003", "step_00000004",
        "step_00000004.damaged", "step_00000004.damaged-2",
    }  # fmt: skip
    for shape in MESHES.values():
        new = make_mesh(*shape)
        with jax.set_mesh(new), open_at(tmp_path / "shared") as checkpoints:
            assert_state(checkpoints.restore(abstract(new))[0], 4, new)
