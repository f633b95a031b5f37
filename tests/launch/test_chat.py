"""launch.chat in a pseudo-terminal and with pipes, on a tiny random model."""

import contextlib
import json
import os
import re
import subprocess
import sys

import pytest

from launch.terminal import printable
from tests import programs
from tests.generate import tiny
from tests.launch.terminal import PseudoTerminal
from tests.programs import ROOT

SIZES = ["--max_length=4096", "--page_size=256", "--prefill_tokens=256"]
ESCAPE = "\x1b"
CTRL_C, CTRL_D, UP = "\x03", "\x04", f"{ESCAPE}[A"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with a tiny chat model and a tiny base model, also used as home folder."""
    place = tmp_path_factory.mktemp("chat")
    tiny.write(place / "tiny-chat")
    tiny.write(place / "tiny-base", {"chat_format": "raw", "do_sample": False})
    return place


@pytest.fixture(scope="module")
def home(place):
    return {
        "HOME": str(place),
        "XDG_STATE_HOME": str(place / "state"),
        "XDG_CACHE_HOME": str(place / "cache"),
    }


@pytest.fixture(scope="module")
def chat(place, home):
    """A conversation in a pseudo-terminal, which Ctrl-D ends."""
    flags = [f"--model={place / 'tiny-chat'}", *SIZES, "--seed=5"]
    terminal = PseudoTerminal("launch.chat", flags, home)
    terminal.wait("Ctrl-D ends", timeout=400)
    yield terminal
    terminal.type(CTRL_D)
    assert terminal.end() == 0


def run(flags, home, stdin=None):
    """Runs launch.chat without a terminal; returns (status, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.chat", *flags],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **home},
        **({"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}),
        capture_output=True,
        timeout=400,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.slow
def test_status_line_shows_progress_and_is_erased(chat):
    raw = chat.raw.decode()
    assert "reading " in raw and "compiling: 1 of " in raw
    assert re.match(r"\s*tiny-chat: chat model with 53.6k parameters", chat.text())
    assert "compiling" not in chat.text()  # the line was erased


@pytest.mark.slow
def test_answer_is_followed_by_its_speed(chat):
    chat.type("/set max_tokens 60\r")
    chat.type("你好 😀\r")
    text = chat.wait("tokens/s, first after")
    assert "> 你好 😀" in text
    # The model generates many invalid bytes; only complete characters are printed.
    assert chat.raw.decode("utf-8")
    chat.type("/history\r")
    chat.wait("你好 😀", times=2)
    chat.type("/clear\r")
    chat.wait("conversation is empty")


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_but_not_the_program(chat):
    for setting in ("temperature 0", "repetition_penalty 1", "max_tokens 4000"):
        chat.type(f"/set {setting}\r")
    chat.wait("max_tokens = 4000")
    chat.type("go on\r")
    before = len(chat.raw)
    while len(chat.raw) < before + 300:  # greedy decoding of this model never ends
        assert chat.read(60)
    chat.type(CTRL_C)
    chat.wait("stopped; this answer is not part")
    chat.type("/history\r")
    chat.wait("There are no messages yet.")
    chat.type("/set max_tokens 5\r")
    chat.type("/retry\r")  # the stopped message again
    chat.wait("cut at max_tokens")
    chat.type("/clear\r")


@pytest.mark.slow
def test_messages_of_several_lines_by_key_quotes_and_paste(chat, tmp_path):
    chat.type("/clear\r/set max_tokens 5\r")
    chat.settle()
    chat.type(f"alpha{ESCAPE}\rbeta\r")
    chat.settle()
    chat.type('"""\rgamma\r\rdelta"""\r')
    chat.settle()
    chat.type(f"{ESCAPE}[200~epsilon\nzeta{ESCAPE}[201~\r")
    chat.settle()
    chat.type(f"/save {tmp_path / 'said.json'}\r")
    chat.wait("saved to")
    messages = json.loads((tmp_path / "said.json").read_text())["messages"]
    said = [m["content"] for m in messages if m["role"] == "user"]
    assert said == ["alpha\nbeta", "gamma\n\ndelta", "epsilon\nzeta"]


@pytest.mark.slow
def test_prompt_reports_bad_input_clears_on_ctrl_c_and_has_a_history(chat):
    chat.type("/hlep\r")
    chat.wait("There is no command /hlep (did you mean 'help'?)")
    chat.type("never sent")
    chat.settle()
    chat.type(CTRL_C)  # clears the line
    chat.settle()
    chat.type(CTRL_C)
    chat.settle()
    assert "To leave" not in chat.text()
    chat.type(CTRL_C)
    chat.wait("To leave, type /exit or press Ctrl-D.")
    chat.type("/seed\r")
    chat.wait("seed = 5")
    chat.settle()
    chat.type(f"{UP}\r")  # the previous line, from the history
    chat.wait("seed = 5", times=2)


@pytest.mark.slow
def test_pipes_get_plain_text_and_the_same_answer_for_the_same_seed(place, home):
    model, common = f"--model={place / 'tiny-chat'}", [*SIZES, "--max_tokens=12"]
    status, out, err = run([model, *common, "--lines"], home, b"one\n/seed 9\n/retry\n")
    assert (status, err) == (0, "")
    assert ESCAPE not in out and "seed = 9" in out
    status, text, err = run([model, *common, "--prompt=one"], home)
    assert (status, err) == (0, "")
    # The conversation printed the same answer, with control characters escaped.
    assert len(text) > 1 and out.startswith(printable(text[:-1]) + "\n")
    status, found, err = run([model, *common, "--json"], home, b"one\n")
    found = json.loads(found)
    assert (status, err) == (0, "")
    assert found["text"] == text.strip() and found["new_tokens"] <= 12
    assert (found["seed"], found["prompt"], found["model"]) == (1234, "one", "tiny-chat")


@pytest.mark.slow
def test_base_model_prints_once_that_it_continues_text(place, home):
    flags = [f"--model={place / 'tiny-base'}", *SIZES, "--max_tokens=6", "--lines"]
    status, out, err = run(flags, home, b"def f(\nclass A\n")
    assert (status, err) == (0, "")
    assert out.count("This is a base model") == 1 and out.count("first after") == 2


def test_invalid_flags_exit_with_one_sentence_and_status_2():
    cases = (
        (["--model=/nothing"], "/nothing does not exist; give a Hugging Face model folder"),
        (["--model=/nothing", "--json"], "--json is for one answer"),
        (["--model=/nothing", "--prompt=x", "--seed=-1"], "--seed is -1"),
        (["--model=/nothing", "--temprature=1"], "Unknown command line flag 'temprature'"),
        (["--model=/nothing", "--prompt=x", "--top_p=2"], "top_p is 2.0; it must be above 0"),
        (["--prompt=x"], "Flag --model must have a value"),
    )
    with no_input():
        ended = programs.run([["launch.chat", *flags] for flags, _ in cases])
    for done, (_, sentence) in zip(ended, cases, strict=True):
        assert done.status == 2 and done.output.startswith("error: "), done.output
        assert sentence in done.output and done.output.count("\n") == 1


@contextlib.contextmanager
def no_input():
    """Context manager in which started programs have /dev/null as standard input."""
    before, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    try:
        yield
    finally:
        os.dup2(before, 0)
        os.close(before)
        os.close(nothing)
