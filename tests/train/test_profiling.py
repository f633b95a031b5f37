"""A profile has exactly the requested steps, with their numbers and the names of model scopes."""

import dataclasses
import gzip
import json
import logging
import re

import jax
import pytest

from qwen_jax.errors import UserError
from qwen_jax.train.pretrain import pretrain
from qwen_jax.train.profiling import Profiler, parse_steps
from tests.train import jobs

SCOPES = ("embed", "layers", "attention", "mlp", "final_norm", "loss", "optimizer")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5", "write FIRST,LAST such as 10,15"),
        ("1,2,3", "write FIRST,LAST"),
        ("-1,3", "write FIRST,LAST"),
        ("a,b", "write FIRST,LAST"),
        ("0,3", "the first at least 1"),
        ("7,3", "must be in order"),
    ],
)
def test_malformed_profile_steps_are_refused(text, message):
    with pytest.raises(UserError, match=f"train.profile_steps is '{text}'.*{message}"):
        parse_steps(text)


def test_first_and_last_step_are_included():
    assert parse_steps("") is None
    assert parse_steps("10, 15") == (10, 15)
    assert parse_steps("3,3") == (3, 3)


@pytest.mark.slow
def test_a_run_traces_exactly_the_requested_steps_with_scope_names(tmp_path):
    data = jobs.write_data(tmp_path)
    job = jobs.make(data, train={"steps": 4, "profile_steps": "2,3"})
    job = dataclasses.replace(job, eval="")
    assert pretrain(job, str(tmp_path / "run")).finished
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    events = [
        event
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
    ]
    steps = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
    assert steps == [2, 3]
    content = trace.read_bytes()
    # As in jit(train_step)/jvp(embed)/…: a part of the path, alone or inside a transformation.
    missing = [name for name in SCOPES if not re.search(rf"[/(]{name}[/)]".encode(), content)]
    assert not missing
    (perfetto,) = (tmp_path / "run" / "profile").rglob("perfetto_trace.json.gz")
    shown = json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]
    assert [e["args"]["step_num"] for e in shown if e.get("name") == "train"] == ["2", "3"]


def test_steps_done_before_are_not_traced_again(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    profiler = Profiler((2, 3), str(tmp_path / "profile"), done=3)
    with profiler.step(4):
        pass
    assert not profiler.ends_with(4)
    profiler.stop()
    assert not (tmp_path / "profile").exists()
    assert "train.profile_steps=2,3: these steps are done" in caplog.text


def test_an_interrupted_run_writes_what_it_traced(tmp_path):
    profiler = Profiler((1, 100), str(tmp_path))
    for number in (1, 2):
        with profiler.step(number):
            jax.block_until_ready(jax.numpy.ones(3) + number)
        assert not profiler.ends_with(number)
    profiler.stop()
    profiler.stop()  # a second call does nothing
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1
