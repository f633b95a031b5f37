"""--print_config prints the resolved flags and recipe of every program and writes nothing."""

import re

import pytest

from tests import programs
from tests.programs import ROOT

RECIPE = "--config=configs/pretrain.py:toy"
PROGRAMS = {
    "launch.aot": [RECIPE, "--topology=v5e:2x2"],
    "launch.chat": ["--model=x"],
    "launch.cluster": ["gke", RECIPE, "--name=x"],
    "launch.convert": ["--hf_dir=x", "--out={out}"],
    "launch.demo": ["--workdir={out}"],
    "launch.logits": ["--hf_dir=x", "--ids=y", "--out={out}"],
    "launch.perplexity": ["--checkpoint=x", "--out={out}"],
    "launch.prepare": ["--out={out}"],
    "launch.pretrain": [RECIPE, "--config.train.steps=7", "--workdir={out}"],
    "launch.quantise": ["--src=x", "--out={out}"],
    "launch.serve": ["--model=x", "--api_key=hidden"],
    "launch.train_tokenizer": ["--input=x", "--output={out}", "--vocab_size=300"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder for all that the programs might write."""
    return tmp_path_factory.mktemp("written")


@pytest.fixture(scope="module")
def printed(folder):
    """Program -> how it ended with --print_config."""
    calls = [
        [name, *(a.format(out=folder / name) for a in arguments), "--print_config"]
        for name, arguments in PROGRAMS.items()
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("XDG_STATE_HOME", str(folder))
        return dict(zip(PROGRAMS, programs.run(calls), strict=True))


def test_every_program_is_listed_here():
    files = {f"launch.{f.stem}" for f in (ROOT / "launch").glob("*.py")}
    programs = {f for f in files if "program.run(" in (ROOT / f"launch/{f[7:]}.py").read_text()}
    assert programs - {"launch.program"} | {"launch.cluster"} == set(PROGRAMS)


@pytest.mark.parametrize("program", PROGRAMS)
def test_prints_each_flag_once_and_writes_nothing(printed, folder, program):
    done = printed[program]
    assert done.status == 0, done.output
    names = re.findall(r"^(?:# )?--(?:no)?([\w.]+)", done.output, flags=re.M)
    assert len(names) == len(done.output.splitlines()) == len(set(names)) > 3
    assert "cpu_devices" in names
    # Importing matplotlib creates its own cache folder.
    assert {path.name for path in folder.iterdir()} <= {"matplotlib"}


def test_recipe_has_overrides_and_derived_values(printed):
    lines = printed["launch.pretrain"].output.splitlines()
    assert "--config.train.steps=7" in lines
    assert "--config.optimizer.decay_steps=20" in lines  # -1 in the recipe: its last step
    assert "# --config.model.yarn is None" in lines


def test_secrets_are_not_printed(printed):
    out = printed["launch.serve"].output
    assert "hidden" not in out and "# --api_key is set" in out


def test_output_is_a_flag_file_of_the_same_run(printed, tmp_path):
    first = printed["launch.pretrain"].output
    file, misspelt = tmp_path / "flags", tmp_path / "misspelt"
    file.write_text(first)
    misspelt.write_text(first.replace("optimizer.peak_lr", "optimizer.peek_lr"))
    calls = [["launch.pretrain", f"--flagfile={f}", "--print_config"] for f in (file, misspelt)]
    again, refused = programs.run(calls)
    assert (again.status, again.output) == (0, first)
    assert refused.status == 2 and "did you mean 'peak_lr'" in refused.last_line
