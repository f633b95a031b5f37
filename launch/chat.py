"""Talk with a model in the terminal.

    python -m launch.chat --model=Qwen-7B-Chat          a conversation; /help lists the commands
    python -m launch.chat --model=runs/demo             what `make demo` trained: it continues text
    python -m launch.chat --model=DIR --prompt="Why?"   one answer on stdout
    git diff | python -m launch.chat --model=DIR --prompt="Review this:" --json

--model is a Hugging Face folder, a working folder of a training, or a folder of checkpoints. Text
on a pipe is one prompt (after --prompt, if that is given), unless --lines makes each line one.
Sampling is the model's own unless flags say otherwise.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import stat
import sys
from collections.abc import Iterator

from absl import flags, logging

from launch import program
from launch.repl import SETTINGS, WORDS, Repl
from launch.terminal import PlainLines, Terminal, printable
from qwen_jax.engine.request import SamplingParams
from qwen_jax.errors import UserError
from qwen_jax.generate.handle import Qwen
from qwen_jax.generate.load import load
from qwen_jax.generate.service import EngineFailed
from qwen_jax.generate.session import override_params
from qwen_jax.model import count_params
from qwen_jax.progress import format_count

SEED = 1234  # of the release's cli_demo.py

MODEL = flags.DEFINE_string("model", None, "Model folder or checkpoints.", required=True)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Vocabulary, where --model has none.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint; the newest by default.")
FORMAT = flags.DEFINE_enum("chat_format", None, ["chatml", "raw"], "Chat, or continue text.")
DTYPE = flags.DEFINE_string("dtype", None, "float32 (CPU) or bfloat16 (elsewhere) by default.")
WEIGHTS = flags.DEFINE_string("weights", None, "int8 or int4: quantise plain weights.")
PROMPT = flags.DEFINE_string("prompt", None, "Answer this once, and end.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object with text and numbers.")
LINES = flags.DEFINE_bool("lines", False, "Text on a pipe is a conversation, line by line.")
SYSTEM = flags.DEFINE_string("system", None, "System prompt.")
SEED_FLAG = flags.DEFINE_integer("seed", SEED, "Of the draws: the same seed, the same answer.")
STOP = flags.DEFINE_multi_string("stop", [], "Text that ends an answer; may be repeated.")
VERBOSE = flags.DEFINE_bool("verbose", False, "Log what is loaded and compiled.")
HISTORY = flags.DEFINE_string(
    "history",
    os.path.join(os.environ.get("XDG_STATE_HOME", "~/.local/state"), "qwen_jax", "chat_history"),
    "File that keeps what was typed; empty: none.",
)
LAYER_WINDOWS = flags.DEFINE_bool(
    "layer_windows", False, "Qwen v1: lower layers see less far back; for texts beyond its length."
)
TENSOR = flags.DEFINE_integer("tensor", None, "Devices that share the model.")
SIZES = {
    "max_length": flags.DEFINE_integer("max_length", None, "Longest prompt and answer."),
    "memory": flags.DEFINE_float("memory", None, "Share of a device's memory to use."),
    "kv_dtype": flags.DEFINE_string("kv_dtype", None, "Of the cache: auto, or uint8 (half)."),
    "page_size": flags.DEFINE_integer("page_size", None, "Tokens a page of the cache."),
    "prefill_tokens": flags.DEFINE_integer("prefill_tokens", None, "Of a prompt, in one call."),
}
_DEFINE = {int: flags.DEFINE_integer, float: flags.DEFINE_float}
SAMPLING = {
    name: _DEFINE[type(getattr(SamplingParams, name))](name, None, "Sampling; see /set.")
    for name in SETTINGS
}


@contextlib.contextmanager
def open_model(*, warm_up: bool) -> Iterator[Qwen]:
    """The model that the flags name, with the settings they give."""
    place = {"tokenizer": TOKENIZER.value, "step": STEP.value, "chat_format": FORMAT.value}
    how = {"dtype": DTYPE.value, "tensor": TENSOR.value, "warm_up": warm_up}
    how |= {"weights": WEIGHTS.value, "layer_windows": LAYER_WINDOWS.value}
    sizes = {name: flag.value for name, flag in SIZES.items() if flag.value is not None}
    given = {name: flag.value for name, flag in SAMPLING.items() if flag.value is not None}
    override_params(SamplingParams(), given)  # refuses bad values before the weights are read
    with load(MODEL.value, **place, **how, max_running_requests=1, **sizes) as qwen:
        session = qwen.session
        session.params = override_params(session.params, given)
        session.stop = (*session.stop, *STOP.value)
        if SYSTEM.value is not None:
            if not session.is_chat_model:
                raise UserError("--system is for chat models; this one only continues text.")
            session.system = SYSTEM.value or None
        yield qwen


def facts(qwen: Qwen) -> str:
    """What the model is, in one line."""
    config = qwen.config
    kind = "chat model" if qwen.session.is_chat_model else "base model"
    return (
        f"{qwen.name}: {kind} with {format_count(count_params(config))} parameters "
        f"({config.n_layers} layers of {config.d_model}), {qwen.service.max_length:,} tokens"
    )


def converse(qwen: Qwen) -> None:
    """A conversation in the terminal, or line by line from a pipe."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        lines = Terminal(history_file(), WORDS)
    else:
        lines = PlainLines(sys.stdin)
    about = facts(qwen)
    how = {"lines": lines, "out": sys.stdout, "facts": about, "colour": terminal}
    repl = Repl(qwen.session, seed=SEED_FLAG.value, **how)
    if terminal:
        repl.say(f"{about}\n/help lists commands, Ctrl-D ends.")
    if not qwen.session.is_chat_model:
        repl.say("This is a base model: it continues what you write, and keeps no conversation.")
    repl.run()


