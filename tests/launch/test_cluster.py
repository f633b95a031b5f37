"""Job files for clusters are valid and quote every value; the SLURM script is executed."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import jsonschema
import pytest
import yaml

from launch.cluster import cost as costs
from launch.cluster.job import ClusterJob, fit_recipe, parse_pairs, recipe_flags
from launch.cluster.render import render
from launch.cluster.slices import find_slice, slices
from qwen_jax.errors import UserError
from qwen_jax.parallel import MeshConfig
from qwen_jax.train.checkpoint import read_header
from qwen_jax.train.metrics import read_metrics
from tests import multiprocess, programs
from tests.launch import jobset, slurm_stand_in
from tests.train import jobs

FLAGS = ("--config=configs/pretrain.py:7b", "--config.data.sources=/data/web=1")
# Every character that means something to a shell, to YAML, to Kubernetes, to jinja or to systemd.
HOSTILE = (
    r"""/a b'c"d\e$(touch /tmp/pwned)`id`$HOME;&|<>*?[x]{y}~!#%n%%: - &a *b {{ z }} {% q %} é天"""
)
SECRETS = {"gke": "wandb/key", "tpu_vm": "wandb key'$(x)", "slurm": "/home/me/a b'$(x)/key"}


def job(scheduler: str, **changes) -> ClusterJob:
    """A job that renders on this scheduler."""
    tpu = {"slice": find_slice("v5e-256"), "project": "p", "zone": "us-west4-a"}
    common = {"name": "qwen", "flags": FLAGS, "workdir": "/work/7b", "checkpoints": "gs://b/7b"}
    special = {
        "gke": tpu | {"image": "r/p/i:1", "mounts": {"/work": "gs://b/work"}},
        "xpk": tpu | {"image": "r/p/i:1", "cluster": "c"},
        "tpu_vm": tpu,
        "slurm": {"nodes": 16},
    }
    return ClusterJob(**common | special[scheduler] | changes)


def shellcheck(text: str, *more: str) -> str:
    """What bash and ShellCheck have against a script; "" is nothing."""
    parsed = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    program = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.defpath}")
    assert program, "shellcheck is missing: pip install -r requirements/dev.txt"
    checked = subprocess.run(
        [program, "--shell=bash", *more, "-"], input=text, text=True, capture_output=True
    )
    return parsed.stderr + checked.stdout


def pods(text: str) -> dict:
    """The pod specification of a JobSet that is one, strictly."""
    document = yaml.safe_load(text)
    jsonschema.validate(document, jobset.SCHEMA)
    return document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", slices())
