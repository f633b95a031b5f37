"""Chat with a model in the terminal, or answer prompts in scripts.

    python -m launch.chat --model=Qwen-7B-Chat          a conversation; /help lists the commands
    python -m launch.chat --model=runs/demo             the result of `make demo` continues text
    python -m launch.chat --model=DIR --prompt="Why?"   one answer on stdout
    git diff | python -m launch.chat --model=DIR --prompt="Review this:" --json

--model is a Hugging Face folder, the working folder of a training run, or a folder of checkpoints.
Text on a pipe is one prompt, appended to --prompt; with --lines, each line is a message of a
conversation. Sampling parameters that are not given come from the model's generation config.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import stat
import sys
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags, logging

from launch import program
from launch.repl import COMMAND_WORDS, SETTINGS, Repl, visible_pieces
from launch.terminal import InputReader, PipeReader, TerminalReader, printable
from qwen_jax.engine.request import SamplingParams
from qwen_jax.errors import UserError
from qwen_jax.generate.handle import Qwen
from qwen_jax.generate.load import load
from qwen_jax.generate.service import EngineFailed
from qwen_jax.generate.session import override_params
from qwen_jax.model import count_params
from qwen_jax.progress import format_count

SEED = 1234  # the default of the release's cli_demo.py

MODEL = flags.DEFINE_string("model", None, "Model folder or checkpoints.", required=True)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Vocabulary, if --model contains none.")
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest by default.")
FORMAT = flags.DEFINE_enum("chat_format", None, ["chatml", "raw"], "Overrides the model's own.")
DTYPE = flags.DEFINE_string("dtype", None, "Default: float32 on CPUs, bfloat16 elsewhere.")
WEIGHTS = flags.DEFINE_string("weights", None, "int8 or int4: quantise unquantised weights.")
PROMPT = flags.DEFINE_string("prompt", None, "Answer this prompt and exit.")
JSON = flags.DEFINE_bool("json", False, "Print the answer as a JSON object with statistics.")
LINES = flags.DEFINE_bool("lines", False, "Read a conversation from a pipe, one line per message.")
SYSTEM = flags.DEFINE_string("system", None, "System prompt.")
SEED_FLAG = flags.DEFINE_integer("seed", SEED, "Seed of the answers.")
STOP = flags.DEFINE_multi_string("stop", [], "Stop string; may be given more than once.")
VERBOSE = flags.DEFINE_bool("verbose", False, "Log what is loaded and compiled.")
HISTORY = flags.DEFINE_string(
    "history",
    os.path.join(os.environ.get("XDG_STATE_HOME", "~/.local/state"), "qwen_jax", "chat_history"),
    "File that keeps the typed inputs; empty to keep none.",
)
LAYER_WINDOWS = flags.DEFINE_bool(
    "layer_windows",
    False,
    "Qwen v1: smaller attention windows in lower layers, for texts beyond its training length.",
)
TENSOR = flags.DEFINE_integer("tensor", None, "Number of devices that share the model.")
SIZES = {
    "max_length": flags.DEFINE_integer(
        "max_length", None, "Maximum number of tokens of prompt and answer together."
    ),
    "memory": flags.DEFINE_float("memory", None, "Fraction of a device's memory to use."),
    "kv_dtype": flags.DEFINE_string(
        "kv_dtype", None, "Data type of the KV cache: auto, or uint8 (half the memory)."
    ),
    "page_size": flags.DEFINE_integer("page_size", None, "Tokens per page of the KV cache."),
    "prefill_tokens": flags.DEFINE_integer(
        "prefill_tokens", None, "Maximum number of prompt tokens per prefill call."
    ),
}
_DEFINE: dict[type, Callable[..., flags.FlagHolder[Any]]] = {
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
}
SAMPLING = {
    name: _DEFINE[type(getattr(SamplingParams, name))](name, None, "Sampling parameter; see /set.")
    for name in SETTINGS
}


@contextlib.contextmanager
def open_model(*, warm_up: bool) -> Iterator[Qwen]:
    """Context manager that loads the model of --model and applies the flags to its session.

    Args:
      warm_up: whether to compile all programs at once.

    Raises:
      UserError: there is no model, or a flag has a bad value; sampling flags are checked before the
        weights are read.
    """
    sizes: dict[str, Any] = {
        name: flag.value for name, flag in SIZES.items() if flag.value is not None
    }
    sampling = {name: flag.value for name, flag in SAMPLING.items() if flag.value is not None}
    override_params(SamplingParams(), sampling)
    with load(
        MODEL.value,
        tokenizer=TOKENIZER.value,
        step=STEP.value,
        chat_format=FORMAT.value,
        dtype=DTYPE.value,
        weights=WEIGHTS.value,
        layer_windows=LAYER_WINDOWS.value,
        tensor=TENSOR.value,
        warm_up=warm_up,
        max_running_requests=1,
        **sizes,
    ) as qwen:
        session = qwen.session
        session.params = override_params(session.params, sampling)
        session.stop = (*session.stop, *STOP.value)
        if SYSTEM.value is not None:
            if not session.is_chat_model:
                raise UserError("--system is for chat models; this one only continues text.")
            session.system = SYSTEM.value or None
        yield qwen


def describe_model(qwen: Qwen) -> str:
    """Returns name, kind, size and maximum length of a model in one line."""
    config = qwen.config
    kind = "chat model" if qwen.session.is_chat_model else "base model"
    return (
        f"{qwen.name}: {kind} with {format_count(count_params(config))} parameters "
        f"({config.n_layers} layers of {config.d_model}), {qwen.service.max_length:,} tokens"
    )


def run_conversation(qwen: Qwen) -> None:
    """Runs a conversation until its end, in the terminal or with messages from a pipe."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    reader: InputReader = PipeReader(sys.stdin)
    if is_terminal:
        reader = TerminalReader(history_file(), COMMAND_WORDS)
    description = describe_model(qwen)
    repl = Repl(
        qwen.session,
        reader=reader,
        out=sys.stdout,
        description=description,
        seed=SEED_FLAG.value,
        colour=is_terminal,
    )
    if is_terminal:
        repl.print_note(f"{description}\n/help lists commands, Ctrl-D ends.")
    if not qwen.session.is_chat_model:
        repl.print_note("This is a base model: it continues your text and keeps no conversation.")
    repl.run()


