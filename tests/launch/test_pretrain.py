"""launch.pretrain: kills and resumes change no number; bad input gives one sentence."""

import os
import pathlib
import re
import shutil
import signal
import time

import pytest

from qwen_jax.corpus import Document, PackConfig, pack
from qwen_jax.tokenizer import load_tokenizer
from qwen_jax.tokenizer.huggingface import byte_order
from qwen_jax.train.checkpoint import read_header
from qwen_jax.train.metrics import read_metrics
from tests import programs
from tests.train import jobs

STEPS = 90
PROGRAM = "launch.pretrain"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return jobs.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", autouse=True)
def compile_once(tmp_path_factory):
    """Lets programs reuse the steps that earlier ones compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
        yield


def flags(data, workdir):
    return [f"--config=tests/train/recipe.py:{data}", f"--workdir={workdir}", "--cpu_devices=8"]


class TrainingProcess:
    """A training program in a separate process, observed through its output."""

    def __init__(self, data, workdir, log):
        self.log = log
        self.start = log.stat().st_size if log.exists() else 0
        more = [f"--config.train.steps={STEPS}", "--config.train.checkpoint_every=20"]
        self.process = programs.start(PROGRAM, [*flags(data, workdir), *more], log)

    def output(self):
        return self.log.read_text()[self.start :]

    def when(self, pattern, number, timeout=120):
        """Sends the signal as soon as the output has the pattern; returns the exit status."""
        deadline = time.monotonic() + timeout
        while not re.search(pattern, self.output()):
            assert self.process.poll() is None and time.monotonic() < deadline, self.output()
            time.sleep(0.002)
        self.process.send_signal(number)
        return self.process.wait(timeout)


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """Working folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = TrainingProcess(data, folder / "run", folder / "log")
    assert run.process.wait(180) == 0, run.output()
    return folder / "run"


@pytest.mark.slow
def test_kills_and_sigterm_at_any_moment_change_no_number(data, uninterrupted, tmp_path):
    log, run = tmp_path / "log", tmp_path / "run"
    # In the middle of the first checkpoint's asynchronous save; nothing complete is on disk yet.
    assert TrainingProcess(data, run, log).when("Saving checkpoint .*20", signal.SIGKILL) == -9
    # Between two checkpoints, or in the middle of a save with an older one there.
    assert TrainingProcess(data, run, log).when(r"step +4\d/", signal.SIGKILL) == -9
    # SIGTERM: saves, logs it, and exits with 0.
    stopping = TrainingProcess(data, run, log)
    assert stopping.when(r"step +6\d/", signal.SIGTERM) == 0
    stopped = int(
        re.search(r"stopped at step (\d+); run the same command to resume", stopping.output())[1]
    )
    assert read_header(f"{run}/checkpoints").step == stopped < STEPS
    last = TrainingProcess(data, run, log)
    assert last.process.wait(180) == 0, last.output()
    assert f"step {stopped} of {STEPS}" in last.output()

    job = jobs.make(data)
    jobs.assert_identical(jobs.read(job, run), jobs.read(job, uninterrupted))
    assert not list((run / "checkpoints").glob("*tmp*"))


def snapshot(folder):
    """Returns size and modification time of every file below a folder."""
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in pathlib.Path(folder).rglob("*")
        if path.is_file()
    }


