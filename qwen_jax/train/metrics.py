"""Writers of training metrics (console, JSONL, TensorBoard, wandb), and a reader of the JSONL file.

`metrics.jsonl` has one JSON object per line: {"step": 20, "time": 1.7e9, "loss": 2.5}. JSON has no
NaN, so non-finite values are the strings "NaN", "Infinity", "-Infinity"; `read_metrics` converts
them back to floats. A run that resumes at step s first moves the lines of later steps, which it
will repeat, to `metrics.dropped.jsonl`.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import jax
from absl import logging

from qwen_jax.errors import UserError, nearest
from qwen_jax.progress import format_count, format_duration
from qwen_jax.train.throughput import Eta

WRITERS = ("console", "jsonl", "tensorboard", "wandb")


class MetricsWriter(Protocol):
    """Destination of scalars. Steps never decrease within a run."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars of one step by name."""

    def close(self) -> None:
        """Flushes what was written and releases files and connections."""


class ConsoleWriter:
    """Writer of one aligned log line per step: step, share of the run, values, remaining time.

    Meant for reading while a run goes: loss first, and without norms and memory, which the other
    writers have.
    """

    FIRST = ("loss", "bits_per_byte", "grad_norm", "lr", "tokens_per_second", "mfu")
    LEFT_OUT = ("param_norm", "update_norm", "tokens")

    def __init__(self, total_steps: int):
        """Prepares to write; `total_steps` is the last step of the run."""
        self._eta = Eta(total_steps)
        self._widths: dict[str, int] = {}

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs one line at level INFO."""
        total = self._eta.total_steps
        left = self._eta.seconds_left(step)
        digits = len(f"{total:,}")
        cells = [f"step {step:>{digits},}/{total:,} {100 * step / max(total, 1):3.0f}%"]
        first = [name for name in self.FIRST if name in scalars]
        for name in (*first, *(name for name in scalars if name not in first)):
            left_out = name in self.LEFT_OUT or name.startswith("memory/")
            if not left_out and (name != "skipped" or scalars[name]):
                cells.append(self._cell(name, scalars[name]))
        cells.append(f"eta {format_duration(left) if left is not None else '?'}")
        logging.info("%s", "  ".join(cells))

    def _cell(self, name: str, value: float) -> str:
        """Returns "name value", as wide as the widest so far of that name."""
        text = format_value(value)
        self._widths[name] = width = max(len(text), self._widths.get(name, 0))
        return f"{name} {text:>{width}}"

    def close(self) -> None:
        """Does nothing: a log needs no closing."""


def format_value(value: float) -> str:
    """Formats a scalar in at most nine characters: 2.3456, 3.00e-04, 128, 12.3k, nan."""
    if not math.isfinite(value):
        return str(float(value))
    if value == int(value) or abs(value) >= 1e4:
        return format_count(value)
    if abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.5g}" if abs(value) >= 1 else f"{value:.4f}"


class JsonlWriter:
    """Writer of one JSON line per step to a local file; a kill leaves no partial line.

    Raises:
      UserError: the path is not a local file that can be written.
    """

    def __init__(self, path: str | os.PathLike, *, resume_step: int):
        """Opens the file and moves the lines of steps that will be repeated.

        Args:
          path: the file; created if absent.
          resume_step: last step that is kept; later lines go to `metrics.dropped.jsonl`.
        """
        if "://" in os.fspath(path):
            raise UserError(f"{path} must be a local path: only checkpoints go to remote storage.")
        self._path = pathlib.Path(path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                _drop_after(self._path, resume_step)
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror}): choose another folder for metrics."
            ) from error

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends {"step", "time", **scalars} as one line, in a single system call."""
        row = {name: _to_json(value) for name, value in scalars.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **row}, allow_nan=False)
        os.write(self._file, line.encode() + b"\n")

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


