"""The training loop: a run stopped and resumed anywhere equals an uninterrupted one."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest

from qwen_jax.corpus import read_manifest
from qwen_jax.data import eval_batches
from qwen_jax.errors import UserError
from qwen_jax.model import ForwardOptions, forward
from qwen_jax.parallel import MeshConfig, make_mesh
from qwen_jax.train import loop
from qwen_jax.train.checkpoint import read_header
from qwen_jax.train.evaluation import evaluate, parse_eval_sources
from qwen_jax.train.loop import Outcome, TrainingDiverged
from qwen_jax.train.metrics import read_metrics
from qwen_jax.train.pretrain import pretrain
from qwen_jax.train.state import abstract_state, init_state
from tests.train import jobs


@pytest.fixture(scope="module", autouse=True)
def shared_compilation():
    with jobs.compile_once():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return jobs.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """Result of an uninterrupted run, 9 steps on 8 fsdp, checkpoints at 3, 6, 9."""
    return jobs.run(jobs.make(data), tmp_path_factory.mktemp("uninterrupted"))


class Killed(BaseException):
    pass


def at_step(monkeypatch, step, action):
    """Makes the loop call `action` after the given step, before its checkpoint."""
    original = loop._Recorder.after_step

    def after(self, now, state):
        if now == step:
            action()
        original(self, now, state)

    monkeypatch.setattr(loop._Recorder, "after_step", after)


def raise_killed():
    raise Killed


def send_sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def test_metrics_describe_the_run(uninterrupted, data):
    assert [step for step, _ in uninterrupted.series("loss")] == list(range(1, 10))
    losses = [loss for _, loss in uninterrupted.series("loss")]
    assert abs(losses[0] - np.log(464)) < 0.1  # untrained: uniform over the vocabulary
    assert losses[-1] < losses[0] - 0.3
    assert uninterrupted.series("lr")[1] == (2, pytest.approx(3e-3))
    assert [step for step, _ in uninterrupted.series("eval/h/loss")] == [9]


@pytest.mark.slow
def test_run_stopped_and_resumed_repeatedly_is_bit_for_bit_the_same(
    uninterrupted, data, tmp_path, monkeypatch
):
    job = jobs.make(data, train={"profile_steps": "2,3"})
    # Ends right after a checkpoint.
    short = dataclasses.replace(job, eval="", train=dataclasses.replace(job.train, steps=3))
    assert pretrain(short, str(tmp_path)) == Outcome(3, True, {})
    # SIGTERM between two checkpoints: saves the current step.
    with monkeypatch.context() as patch:
        at_step(patch, 5, send_sigterm)
        assert pretrain(job, str(tmp_path)) == Outcome(5, False, {})
    assert read_header(f"{tmp_path}/checkpoints").step == 5
    # A crash: steps 7 and 8 are lost and repeated from the checkpoint of step 6.
    with monkeypatch.context() as patch:
        at_step(patch, 8, raise_killed)
        with pytest.raises(Killed):
            pretrain(job, str(tmp_path))
    assert read_header(f"{tmp_path}/checkpoints").step == 6
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 7
    jobs.assert_identical(jobs.run(job, tmp_path), uninterrupted)
    dropped = [row["step"] for row in read_metrics(tmp_path / "metrics.dropped.jsonl")]
    assert dropped == [7]

    # Steps 2 and 3 were traced by the call that ran them, and by no later one.
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1

    # A complete run that is started again has the same outcome and writes nothing.
    before = (tmp_path / "metrics.jsonl").read_text()
    outcome = pretrain(job, str(tmp_path))
    assert outcome.finished and outcome.step == 9
    assert outcome.evaluations["h"].loss == uninterrupted.series("eval/h/loss")[0][1]
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_each_part_of_a_run_may_use_another_mesh(uninterrupted, data, tmp_path):
    """8 fsdp, then 4 × 2, one device, and 2 × 2 × 2."""
    for steps, mesh, devices in (
        (2, MeshConfig(fsdp=8), 8),
        (4, MeshConfig(data=4, fsdp=2), 8),
        (6, MeshConfig(fsdp=1), 1),
        (9, MeshConfig(fsdp=2, context=2, tensor=2), 8),
    ):
        job = jobs.make(data, mesh=mesh, train={"steps": steps})
        jobs.run_on(job if steps == 9 else dataclasses.replace(job, eval=""), tmp_path, devices)
    jobs.assert_close(jobs.read(job, tmp_path), uninterrupted)


@pytest.mark.slow
def test_run_resumes_from_the_checkpoint_before_a_damaged_one(uninterrupted, data, tmp_path):
    job = jobs.make(data)
    pretrain(dataclasses.replace(job, train=dataclasses.replace(job.train, steps=6)), str(tmp_path))
    newest = tmp_path / "checkpoints" / "step_00000006"
    array = max(
        (path for path in newest.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    os.truncate(array, array.stat().st_size // 2)
    result = jobs.run(job, tmp_path)
    rows = [row for row in result.rows if row["step"] == 6]
    assert len(rows) == 1  # that at step 6, of the shorter run, was dropped
    jobs.assert_identical(result, uninterrupted)
    assert (tmp_path / "checkpoints" / "step_00000006.damaged").is_dir()


@pytest.mark.slow
def test_size_one_axes_in_types_change_nothing(uninterrupted, data, tmp_path):
    jax.config.update("jax_remove_size_one_mesh_axis_from_type", False)
    try:
        result = jobs.run(jobs.make(data), tmp_path)
    finally:
        jax.config.update("jax_remove_size_one_mesh_axis_from_type", True)
    jobs.assert_close(result, uninterrupted, rtol=3e-5)


@pytest.mark.slow
def test_a_run_that_diverges_stops_and_leaves_good_checkpoints(data, tmp_path):
    job = jobs.make(
        data,
        optimizer={"peak_lr": 1e16},
        train={"max_skipped": 3, "checkpoint_every": 1, "steps": 50},
    )
    job = dataclasses.replace(job, optimizer=dataclasses.replace(job.optimizer, decay_steps=0))
    with pytest.raises(TrainingDiverged, match=r"step 4: the last 3 .*train.max_skipped"):
        pretrain(job, str(tmp_path))
    result = jobs.read(job, tmp_path)
    assert result.step == 3 and result.leaves[".skipped"] == 2
    assert all(np.isfinite(leaf).all() for leaf in result.leaves.values())
    assert np.isnan(result.series("loss")[-1][1])


def test_held_out_loss_equals_that_of_single_windows(data):
    job = jobs.make(data)
    manifest = read_manifest(data / "h")
    wanted = {
        "packing": "masked",
        "seq_len": jobs.SEQ_LEN,
        "tokenizer_sha256": manifest.tokenizer_sha256,
    }
    found = {}
    for batch_size in (8, 16):
        mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
        with jax.set_mesh(mesh):
            shardings = jax.tree.map(
                lambda a: a.sharding, abstract_state(job.step_config, mesh).params
            )
            params = jax.jit(
                lambda key: init_state(job.step_config, key).params, out_shardings=shardings
            )(jax.random.key(3))
            sources = {"h": str(data / "h")}
            found[batch_size] = evaluate(
                params, sources, job.step_config, mesh, batch_size=batch_size, **wanted
            )["h"]
    params = jax.device_put(jax.device_get(params), jax.devices()[0])
    nll = tokens = 0.0
    for row in eval_batches(data / "h", 16, **wanted):
        logits, _ = jax.jit(
            lambda row: forward(
                params,
                row["tokens"],
                job.model,
                ForwardOptions(dtype="float32"),
                segment_ids=row["segment_ids"],
                positions=row["positions"],
            )
        )(row)
        logprobs = np.asarray(jax.nn.log_softmax(logits))
        picked = np.take_along_axis(logprobs, row["targets"][..., None], -1)[..., 0]
        nll -= float((picked * row["loss_mask"]).sum())
        tokens += float(row["loss_mask"].sum())
    for result in found.values():
        assert (result.tokens, result.n_bytes) == (manifest.target_tokens, manifest.target_bytes)
        assert result.tokens == tokens
        assert result.loss == pytest.approx(nll / tokens, rel=1e-5)
        assert result.bits_per_byte == pytest.approx(nll / np.log(2) / result.n_bytes, rel=1e-5)


@pytest.mark.parametrize("text", ["h", "=x", "h=", "h=x,h=y"])
def test_malformed_eval_sources_are_refused(text):
    with pytest.raises(UserError, match="write name=FOLDER,name=FOLDER with each name once"):
        parse_eval_sources(text)


def test_a_refused_start_writes_nothing(data, tmp_path):
    """Each is refused before anything is computed or written."""
    # Detected when the step is traced: no implementation supports both.
    dropout = {"model": {"attn_dropout": 0.1}, "options": {"attention": "chunked"}}
    for change, message in [
        ({"eval": f"h={data}/none"}, "none does not exist"),
        ({"mesh": MeshConfig(fsdp=3)}, "needs 3 devices but there are 8"),
        ({"tokenizer": f"{data}/none"}, "none does not exist"),
        (dropout, "'chunked' can't serve .* no dropout on attention weights"),
        ({"data": {"seq_len": 8}}, "packed with seq_len 16, the config has 8"),
        ({"data": {"global_batch": 12}}, "data.global_batch=12 is not a multiple"),
        ({"model": {"vocab_size": 256}}, "464 ids but model.vocab_size is 256"),
    ]:
        with pytest.raises(UserError, match=message):
            pretrain(jobs.make(data, **change), str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()
