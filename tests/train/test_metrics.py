"""Metrics: every step once after any kill and resume, valid JSON, readable log lines."""

from __future__ import annotations

import json
import logging
import math
import struct
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import UserError
from qwen_jax.train import metrics
from qwen_jax.train.metrics import ConsoleWriter, JsonlWriter, make_writer, read_metrics


def write_steps(path, steps, resume_step=0, scale=1.0):
    writer = JsonlWriter(path, resume_step=resume_step)
    for step in steps:
        writer.write(step, {"loss": scale / step})
    writer.close()


def steps_of(path) -> list[int]:
    return [row["step"] for row in read_metrics(path)]


def test_a_resumed_run_has_every_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 11))
    write_steps(path, range(7, 13), resume_step=6, scale=2.0)
    write_steps(path, range(12, 15), resume_step=11, scale=3.0)
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == list(range(1, 15))
    expected = [(1.0 if s <= 6 else 2.0 if s <= 11 else 3.0) / s for s in range(1, 15)]
    assert [row["loss"] for row in rows] == expected
    # Lines of repeated steps are kept in another file.
    assert steps_of(tmp_path / "metrics.dropped.jsonl") == [7, 8, 9, 10, 12]


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_truncated_last_line_is_ignored_and_overwritten(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2, 3])
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    assert steps_of(path) == [1, 2]
    write_steps(path, [3, 4], resume_step=2)
    assert steps_of(path) == [1, 2, 3, 4]
    assert not list(tmp_path.glob("*.partial"))


def test_non_finite_values_are_valid_json_and_read_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = {"nan": math.nan, "up": math.inf, "down": -math.inf, "fine": 0.1 + 0.2}
    writer = JsonlWriter(path, resume_step=0)
    writer.write(1, values)
    writer.close()
    row = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert row["nan"] == "NaN"
    back = read_metrics(path)[0]
    assert math.isnan(back["nan"])
    assert (back["up"], back["down"], back["fine"]) == (math.inf, -math.inf, 0.1 + 0.2)


def test_a_malformed_line_in_the_middle_is_reported_by_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(UserError, match=r"Line 2 of .*metrics.jsonl is not a JSON object"):
        read_metrics(path)
    with pytest.raises(UserError, match=r"none.jsonl cannot be read"):
        read_metrics(tmp_path / "none.jsonl")


def test_unusable_paths_and_names_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        JsonlWriter(tmp_path / "file" / "metrics.jsonl", resume_step=0)
    with pytest.raises(UserError, match="must be a local path"):
        JsonlWriter("gs://bucket/metrics.jsonl", resume_step=0)
    with pytest.raises(UserError, match=r"'jsonnl' is unknown \(did you mean 'jsonl'\?\)"):
        make_writer(tmp_path, total_steps=1, names=["jsonnl"])


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with make_writer(tmp_path / "run", total_steps=2) as writer:
        writer.write(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def _events(folder):
    """Reads TensorBoard event files: length, checksum, record, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            events.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return events


def _as_viewed(events) -> dict[int, float]:
    """Values that TensorBoard shows: a START entry at step s hides earlier values from s on."""
    shown: dict[int, float] = {}
    for event in sorted(events, key=lambda e: e.wall_time):
        if event.HasField("session_log") and event.session_log.status == 1:
            shown = {s: v for s, v in shown.items() if s < event.step}
        for value in event.summary.value:
            shown[event.step] = value.simple_value
    return shown


def test_all_writers_get_the_numbers_and_tensorboard_hides_repeated_steps(tmp_path):
    for resume_step, steps, loss in ((0, range(1, 7), 1.0), (3, range(4, 6), 2.0)):
        with make_writer(tmp_path, total_steps=6, resume_step=resume_step) as writer:
            for step in steps:
                writer.write(step, {"loss": jnp.float32(loss)})
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5]
    shown = _as_viewed(_events(tmp_path / "tensorboard"))
    assert shown == {1: 1.0, 2: 1.0, 3: 1.0, 4: 2.0, 5: 2.0}


def test_console_lines_are_aligned_and_show_progress(caplog, monkeypatch):
    times = iter([0.0, 10.0, 20.0])
    writer = ConsoleWriter(total_steps=10_000)
    monkeypatch.setattr(writer._eta, "_clock", lambda: next(times))
    with caplog.at_level(logging.INFO, logger="absl"):
        rest = {"param_norm": 7.0, "memory/host_peak_gib": 1.5, "skipped": 0.0}
        writer.write(100, {"lr": 3e-4, "loss": 10.3456, "tokens_per_second": 1_234_567.0, **rest})
        writer.write(200, {"lr": 2.5e-5, "loss": 9.5, "tokens_per_second": 990_000.0, **rest})
        rest["skipped"] = 2.0
        writer.write(300, {"lr": 0.0, "loss": math.nan, "tokens_per_second": 1e6, **rest})
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "step    100/10,000   1%  loss 10.346  lr 3.00e-04  tokens_per_second 1.23M  eta ?",
        "step    200/10,000   2%  loss    9.5  lr 2.50e-05  tokens_per_second  990k  eta 16m 20s",
        "step    300/10,000   3%  loss    nan  lr        0  tokens_per_second 1.00M  skipped 2  "
        "eta 16m 10s",
    ]


def test_missing_wandb_is_refused_with_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"not installed: run `pip install wandb`, or leave"):
        make_writer(tmp_path, total_steps=1, names=["wandb"])


def test_wandb_is_imported_only_if_used_and_resumes_the_same_run(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, scalars, step):
            calls.append((step, scalars))

        def finish(self):
            calls.append("finish")

    stand_in = types.SimpleNamespace(init=lambda **options: calls.append(options) or Run())
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    make_writer(tmp_path, total_steps=1, names=["console"]).close()
    assert calls == []
    for _ in range(2):
        with make_writer(
            tmp_path, total_steps=2, names=["wandb"], wandb_project="p", config={"lr": 1.0}
        ) as writer:
            writer.write(1, {"loss": np.float32(0.5)})
    first, _, _, second, _, _ = calls
    assert first == second
    assert first["resume"] == "allow" and first["config"] == {"lr": 1.0} and len(first["id"]) == 12
    assert calls[1:3] == [(1, {"loss": 0.5}), "finish"]


def test_format_value_keeps_four_digits_in_nine_characters():
    for value, text in [
        (2.34567, "2.3457"), (0.123456, "0.1235"), (1e-5, "1.00e-05"), (128, "128"),
        (0, "0"), (-3.5, "-3.5"), (123_456_789, "123M"), (-math.inf, "-inf"),
    ]:  # fmt: skip
        assert metrics.format_value(value) == text
        assert len(text) <= 9
