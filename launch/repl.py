"""The conversation of `launch.chat` in a terminal: commands, and answers printed as they come."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TextIO

from launch.terminal import Lines, printable, unquote
from qwen_jax.artifact import write_text
from qwen_jax.engine.request import SamplingParams
from qwen_jax.errors import UserError, nearest
from qwen_jax.generate.service import Answer
from qwen_jax.generate.session import Reply, Session, override_params

# What /set changes; Hugging Face's name is understood too.
SETTINGS = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
_ALIASES = {"max_new_tokens": "max_tokens"}

HELP = """\
Write something and press Enter. Several lines: Alt-Enter, paste them, or put them between \"\"\".
Ctrl-C stops an answer, which is then not part of the conversation.
Commands, which may begin with : as well:"""


@contextlib.contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `stop` in this block instead of raising KeyboardInterrupt wherever the code is.

    An exception may be raised, and lost, in a callback of the interpreter. Threads other than the
    main one get no signals: there it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)


class Repl:
    """Reads, answers, prints, until the end of the input.

    Attributes:
      seed: of the next answers; /retry adds one to it for its own.
    """

    def __init__(
        self, session: Session, *, lines: Lines, out: TextIO, facts: str, seed: int, colour: bool
    ):
        """Prepares a conversation.

        Args:
          session: the conversation.
          lines: where input comes from.
          out: where everything is printed.
          facts: what /show says of the model.
          seed: of the draws.
          colour: dim what is not the model's text.
        """
        self.session, self.seed = session, seed
        self._lines, self._out, self._facts = lines, out, facts
        self._dim = ("\x1b[2m", "\x1b[0m") if colour else ("", "")
        self._first_params, self._first_seed = session.params, seed
        self._last: str | None = None  # what was asked last
        self._tries = 0  # how often it was retried
        self._interrupts = 0  # Ctrl-C in a row at the prompt
        self._ended = False

    def run(self) -> None:
        """Until /exit or the end of the input."""
        while not self._ended:
            try:
                text = self._lines.read()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._interrupts += 1
                if self._interrupts >= 2:
                    self.say("To leave, type /exit or press Ctrl-D.")
                continue
            self._interrupts = 0
            try:
                self.handle(text)
            except UserError as error:
                self.say(str(error))

    def handle(self, text: str) -> None:
        """One input: a command or something to answer.

        Raises:
          UserError: bad input, said in one sentence.
        """
        if not text.strip():
            return
        if text[0] not in "/:":
            text = unquote(text)
            self._last, self._tries = text, 0
            self.answer(text)
            return
        word, _, rest = text[1:].partition(" ")
        if word not in _BY_NAME:
            raise UserError(
                f"There is no command {text[0]}{word}{nearest(word, _BY_NAME)}; /help lists them. "
                "Begin with a space to send the text to the model."
            )
        _BY_NAME[word].run(self, rest.strip())

    def answer(self, text: str) -> bool:
        """Asks and prints; True when it came to its end, False when Ctrl-C stopped it."""
        reply = self.session.ask(text, seed=(self.seed + self._tries) % 2**63)
        try:
            with on_interrupt(reply.cancel):
                self._print(reply)
            stopped = reply.finish == "cancelled"
        except KeyboardInterrupt:
            reply.cancel()
            stopped = True
        self._out.write("\n")
        if stopped:
            self.say("stopped; this answer is not part of the conversation")
        else:
            self.say(speed(reply.answer) + self._cut(reply))
        return not stopped

    def _cut(self, reply: Reply) -> str:
        """Why an answer has no end of its own; "" when it has one."""
        if reply.finish != "length":
            return ""
        if reply.answer.new_tokens >= self.session.params.max_tokens:
            return "; cut at max_tokens, /set max_tokens N for more"
        return "; cut, because prompt and answer have as many tokens as this engine holds"

    def say(self, text: str) -> None:
        """Prints something that is not the model's."""
        self._out.write(f"{self._dim[0]}{printable(text)}{self._dim[1]}\n")
        self._out.flush()

    def _print(self, reply: Reply) -> None:
        # A chat model's answer may begin with a space or a newline, which belongs to its format.
        begun = not self.session.is_chat_model
        for piece in reply:
            piece = piece if begun else piece.lstrip()
            begun = begun or bool(piece)
            self._out.write(printable(piece))
            self._out.flush()

    # Commands: each gets what was written after its name.

    def help(self, rest: str) -> None:  # noqa: D102
        rows = [(command.usage, command.help) for command in COMMANDS]
        width = max(len(usage) for usage, _ in rows)
        self.say("\n".join([HELP, *(f"  {usage:{width}}  {text}" for usage, text in rows)]))

    def system(self, rest: str) -> None:  # noqa: D102
        if not self.session.is_chat_model:
            raise UserError("A base model has no system prompt; write it before your text.")
        if not rest:
            self.say(self.session.system or "There is no system prompt.")
            return
        self.session.system = None if rest == "-" else rest
        self.say("The system prompt is set; it also holds for what was said before.")

    def clear(self, rest: str) -> None:  # noqa: D102
        self.session.history.clear()
        self._last = None
        self.say("The conversation is empty.")

    def screen(self, rest: str) -> None:  # noqa: D102
        if self._dim[0]:
            self._out.write("\x1b[2J\x1b[H")

    def history(self, rest: str) -> None:  # noqa: D102
        for said, answer in self.session.history:
            self.say(f"> {said}")
            self._out.write(printable(answer) + "\n")
        if not self.session.history:
            self.say(
                "Nothing was said yet."
                if self.session.is_chat_model
                else "A base model keeps none."
            )

    def set_seed(self, rest: str) -> None:  # noqa: D102
        if rest:
            if not rest.isdecimal() or int(rest) >= 2**63:
                raise UserError(f"The seed is {rest!r}; it must be a whole number from 0 up.")
            self.seed = int(rest)
        self.say(f"seed = {self.seed}")

    def set(self, rest: str) -> None:  # noqa: D102
        if not rest:
            self.say("\n".join(self._settings()))
            return
        name, _, value = rest.replace("=", " ", 1).partition(" ")
        name, value = _ALIASES.get(name.strip(), name.strip()), value.strip()
        if name == "seed":
            self.set_seed(value)
        elif name == "stop":
            self.session.stop = _stop_strings(value)
            self.say(f"stop = {json.dumps(self.session.stop, ensure_ascii=False)}")
        elif name == "thinking" and self.session.has_thinking_switch:
            if value not in ("on", "off"):
                raise UserError(f"thinking is {value!r}; it must be on or off.")
            self.session.thinking = value == "on"
            self.say(f"thinking = {value}")
        elif name not in SETTINGS:
            known = (*SETTINGS, "seed", "stop")
            raise UserError(f"There is no setting {name!r}{nearest(name, known)}; /set lists them.")
        else:
            number = _number(name, value)
            self.session.params = override_params(self.session.params, {name: number})
            self.say(f"{name} = {number}")

    def reset(self, rest: str) -> None:  # noqa: D102
        self.session.params, self.seed = self._first_params, self._first_seed
        self.session.stop, self.session.thinking = self.session.defaults.stop, None
        self.say("All settings are those of the start.")

    def show(self, rest: str) -> None:  # noqa: D102
        lines = [self._facts]
        if self.session.is_chat_model:
            lines.append(f"system prompt: {self.session.system or 'none'}")
            lines.append(f"{len(self.session.history)} questions and answers so far")
        self.say("\n".join(lines + self._settings()))

    def save(self, rest: str) -> None:  # noqa: D102
        file = _path(rest, "save")
        text = json.dumps({"messages": self.session.messages()}, ensure_ascii=False, indent=1)
        try:
            write_text(file, text + "\n")
        except OSError as error:
            raise UserError(f"{file} cannot be written ({error.strerror}).") from None
        self.say(f"saved to {file}")

    def load(self, rest: str) -> None:  # noqa: D102
        file = _path(rest, "load")
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}).") from None
        except ValueError:
            raise UserError(f"{file} is no conversation that /save wrote: it is no JSON.") from None
        self.session.restore(found.get("messages") if isinstance(found, dict) else found)
        self.say(f"loaded {len(self.session.history)} questions and answers")

    def retry(self, rest: str) -> None:  # noqa: D102
        history = self.session.history
        if self._last is None and not history:
            raise UserError("Nothing was said yet; there is nothing to try again.")
        before = list(history)
        if self._last is None or (history and history[-1][0] == self._last):
            self._last = history.pop()[0]
        self._tries += 1
        ended = False
        try:
            ended = self.answer(self._last)
        finally:
            if not ended:
                history[:] = before

    def undo(self, rest: str) -> None:  # noqa: D102
        said, _ = self.session.undo()
        self._last = None
        first = said.splitlines()[0]
        self.say(f"forgotten: {first[:60]}{'…' if first != said or len(first) > 60 else ''}")

    def exit(self, rest: str) -> None:  # noqa: D102
        self._ended = True

    def _settings(self) -> list[str]:
        params, first = self.session.params, self._first_params
        lines = []
        for name in SETTINGS:
            value, was = getattr(params, name), getattr(first, name)
            lines.append(f"{name} = {value}" + ("" if value == was else f" (was {was})"))
        stop = json.dumps(list(self.session.stop), ensure_ascii=False)
        if self.session.has_thinking_switch:
            lines.append(f"thinking = {'off' if self.session.thinking is False else 'on'}")
        return [*lines, f"seed = {self.seed}", f"stop = {stop}"]