def damaged_copy(source, target, how):
    """Copies a packed folder and damages its shard: missing, empty or truncated."""
    shutil.copytree(source, target)
    shard = next(target.glob("*.array_record"))
    if how == "missing":
        shard.unlink()
    else:
        os.truncate(shard, 0 if how == "empty" else shard.stat().st_size // 2)
    return target


def refused_starts(data, new, tmp):
    """Returns (flags, part of the message) of starts that must be refused in a new workdir."""
    base = flags(data, new)
    config, workdir, cpu = base
    (tmp / "noise.tiktoken").write_bytes(os.urandom(1000))
    (tmp / "empty.tiktoken").write_bytes(b"")
    (tmp / "foreign.tiktoken").write_text('{"model": "unigram"}\n')
    (tmp / "broken.py").write_text("x = 1\n")
    one = [Document("d", "one document that is long enough for a window")]
    pack(one, tmp / "len32", load_tokenizer(f"{data}/bytes.tiktoken"), PackConfig(32))
    cases = [
        ([workdir], "--config is missing: give a recipe"),
        ([config, cpu], "--workdir is missing: give a folder"),
        ([*base, "--wrkdir=x"], "Unknown command line flag 'wrkdir'"),
        ([*base, "steps=3"], "'steps=3' is not a flag"),
        (["--config=configs/pretrain.py:8b", workdir], r"recipe '8b' is unknown (did you mean"),
        (["--config=configs/pretrian.py", workdir], "configs/pretrian.py is not a Python file"),
        ([f"--config={tmp}/broken.py", workdir], "broken.py has no get_config"),
    ]
    settings = [
        ("optmizer.peak_lr=1", "config.optmizer is not a setting (did you mean 'optimizer'?)"),
        ("optimizer.peaklr=1", "config.optimizer.peaklr is not a setting (did you mean 'peak_lr'?"),
        ("train.steps=many", "--config.train.steps=many"),
        ("train.steps=1.5", "--config.train.steps=1.5"),
        ("train.steps=0", "train.steps is 0; it must be at least 1"),
        ("train.profile_steps=5", "train.profile_steps is '5'; write FIRST,LAST such as 10,15"),
        ("train.profile_steps=5,x", "train.profile_steps is '5,x'; write FIRST,LAST"),
        ("train.profile_steps=5,4", "train.profile_steps is '5,4'; the steps must be in order"),
        ("train.profile_steps=10,11", "but the run ends with step 9 (train.steps)"),
        ("optimizer.peak_lr=nan", "config.optimizer.peak_lr is not a number"),
        ("optimizer.decay_steps=1", "optimizer.decay_steps=1 is not past"),
        ("model.family=qwen4", "config.model.family is 'qwen4' (did you mean"),
        ("model.windows=(1,)", "model.windows names 1 layers but model.n_layers is 2"),
        ("model.windows=('a',2)", "config.model.windows[0] is 'a' (str); it must be int"),
        ("model.yarn.factor=2", "config.model.yarn is None and has no 'factor'"),
        ("model.n_kv_heads=3", "model.n_heads=4 is not a multiple of model.n_kv_heads=3"),
        ("model.vocab_size=256", "has 464 ids but model.vocab_size is 256"),
        ("options.dtype=float31", "options.dtype is 'float31' (did you mean"),
        ("options.attention=chunkd", "options.attention is 'chunkd' (did you mean 'chunked'?)"),
        ("data.packing=maskd", "config.data.packing is 'maskd' (did you mean 'masked'?)"),
        ("data.global_batch=12", "data.global_batch=12 is not a multiple of data×fsdp"),
        ("data.seq_len=8", "packed with seq_len 16, the config has 8"),
        ("data.seq_len=32", "data.seq_len=32 is longer than model.max_length=16"),
        ("model.logn=True", "data.seq_len=16 is not model.trained_length=2048"),
        ("loss.chunk=0", "loss.chunk=0 at least 1"),
        ("optimizer.b2=1.5", "optimizer.b2 is 1.5; it must be in [0, 1)"),
        (f"data.sources={tmp}/len32", "packed with seq_len 32, the config has 16"),
        ("data.sources=", "data.sources is empty"),
        ("data.sources=x=heavy", "data.sources has 'x=heavy'"),
        (f"data.sources={tmp}", "has no manifest.json"),
        (f"tokenizer={tmp}/none", "none does not exist"),
        (f"tokenizer={tmp}/noise.tiktoken", "noise.tiktoken"),
        (f"tokenizer={tmp}/empty.tiktoken", "empty.tiktoken"),
        (f"tokenizer={tmp}/foreign.tiktoken", "foreign.tiktoken"),
        (f"eval=h={data}/none", "none does not exist"),
        ("eval=h", "eval has 'h'; write name=FOLDER"),
        ("mesh.fsdp=3", "needs 3 devices but there are 8"),
    ]
    for how in ("missing", "empty", "truncated"):
        folder = damaged_copy(data / "a", tmp / how, how)
        settings += [(f"data.sources={folder}", str(folder)), (f"eval=h={folder}", str(folder))]
    cases += [([*base, f"--config.{setting}"], message) for setting, message in settings]
    over_heads = ["--config.mesh.fsdp=1", "--config.mesh.tensor=8"]
    cases.append(([*base, *over_heads], "mesh.tensor=8 does not divide model.n_heads=4"))
    return cases


@pytest.mark.slow
def test_every_refused_start_prints_one_sentence_and_writes_nothing(data, uninterrupted, tmp_path):
    new = tmp_path / "new"
    cases = refused_starts(data, new, tmp_path)
    # With checkpoints of another run in the workdir, the message names the field that differs.
    other = tmp_path / "other"
    other.mkdir()
    jobs.write_data(other, order=byte_order()[::-1])
    base = flags(data, uninterrupted)
    mixture = f"--config.data.sources={data}/a=1,{data}/b=1"
    for change, message in [
        (["--config.model.d_ff=40"], "model.d_ff = 48, this run has 40"),
        (["--config.optimizer.peak_lr=1"], "optimizer.peak_lr = 0.003, this run has 1.0"),
        (["--config.train.seed=1"], "seed = 0, this run has 1"),
        ([mixture], "data.proportions = [200, 100], this run has [100, 100]"),
        ([f"--config={base[0].split('=')[1].split(':')[0]}:{other}"], "tokenizer_sha256 = "),
    ]:
        cases.append(([*base, *change], message))
    before = snapshot(uninterrupted) | snapshot(data)
    results = programs.run([[PROGRAM, *case] for case, _ in cases])
    wrong = [
        f"{case[3:] or case}: {done.status} {done.output[-600:]}"
        for (case, message), done in zip(cases, results, strict=True)
        if done.status != 2
        or not done.last_line.startswith("error: ")
        or message not in done.last_line
        or "Traceback" in done.output
        or "step compiled" in done.output
    ]
    assert not wrong, "\n".join(wrong)
    assert not new.exists()
    assert snapshot(uninterrupted) | snapshot(data) == before


@pytest.mark.slow
def test_divergence_prints_one_sentence_and_exits_with_2(data, tmp_path):
    extreme = [
        "--config.optimizer.peak_lr=1e16",
        "--config.train.max_skipped=2",
        "--config.optimizer.decay_steps=0",
    ]
    (done,) = programs.run([[PROGRAM, *flags(data, tmp_path), *extreme]])
    assert done.status == 2
    assert done.last_line.startswith("error: training stopped at step 3: the last 2 steps had a")
    assert "optimizer.peak_lr" in done.last_line and "Traceback" not in done.output
    assert len(read_metrics(tmp_path / "metrics.jsonl")) >= 1