class TensorBoardWriter:
    """Writer of TensorBoard event files; after a resume, TensorBoard hides repeated steps."""

    def __init__(self, folder: str | os.PathLike, *, resume_step: int):
        """Opens a new event file in `folder`, for the steps after `resume_step`."""
        from tensorboardX import SummaryWriter  # its import takes a second

        self._writer = SummaryWriter(
            os.fspath(folder),
            purge_step=resume_step + 1,
            flush_secs=10,
            # By default names differ only by the second, so a quick restart would overwrite a file.
            filename_suffix=f".{os.getpid()}.{uuid.uuid4().hex[:6]}",
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds one scalar per name."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


class WandbWriter:
    """Writer to Weights & Biases; a resumed run continues under the same id.

    Raises:
      UserError: the package wandb is not installed.
    """

    def __init__(
        self, folder: str | os.PathLike, *, project: str, config: Mapping[str, Any] | None = None
    ):
        """Starts or resumes the wandb run.

        Args:
          folder: local folder for wandb's files and `wandb_id.txt`, which has the id of the run.
          project: wandb project.
          config: what wandb shows as the configuration of the run.
        """
        try:
            import wandb
        except ImportError:
            raise UserError(
                "Metrics writer 'wandb' needs the package wandb, which is not installed: run "
                "`pip install wandb`, or leave 'wandb' out of the writers."
            ) from None
        record = pathlib.Path(folder) / "wandb_id.txt"
        if not record.exists():
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=project,
            id=record.read_text().strip(),
            resume="allow",
            dir=os.fspath(folder),
            config=dict(config or {}),
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs the scalars under `step`."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Uploads what is pending and ends the wandb run."""
        self._run.finish()


class MultiWriter:
    """Writer that passes scalars on to several others, after conversion to Python floats.

    A context manager that closes them.
    """

    def __init__(self, writers: Sequence[MetricsWriter]):
        """Takes the writers, in the order in which they are called; may be empty."""
        self._writers = tuple(writers)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes JAX, NumPy or Python scalars to all writers; waits for those on the device."""
        if not self._writers:
            return
        values = {name: float(value) for name, value in scalars.items()}
        for writer in self._writers:
            writer.write(step, values)

    def close(self) -> None:
        """Closes all writers."""
        for writer in self._writers:
            writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def make_writer(
    folder: str | os.PathLike,
    *,
    total_steps: int,
    resume_step: int = 0,
    names: Sequence[str] = ("console", "jsonl", "tensorboard"),
    wandb_project: str = "qwen_jax",
    config: Mapping[str, Any] | None = None,
) -> MultiWriter:
    """Opens the writers of a run; on every process but the first, returns one that does nothing.

    Args:
      folder: local folder in which `metrics.jsonl` and `tensorboard/` are written.
      total_steps: last step of the run, for progress and remaining time.
      resume_step: step of the restored checkpoint; 0 for a new run.
      names: which writers: "console", "jsonl", "tensorboard", "wandb".
      wandb_project: project for wandb.
      config: configuration shown by wandb.

    Returns:
      One writer to all of them.

    Raises:
      UserError: a name is unknown, the folder cannot be written, or wandb is not installed.
    """
    for name in names:
        if name not in WRITERS:
            raise UserError(
                f"Metrics writer {name!r} is unknown{nearest(name, WRITERS)}: choose from "
                f"{', '.join(WRITERS)}."
            )
    if jax.process_index() != 0:
        return MultiWriter(())
    folder = pathlib.Path(folder)
    makers: dict[str, Callable[[], MetricsWriter]] = {
        "console": lambda: ConsoleWriter(total_steps),
        "jsonl": lambda: JsonlWriter(folder / "metrics.jsonl", resume_step=resume_step),
        "tensorboard": lambda: TensorBoardWriter(folder / "tensorboard", resume_step=resume_step),
        "wandb": lambda: WandbWriter(folder, project=wandb_project, config=config),
    }
    return MultiWriter([makers[name]() for name in names])


def read_metrics(path: str | os.PathLike) -> list[dict[str, float]]:
    """Reads the rows of a `metrics.jsonl` in order, without a last line that is incomplete.

    Args:
      path: the file.

    Returns:
      Rows as {"step", "time", metric names…}.

    Raises:
      UserError: the file cannot be read, or a line other than the last is not a row.
    """
    try:
        lines = pathlib.Path(path).read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): name the metrics.jsonl of a run."
        ) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row is not None:
            rows.append({key: _from_json(value) for key, value in row.items()})
        elif number < len(lines):
            raise UserError(
                f"Line {number} of {path} is not a JSON object with a step: repair or remove it."
            )
    return rows


def _parse(line: bytes) -> dict | None:
    """Returns the row of a line of `metrics.jsonl`; None if it is incomplete or not a row."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    complete = line.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("step"), int)
    return row if complete else None


def _drop_after(path: pathlib.Path, step: int) -> None:
    """Moves lines of steps after `step`, and those that are no rows, to `<name>.dropped.jsonl`."""
    kept: list[bytes] = []
    dropped: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True):
        row = _parse(line)
        (kept if row is not None and row["step"] <= step else dropped).append(line)
    if not dropped:
        return
    with path.with_suffix(".dropped.jsonl").open("ab") as file:
        file.writelines(line if line.endswith(b"\n") else line + b"\n" for line in dropped)
    partial = path.with_suffix(".partial")
    partial.write_bytes(b"".join(kept))
    partial.replace(path)


_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _to_json(value: float) -> float | str:
    """Returns a float as it is written: non-finite ones by their names in `_NON_FINITE`."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def _from_json(value: Any) -> Any:
    """Returns a value as it was before `_to_json`."""
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