def history_file() -> pathlib.Path | None:
    """Returns the file of --history, whose folder is created with access for this user only.

    Returns None if the flag is empty or the file is not writable.
    """
    if not HISTORY.value:
        return None
    file = pathlib.Path(HISTORY.value).expanduser()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    return file if os.access(file if file.exists() else file.parent, os.W_OK) else None


def answer_once(qwen: Qwen, prompt: str) -> None:
    """Prints the answer to one prompt, as text while it is generated or as a JSON object."""
    session = qwen.session
    prompt = prompt.strip() if session.is_chat_model else prompt
    reply = session.ask(prompt, stream=not JSON.value, seed=SEED_FLAG.value)
    if not JSON.value:
        escape = printable if sys.stdout.isatty() else str
        for piece in visible_pieces(reply, session.is_chat_model):
            sys.stdout.write(escape(piece))
            sys.stdout.flush()
        sys.stdout.write("\n")
        return
    text = reply.text()
    submitted, first, ended = reply.answer.times
    assert first is not None and ended is not None, "the answer has been read to its end"
    result = {
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
    sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")


def read_prompt() -> str | None:
    """Returns the prompt to answer once, --prompt and the text on a pipe; None for a conversation.

    Raises:
      UserError: --json without a prompt.
    """
    parts = [] if PROMPT.value is None else [PROMPT.value]
    if not LINES.value and _is_pipe_or_file(sys.stdin.fileno()):
        parts.append(sys.stdin.read())
    if not parts:
        if JSON.value:
            raise UserError("--json is for one answer; give --prompt=TEXT, or text on a pipe.")
        return None
    return "\n".join(part for part in parts if part.strip())


def _is_pipe_or_file(descriptor: int) -> bool:
    """Returns whether a file descriptor is a pipe or a file, not a terminal or /dev/null."""
    mode = os.fstat(descriptor).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def main() -> int:
    """Answers one prompt or runs a conversation; returns the exit status."""
    if not VERBOSE.value:
        logging.set_verbosity(logging.WARNING)
    if not 0 <= SEED_FLAG.value < 2**63:
        raise UserError(f"--seed is {SEED_FLAG.value}; it must be from 0 to 2^63 - 1.")
    if sys.stdin is None:  # closed by the parent process
        sys.stdin = open(os.devnull)  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(encoding="utf-8", errors="replace")  # invalid bytes raise no error
    prompt = read_prompt()
    try:
        with open_model(warm_up=prompt is None) as qwen:  # one answer needs few programs
            if prompt is None:
                run_conversation(qwen)
            else:
                answer_once(qwen, prompt)
    except KeyboardInterrupt:
        return 130
    except EngineFailed as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except BrokenPipeError:  # the reader of stdout has ended, as in `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    program.run(main, cache_by_default=True)