def history_file() -> pathlib.Path | None:
    """The file that keeps what was typed, in a folder for this user alone; None without a place."""
    if not HISTORY.value:
        return None
    file = pathlib.Path(HISTORY.value).expanduser()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return file if os.access(file if file.exists() else file.parent, os.W_OK) else None


def answer_once(qwen: Qwen, prompt: str) -> None:
    """One answer on stdout, as text or as JSON."""
    session = qwen.session
    prompt = prompt.strip() if session.is_chat_model else prompt
    reply = session.ask(prompt, stream=not JSON.value, seed=SEED_FLAG.value)
    if not JSON.value:
        shown = printable if sys.stdout.isatty() else str
        begun = not session.is_chat_model
        for piece in reply:
            piece = piece if begun else piece.lstrip()
            begun = begun or bool(piece)
            sys.stdout.write(shown(piece))
            sys.stdout.flush()
        sys.stdout.write("\n")
        return
    text = reply.text()
    submitted, first, ended = reply.answer.times
    found = {
        "model": qwen.name,
        "prompt": prompt,
        "text": text,
        "finish": reply.finish,
        "prompt_tokens": reply.answer.prompt_tokens,
        "new_tokens": reply.answer.new_tokens,
        "seed": SEED_FLAG.value,
        "seconds": round(ended - submitted, 4),
        "seconds_to_first_token": round(first - submitted, 4),
    }
    sys.stdout.write(json.dumps(found, ensure_ascii=False) + "\n")


def read_prompt() -> str | None:
    """What is to be answered once: --prompt, and the text on a pipe; None for a conversation."""
    parts = [] if PROMPT.value is None else [PROMPT.value]
    if not LINES.value and _is_pipe(sys.stdin.fileno()):
        parts.append(sys.stdin.read())
    if not parts:
        if JSON.value:
            raise UserError("--json is for one answer; give --prompt=TEXT, or text on a pipe.")
        return None
    return "\n".join(part for part in parts if part.strip())


def _is_pipe(descriptor: int) -> bool:
    """Whether somebody writes to it: a pipe or a file, and no terminal or /dev/null."""
    mode = os.fstat(descriptor).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def main() -> int:
    """One answer, or a conversation."""
    if not VERBOSE.value:
        logging.set_verbosity(logging.WARNING)
    if not 0 <= SEED_FLAG.value < 2**63:
        raise UserError(f"--seed is {SEED_FLAG.value}; it must be from 0 to 2^63 - 1.")
    if sys.stdin is None:  # closed by whoever started this
        sys.stdin = open(os.devnull)  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout):  # odd bytes must end nothing
        stream.reconfigure(encoding="utf-8", errors="replace")
    prompt = read_prompt()
    try:
        with open_model(warm_up=prompt is None) as qwen:  # one answer needs few programs
            if prompt is None:
                converse(qwen)
            else:
                answer_once(qwen, prompt)
    except KeyboardInterrupt:
        return 130
    except EngineFailed as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except BrokenPipeError:  # whoever read it has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    program.run(main, cache_by_default=True)