@dataclasses.dataclass(frozen=True)
class Command:
    """A command: its names, how it is used, what it does."""

    names: tuple[str, ...]
    usage: str
    help: str
    run: Callable[[Repl, str], None]


# Further names are those of the release's cli_demo.py and of ollama.
COMMANDS = (
    Command(("help", "h", "?"), "/help", "this list", Repl.help),
    Command(
        ("system",), "/system [TEXT]", "show or set the system prompt (- for none)", Repl.system
    ),
    Command(
        ("clear", "clh", "clear-his", "clear-history"),
        *("/clear", "forget the conversation (also /clh)", Repl.clear),
    ),
    Command(("screen", "cl"), "/screen", "clear the screen (also /cl)", Repl.screen),
    Command(("history", "his"), "/history", "what was said", Repl.history),
    Command(("seed",), "/seed [N]", "show or set the seed", Repl.set_seed),
    Command(
        ("set", "conf", "config"),
        *("/set [KEY VALUE]", "show or change settings (also /conf KEY=VALUE)", Repl.set),
    ),
    Command(("reset", "reset-conf"), "/reset", "settings as at the start", Repl.reset),
    Command(("show",), "/show", "the model and all settings", Repl.show),
    Command(("save",), "/save FILE", "write the conversation", Repl.save),
    Command(("load",), "/load FILE", "go on with one that was saved", Repl.load),
    Command(("retry", "regen"), "/retry", "answer the last question once more", Repl.retry),
    Command(("undo",), "/undo", "forget the last question and answer", Repl.undo),
    Command(("exit", "quit", "q", "bye"), "/exit", "leave (also Ctrl-D)", Repl.exit),
)
_BY_NAME = {name: command for command in COMMANDS for name in command.names}
WORDS = tuple(f"/{command.names[0]}" for command in COMMANDS)