@pytest.mark.parametrize("count", [1, 3])
def test_jobset_has_one_pod_per_host_and_one_chip_per_device(name, count):
    one = find_slice(name)
    document = yaml.safe_load(render("gke", job("gke", slice=one, slices=count)))
    jsonschema.validate(document, jobset.SCHEMA)
    (replicated,) = document["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert spec["parallelism"] == spec["completions"]
    pod = spec["template"]["spec"]
    chips_per_pod = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert replicated["replicas"] * spec["parallelism"] * chips_per_pod == one.chips * count
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    number = int(name.partition("-")[2])
    per_chip = 1 if name.startswith(("v5e", "v6e")) else 2
    assert eval_product(topology) == one.chips == number // per_chip
    # Only several slices need the hosts' own network, and a name that leads to process 0.
    assert pod.get("hostNetwork", False) == (count > 1)


def eval_product(topology: str) -> int:
    product = 1
    for part in topology.split("x"):
        product *= int(part)
    return product


def test_jobset_contains_every_optional_setting():
    rich = job(
        "gke", namespace="ml", queue="tpus", service_account="trainer", reservation="r", spot=True,
        mounts={"/work": "gs://b", "/data": "claim", "/d2": "gs://b2/x/y"}, slices=2, restarts=7,
        secrets={"WANDB_API_KEY": "wandb/key"}, env={"A": "1"}, grace_s=99,
    )  # fmt: skip
    document = yaml.safe_load(render("gke", rich))
    pod = pods(render("gke", rich))
    assert document["metadata"]["namespace"] == "ml"
    assert document["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "tpus"}
    assert document["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert pod["terminationGracePeriodSeconds"] == 99
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["nodeSelector"]["cloud.google.com/reservation-name"] == "r"
    (container,) = pod["containers"]
    mounted = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    sources = {
        mounted[v["name"]]: v.get("persistentVolumeClaim", v.get("csi")) for v in pod["volumes"]
    }
    assert sources["/data"] == {"claimName": "claim"}
    assert sources["/work"]["volumeAttributes"]["bucketName"] == "b"
    assert sources["/d2"]["volumeAttributes"]["mountOptions"] == "implicit-dirs,only-dir=x/y"
    env = {e["name"]: e.get("value", e.get("valueFrom")) for e in container["env"]}
    assert env["A"] == "1" and env["JAX_PLATFORMS"] == "tpu,cpu"
    assert env["WANDB_API_KEY"] == {"secretKeyRef": {"name": "wandb", "key": "key"}}


def test_stopped_run_restarts_without_counting_as_a_failure():
    """The status of a stopped run, the pod's rule for it and the set's rule are one chain."""
    document = yaml.safe_load(render("gke", job("gke")))
    spec = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    (code,) = spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    (container,) = spec["template"]["spec"]["containers"]
    assert f"--stopped_status={code}" in container["command"]
    assert spec["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    assert {r["action"] for r in spec["podFailurePolicy"]["rules"]} == {"FailJob"}
    assert spec["backoffLimit"] == 0
    (rule,) = document["spec"]["failurePolicy"]["rules"]
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"


def _variants(scheduler: str):
    """Jobs with every combination of what changes the shape of a script."""
    switches = {
        "tpu_vm": {
            "spot": True,
            "reservation": "r",
            "service_account": "s",
            "slices": 2,
            "mounts": {"/data": "gs://b/a b'$(x)", "/c": "gs://c"},
        },
        "slurm": {"tasks_per_node": 1, "code": "/c", "partition": "x", "time_limit": "1-00:00:00"},
        "xpk": {"slices": 2, "env": {"A": "b"}},
    }[scheduler]
    for chosen in itertools.product([False, True], repeat=len(switches)):
        on = {k: v for (k, v), use in zip(switches.items(), chosen, strict=True) if use}
        yield job(scheduler, **on)


@pytest.mark.parametrize("scheduler", ["tpu_vm", "slurm", "xpk"])
def test_scripts_pass_bash_and_shellcheck(scheduler):
    for variant in _variants(scheduler):
        assert not shellcheck(render(scheduler, variant), "--exclude=SC2016"), variant
    if scheduler != "xpk":
        secret = {"WANDB_API_KEY": SECRETS[scheduler]}
        assert not shellcheck(render(scheduler, job(scheduler, secrets=secret)), "-e", "SC2016")


def words_after(text: str, marker: str) -> list[str]:
    """The words of the shell command that begins with `marker`, as a shell reads them."""
    command = text[text.index(marker) :].replace("\\\n", " ").splitlines()[0]
    return shlex.split(command)


def test_values_are_quoted_in_every_file():
    """Hostile folders, flags and variables arrive in the program as they were given."""
    flags = (*FLAGS, f"--config.tokenizer={HOSTILE}")
    changes = {"flags": flags, "workdir": HOSTILE, "env": {"A": HOSTILE}, "code": HOSTILE}
    for scheduler in ("gke", "tpu_vm", "slurm", "xpk"):
        more = {}
        if scheduler == "gke":
            more = {"mounts": {HOSTILE: "claim"}}
        wanted = job(scheduler, **changes, **more)
        text = render(scheduler, wanted)
        command = list(wanted.command)
        if scheduler == "gke":
            pod = pods(text)
            (container,) = pod["containers"]
            assert [kubernetes(word) for word in container["command"]] == command
            env = {e["name"]: kubernetes(e["value"]) for e in container["env"]}
            assert env["A"] == HOSTILE and container["workingDir"] == HOSTILE
            continue
        # SC2016: that single quotes keep $(…) as it is, is just what is wanted here.
        assert not shellcheck(text, "--exclude=SC2016")
        if scheduler == "xpk":
            words = words_after(text, "xpk workload create")
            inner = next(w for w in words if w.startswith("--command=")).partition("=")[2]
            assert shlex.split(inner)[-len(command) :] == command
            assert f"--env=A={HOSTILE}" in words
        else:
            start = "srun" if scheduler == "slurm" else "exec python3"
            words = words_after(text, start)
            begin = words.index("python3")
            assert words[begin : begin + len(command)] == command
            assert f"export A={shlex.quote(HOSTILE)}" in text


def kubernetes(text: str) -> str:
    """What Kubernetes makes of a word: $$ is a $, $(NAME) a variable."""
    assert not re.search(r"(?<!\$)(\$\$)*\$\(", text), "would be replaced"
    return text.replace("$$", "$")


def test_line_breaks_are_refused_in_every_value():
    for name in ("workdir", "checkpoints", "code", "image"):
        with pytest.raises(UserError, match=f"--{name} has .* with a line break"):
            job("gke", **{name: "/a\nrm -rf /"})
    with pytest.raises(UserError, match="with a line break"):
        job("gke", env={"A": "x\ny"})


@pytest.mark.parametrize(
    ("scheduler", "changes", "message"),
    [
        ("gke", {"slice": None}, "--slice is missing, which gke needs; give --slice=v5e-256"),
        ("gke", {"image": ""}, "--image is missing, which gke needs"),
        ("gke", {"workdir": "/tmp/x"}, "--workdir=/tmp/x would be deleted with the pod; mount"),
        ("gke", {"checkpoints": "/x"}, "--checkpoints=/x would be deleted with the pod"),
        ("gke", {"mounts": {"work": "gs://b"}}, r"--mount=work=gs://b must be /FOLDER="),
        ("gke", {"mounts": {"/": "gs://b"}}, "--mount=/=gs://b must be /FOLDER="),
        ("tpu_vm", {"mounts": {"/d": "claim"}}, "--mount=/d=claim must be /FOLDER=gs://BUCKET"),
        ("gke", {"secrets": {"A": "x"}}, "--secret=A=x must be A=SECRET/KEY"),
        ("gke", {"partition": "x"}, "gke does not use --partition"),
        ("gke", {"name": "Qwen"}, "--name=Qwen is not a valid job name"),
        ("gke", {"name": "q" * 41}, "is not a valid job name"),
        ("gke", {"image": "a b"}, "--image=a b may only have letters"),
        ("gke", {"env": {"A B": "x"}}, "'A B' is no name for an environment variable"),
        ("gke", {"slices": 0}, "--slices=0 must be at least 1"),
        ("gke", {"restarts": -1}, "--restarts=-1 must be at least 0"),
        ("xpk", {"secrets": {"A": "x"}}, "xpk does not use --secrets"),
        ("xpk", {"checkpoints": "/x"}, "--checkpoints=/x must be gs://BUCKET/FOLDER with xpk"),
        ("tpu_vm", {"slice": find_slice("tpu7x-128")}, "tpu7x-128 is only available on GKE"),
        ("tpu_vm", {"project": ""}, "--project is missing, which tpu_vm needs"),
        ("tpu_vm", {"workdir": "x"}, "--workdir=x must be an absolute path on the TPU VM"),
        ("slurm", {"workdir": "runs/x"}, "--workdir=runs/x must be an absolute path on shared"),
        ("slurm", {"workdir": "gs://b/x"}, "--workdir=gs://b/x must be an absolute path on shared"),
        ("slurm", {"slice": find_slice("v5e-8")}, "slurm does not use --slice"),
        ("slurm", {"tasks_per_node": 3}, "--tasks_per_node=3 must be 8, one process per GPU, or 1"),
    ],
)
def test_values_that_a_scheduler_cannot_use_are_refused(scheduler, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        render(scheduler, job(scheduler, **changes))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-250", "--slice=v5e-250 is unknown (did you mean 'v5e-256'?); v5e has v5e-8, "),
        ("v5p-100", "(did you mean 'v5p-128'?)"),
        ("v6-256", "(did you mean 'v6e-256'?)"),
        ("h100", "choose a size of v4, v5e, v5p, v6e, tpu7x, such as v5e-256"),
    ],
)
def test_error_for_an_unknown_slice_suggests_the_nearest(name, message):
    with pytest.raises(UserError, match=re.escape(message)):
        find_slice(name)


def test_slices_have_the_names_of_gke_and_cloud_tpu():
    assert find_slice("v5litepod-16") == find_slice("v5e-16")
    assert find_slice("v5e-256").accelerator == "v5litepod-256"
    assert (find_slice("v5p-128").chips, find_slice("v5p-128").hosts) == (64, 16)
    assert (find_slice("tpu7x-128").chips, find_slice("tpu7x-128").devices) == (64, 128)


def test_recipe_is_checked_against_its_devices():
    toy = jobs.make("/data")
    assert fit_recipe(toy, 8, 1) == ()
    two = jobs.make("/data", mesh=MeshConfig(fsdp=-1))
    assert fit_recipe(two, 8, 2) == ("--config.mesh.data=2",)
    given = jobs.make("/data", mesh=MeshConfig(data=4, fsdp=-1))
    assert fit_recipe(given, 8, 2) == ()
    for recipe, devices, count, message in (
        (toy, 16, 1, "needs 8 devices but there are 16"),
        (given, 12, 3, "mesh.data=4 is not a multiple of the 3 slices"),
        (two, 16, 1, "data.global_batch=8 is not a multiple of data×fsdp×microbatches"),
        (jobs.make("/data", data={"sources": ""}), 8, 1, "data.sources is empty"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            fit_recipe(recipe, devices, count)


def test_recipe_flags_and_name_value_pairs_are_parsed():
    argv = ["gke", "--config", "a.py:7b", "--slice=v5e-8", "--config.a.b=1 2", "--noconfig.x", "-v"]
    assert recipe_flags(argv) == ("--config=a.py:7b", "--config.a.b=1 2", "--noconfig.x")
    argv = ["--config.a", "--slice=v5e-8", "--config.b", "-1", "--config.c", "x", "--config.d"]
    assert recipe_flags(argv) == ("--config.a", "--config.b=-1", "--config.c=x", "--config.d")
    assert parse_pairs("env", ["A=b=c"]) == {"A": "b=c"}
    for wrong in (["A"], ["=b"], ["A="], ["A=1", "A=2"]):
        with pytest.raises(UserError, match="--env"):
            parse_pairs("env", wrong)


def test_run_cost_equals_its_formula():
    found = costs.run_cost(2.4e12, 2000.0, chips=256, price_per_chip_hour=1.5, goodput=0.8)
    assert found.chip_hours == pytest.approx(2.4e12 / 2000 / 3600 / 0.8)
    assert found.days == pytest.approx(found.chip_hours / 256 / 24)
    assert found.money == pytest.approx(1.5 * found.chip_hours)
    bare = costs.run_cost(3600.0, 1.0)
    assert (bare.chip_hours, bare.days, bare.money) == (1.0, None, None)
    for wrong in ((0, 1, {}), (1, -1, {}), (1, 1, {"goodput": 2}), (1, 1, {"chips": 0})):
        with pytest.raises(UserError, match=r"must be a positive number|at most 1"):
            costs.run_cost(wrong[0], wrong[1], **wrong[2])


def test_program_writes_files_and_refuses_bad_input(tmp_path):
    """The way a person uses it: words on the command line, a file or the terminal."""
    report = tmp_path / "7b.json"
    report.write_text(json.dumps({"prediction": {"tokens_per_second_per_chip": 2000.0}}))
    (tmp_path / "bad.json").write_text("[1]")
    (tmp_path / "gpu.json").write_text('{"prediction": null, "roofline": {"mfu": 0.7}}')
    (tmp_path / "big.json").write_text('{"topology": "v5e:4x4", "memory": {"fits": false}}')
    recipe = ["--config=configs/pretrain.py:7b", "--config.data.sources=/data/web=1"]
    gke = ["gke", *recipe, "--slice=v5e-256", "--image=i", "--workdir=/w", "--mount=/w=claim"]
    slurm = ["slurm", *recipe, "--nodes=2", "--workdir=/nfs/x"]
    out = tmp_path / "new" / "job.yaml"
    price = ["--price_per_chip_hour=1.5", "--chips=256"]
    calls = [
        [*gke, f"--out={out}", "--slices=2", "--compile_cache=/w/cache", "--start_timeout=900"],
        [*slurm, "--tasks_per_node=1"],
        [
            "cost",
            f"--report=a={report}",
            f"--report={report}",
            "--rate=m=2000",
            "--tokens=2.4e12",
            *price,
        ],
        ["gke", *recipe, "--slice=v5e-256"],
        [*gke, "--config.mesh.fsdp=7"],
        [*gke, "--config.mesh.fdsp=7"],
        ["gkee"],
        [],
        ["cost", f"--report={tmp_path}/bad.json", "--tokens=1"],
        ["cost", f"--report={tmp_path}/none.json", "--tokens=1"],
        ["cost", f"--report={tmp_path}/big.json", "--tokens=1"],
        ["cost", f"--report={tmp_path}/gpu.json", "--tokens=1"],
        ["cost", "--rate=m=fast", "--tokens=1"],
    ]
    done = programs.run([["launch.cluster", *call] for call in calls])
    assert [d.status for d in done] == [0, 0, 0] + [2] * 10, [d.output for d in done]
    command = pods(out.read_text())["containers"][0]["command"]
    assert command[3:8] == [*recipe, "--compile_cache=/w/cache", "--start_timeout=900.0",
                            "--config.mesh.data=2"]  # fmt: skip
    assert not pathlib.Path("/w").exists()  # a folder of the pod's, not of this machine
    assert "--ntasks-per-node=1\n" in done[1].output
    hours = 2.4e12 / 2000 / 3600
    for name, source in (("a", "predicted"), ("7b", "predicted"), ("m", "given")):
        row = f"| {name} | 2.4e+12 | 2,000 ({source}) | {hours:,.0f} | 256 | "
        row += f"{hours / 256 / 24:,.1f} | {hours * 1.5:,.0f} |"
        assert row in done[2].output
    for end, said in zip(
        done[3:],
        (
            "--image is missing",
            "devices but there are 256",
            "config.mesh.fdsp is not a setting (did you mean 'fsdp'?)",
            "'gkee' is not one (did you mean 'gke'?); choose one of gke, xpk, tpu_vm, slurm, cost",
            "the first argument must be a command, none is given",
            "bad.json has no number at prediction.tokens_per_second_per_chip",
            "none.json cannot be read",
            "big.json is of a step that does not fit v5e:4x4",
            "gpu.json is of GPUs, for which no rate is predicted",
            "--rate=m=fast must be NAME=TOKENS_PER_SECOND_PER_CHIP",
        ),
        strict=True,
    ):
        assert end.last_line.startswith("error: ") and said in end.last_line, end.output


@pytest.mark.slow
def test_slurm_script_trains_stops_on_sigterm_and_resumes(tmp_path):
    """sbatch: two processes train, save on SIGTERM, are requeued, and finish."""
    steps = 30
    commands, work = tmp_path / "bin", tmp_path / "work dir's 100%"
    commands.mkdir()
    slurm_stand_in.install(commands)
    (commands / "terminate_after").write_text(r"step +3/")
    jobs.write_data(tmp_path)
    script = tmp_path / "job.sh"
    (rendered,) = programs.run(
        [
            [
                "launch.cluster", "slurm", f"--config=tests/train/recipe.py:{tmp_path}",
                f"--config.train.steps={steps}", "--config.eval=",
                "--config.train.checkpoint_every=1000", "--config.model.n_layers=1",
                "--config.model.windows=()", "--config.mesh.fsdp=-1",
                "--nodes=2", "--gpus_per_node=2", "--tasks_per_node=1", "--cpu_devices=2",
                "--restarts=1", f"--workdir={work}", f"--python={sys.executable}",
                f"--code={programs.ROOT}", f"--compile_cache={tmp_path}/compiled",
                "--env=JAX_PLATFORMS=cpu", f"--env=JAX_COORDINATOR_PORT={multiprocess.free_port()}",
                f"--out={script}",
            ]
        ]
    )  # fmt: skip
    assert rendered.status == 0, rendered.output
    clean = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    done = subprocess.run(
        ["sbatch", str(script)],
        env=clean | {"PATH": f"{commands}:{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    logs = "".join(path.read_text() for path in sorted((work / "logs").glob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert sorted(p.name for p in (work / "logs").iterdir()) == ["4242-0.log", "4242-1.log"]
    assert "ended with status 75 after 0 restarts" in done.stdout
    assert "ended with status 0 after 1 restarts" in done.stdout
    assert "Process 1 of 2 on node2 (according to SLURM) connects to" in logs
    stopped = int(re.search(r"stopped at step (\d+); run the same command to resume", logs)[1])
    assert 3 <= stopped < steps
    assert f"step {stopped} of {steps}" in logs
    rows = read_metrics(work / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, steps + 1))
    assert read_header(str(work / "checkpoints")).step == steps


class Pod:
    """A TPU VM script beside commands of gcloud's name that keep a queued resource in a file."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.repository = folder, folder / "repository"
        stand_in = pathlib.Path(__file__).with_name("gcloud_stand_in.sh").read_text()
        for name, text in (("gcloud", stand_in), ("sleep", "#!/bin/bash\n")):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (folder / "pod.sh").write_text(render("tpu_vm", job("tpu_vm", spot=True)))
        self.environment = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "LOGS": str(folder / "logs"),
            "TMPDIR": str(folder),
            "HOME": str(folder),
        }
        self.repository.mkdir()
        author = ["-c", "user.name=n", "-c", "user.email=e@x"]
        for words in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "first"]):
            subprocess.run(["git", *words], cwd=self.repository, env=self.environment, check=True)

    def run(self) -> tuple[subprocess.CompletedProcess, list[str]]:
        """`bash pod.sh run`, without waiting; what changed something, in order."""
        done = subprocess.run(
            ["bash", str(self.folder / "pod.sh"), "run"],
            cwd=self.repository, env=self.environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        calls = (self.folder / "calls").read_text().split()
        return done, [call for call in calls if call in ("create", "scp", "delete")]


def test_tpu_vm_script_requests_a_preempted_slice_again(tmp_path):
    done, acts = Pod(tmp_path).run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert acts == ["create", "scp", "delete", "create", "scp", "scp"]  # the last scp: logs
    assert "SUSPENDED" in done.stdout and "cost money until" in done.stdout


@pytest.mark.slow
def test_failed_status_request_deletes_no_slice(tmp_path):
    """Any one call may fail for a reason of its own; only what is known to be gone is replaced."""
    clean = tmp_path / "clean"
    clean.mkdir()
    Pod(clean).run()
    calls = (clean / "calls").read_text().split()
    for number, verb in enumerate(calls, 1):
        folder = tmp_path / str(number)
        folder.mkdir()
        pod = Pod(folder)
        (folder / "hiccups").write_text(f"{number}\n")
        done, acts = pod.run()
        said = f"call {number}, {verb}: {acts}\n{done.stdout}{done.stderr}"
        if number <= 2:  # before there is a slice: the person is still looking
            assert done.returncode == 1 and "auth tokens" in done.stderr, said
            continue
        assert done.returncode == 0, said
        assert acts.count("create") == 2 + (verb == "create"), said
        assert acts.count("delete") == 1 + (verb == "delete"), said


def test_tpu_vm_script_watches_a_running_job_without_restarting_it(tmp_path):
    pod = Pod(tmp_path)
    (tmp_path / "state").write_text("ACTIVE\n")
    (tmp_path / "installed").touch()
    (tmp_path / "calls").write_text("create\n")
    done, acts = pod.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "already running" in done.stdout
    assert acts[:2] == ["create", "delete"]  # no scp in between


def test_tpu_vms_mount_buckets_before_the_program_starts(tmp_path):
    """The worker's script, run with commands that note what they are given."""
    said = tmp_path / "said"
    for name in ("sudo", "fusermount", "gcsfuse", "python3", "mountpoint", "id"):
        status = 1 if name == "mountpoint" else 0
        (tmp_path / name).write_text(f'#!/bin/bash\necho {name} "$@" >>{said}\nexit {status}\n')
        (tmp_path / name).chmod(0o755)
    mounts = {"/mnt/a b'$(x)": "gs://bucket/x/y z", "/mnt/c": "gs://c"}
    text = render("tpu_vm", job("tpu_vm", mounts=mounts, python=str(tmp_path / "python3")))
    worker = text.split("<<'END_OF_WORKER_SCRIPT'\n")[1].split("END_OF_WORKER_SCRIPT")[0]
    worker = worker.replace("cd /opt/qwen_jax/code", f"cd {tmp_path}")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-s", "train"], input=worker, text=True, env=environment, check=True)
    lines = [line for line in said.read_text().splitlines() if line.startswith(("gcsf", "pyth"))]
    assert lines[:2] == [
        "gcsfuse --implicit-dirs --only-dir=x/y z bucket /mnt/a b'$(x)",
        "gcsfuse --implicit-dirs c /mnt/c",
    ]
    assert lines[2].startswith("python3 -m launch.pretrain --config")


@pytest.mark.parametrize(
    ("statuses", "restarts", "end"),
    [
        ([75] * 9 + [0], 0, 0),  # time limits and preemptions cost nothing
        ([1, 75, 134, 69, 0], 3, 0),
        ([1, 75, 134, 69, 0], 2, 69),
        ([75, 2, 0], 5, 2),
    ],
)
def test_slurm_script_counts_failures_but_not_stops(tmp_path, statuses, restarts, end):
    stand_in = tmp_path / "bin"
    stand_in.mkdir()
    # srun ends with the next of the statuses; scontrol leaves a word for the loop below.
    (stand_in / "srun").write_text(
        f"#!/bin/bash\nn=$(cat {tmp_path}/n 2>/dev/null || echo 0); echo $((n+1)) >{tmp_path}/n\n"
        f"a=({' '.join(map(str, statuses))}); exit ${{a[$n]}}\n"
    )
    (stand_in / "scontrol").write_text(f'#!/bin/bash\necho "$*" >{tmp_path}/requeued\n')
    for name in ("srun", "scontrol"):
        (stand_in / name).chmod(0o755)
    text = render("slurm", job("slurm", workdir=f"{tmp_path}/work", restarts=restarts))
    for starts in range(len(statuses)):
        environment = {"PATH": f"{stand_in}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
        environment["SLURM_RESTART_COUNT"] = str(starts)
        done = subprocess.run(["bash"], input=text, text=True, env=environment, timeout=60)
        if not (tmp_path / "requeued").exists():
            break
        assert (tmp_path / "requeued").read_text() == "requeue 7\n" and done.returncode == 0
        (tmp_path / "requeued").unlink()
    assert done.returncode == end == statuses[starts]


def test_commands_in_the_docs_are_accepted(tmp_path):
    """Those of docs/launch.md, as they stand there but for the files they name."""
    text = (programs.ROOT / "docs" / "launch.md").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("python -m launch.cluster")]
    calls = [shlex.split(line, comments=True)[2:] for line in lines if "SCHEDULER" not in line]
    (tmp_path / "7b.json").write_text('{"prediction": {"tokens_per_second_per_chip": 2777}}')
    here = {"=7b.json": f"={tmp_path}/7b.json", "--out=": f"--out={tmp_path}/", "=PRICE": "=1.2"}
    for old, new in here.items():
        calls = [[word.replace(old, new) for word in call] for call in calls]
    assert {call[1] for call in calls} == {"gke", "tpu_vm", "slurm", "cost"}
    for call, done in zip(calls, programs.run(calls), strict=True):
        assert done.status == 0, (call, done.output)
    pods((tmp_path / "7b.yaml").read_text())
    for script in ("pod.sh", "7b.sh"):
        assert not shellcheck((tmp_path / script).read_text(), "--exclude=SC2016")