def speed(answer: Answer) -> str:
    """How fast an answer came: tokens, tokens per second after the first, time to the first."""
    submitted, first, ended = answer.times
    if first is None or ended is None:
        return "no tokens"
    rate = (answer.new_tokens - 1) / (ended - first) if ended > first else math.nan
    per_second = f", {rate:.1f} tokens/s" if answer.new_tokens > 1 else ""
    cached = f", {answer.cached_tokens} cached" if answer.cached_tokens else ""
    return (
        f"{answer.new_tokens} tokens{per_second}, first after {first - submitted:.2f} s "
        f"(prompt {answer.prompt_tokens}{cached})"
    )


def _number(name: str, value: str) -> int | float:
    whole = isinstance(getattr(SamplingParams, name), int)
    try:
        return int(value) if whole else float(value)
    except ValueError:
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{name} is {value!r}; it must be {kind}.") from None


def _stop_strings(value: str) -> tuple[str, ...]:
    """A JSON list of strings, one such string, or plain text; nothing for none."""
    if not value:
        return ()
    try:
        found = json.loads(value)
    except ValueError:
        return (value,)
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(s, str) and s for s in found):
        raise UserError(f'stop is {value}; write a text, or a list such as ["one", "two"].')
    return tuple(found)


def _path(rest: str, command: str) -> pathlib.Path:
    if not rest:
        raise UserError(f"Name a file: /{command} FILE.")
    return pathlib.Path(os.path.expanduser(rest))
