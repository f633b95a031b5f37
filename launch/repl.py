"""Interactive conversation of `launch.chat`: commands, settings and streamed answers."""

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

from launch.terminal import InputReader, printable, unquote
from qwen_jax.artifact import write_text
from qwen_jax.engine.request import SamplingParams
from qwen_jax.errors import UserError, nearest
from qwen_jax.generate.service import Answer
from qwen_jax.generate.session import Reply, Session, override_params

# Sampling parameters that /set changes.
SETTINGS = (
    "max_tokens", "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
_ALIASES = {"max_new_tokens": "max_tokens"}  # the name in Hugging Face's generation config

HELP = """\
Type a message and press Enter. For several lines, press Alt-Enter, paste them, or put them between
\"\"\". Ctrl-C stops an answer, which is then not part of the conversation.
Commands, which may also begin with ":":"""


@contextlib.contextmanager
def on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Context manager in which Ctrl-C calls `stop` instead of raising KeyboardInterrupt.

    An exception could be raised, and lost, inside a callback of the interpreter. In threads other
    than the main thread it has no effect, because they receive no signals.
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
    """Read–evaluate–print loop over a conversation: sends messages, runs commands, prints answers.

    Attributes:
      session: the conversation.
      seed: seed of the next answers; the k-th /retry of a message uses `seed + k`.
    """

    def __init__(
        self,
        session: Session,
        *,
        reader: InputReader,
        out: TextIO,
        description: str,
        seed: int,
        colour: bool,
    ):
        """Prepares the loop.

        Args:
          session: the conversation.
          reader: source of the user's input.
          out: stream on which everything is printed.
          description: the model in one line, for /show.
          seed: seed of the answers.
          colour: whether to use terminal codes: text that is not the model's is dimmed, and /screen
            clears the screen.
        """
        self.session, self.seed = session, seed
        self._reader, self._out, self._description = reader, out, description
        self._dim = ("\x1b[2m", "\x1b[0m") if colour else ("", "")
        self._initial_params, self._initial_seed = session.params, seed
        self._last_query: str | None = None
        self._num_retries = 0  # of the last query
        self._num_interrupts = 0  # consecutive Ctrl-C at the prompt
        self._ended = False

    def run(self) -> None:
        """Reads and handles inputs until /exit or the end of the input."""
        while not self._ended:
            try:
                text = self._reader.read()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._num_interrupts += 1
                if self._num_interrupts >= 2:
                    self.print_note("To leave, type /exit or press Ctrl-D.")
                continue
            self._num_interrupts = 0
            try:
                self.handle(text)
            except UserError as error:
                self.print_note(str(error))

    def handle(self, text: str) -> None:
        """Handles one input, a command or a message to the model; ignores an empty one.

        Raises:
          UserError: an unknown command, or bad input.
        """
        if not text.strip():
            return
        if text[0] not in "/:":
            text = unquote(text)
            self._last_query, self._num_retries = text, 0
            self.answer(text)
            return
        word, _, rest = text[1:].partition(" ")
        if word not in _COMMANDS_BY_NAME:
            raise UserError(
                f"There is no command {text[0]}{word}{nearest(word, _COMMANDS_BY_NAME)}; /help "
                "lists them. Begin with a space to send the text to the model."
            )
        _COMMANDS_BY_NAME[word].run(self, rest.strip())

    def answer(self, query: str) -> bool:
        """Sends a message and prints the answer as it is generated, then a line with its speed.

        Returns:
          Whether the answer is complete; False if Ctrl-C stopped it.
        """
        reply = self.session.ask(query, seed=(self.seed + self._num_retries) % 2**63)
        try:
            with on_interrupt(reply.cancel):
                self._print_reply(reply)
            stopped = reply.finish == "cancelled"
        except KeyboardInterrupt:
            reply.cancel()
            stopped = True
        self._out.write("\n")
        if stopped:
            self.print_note("stopped; this answer is not part of the conversation")
        else:
            self.print_note(format_speed(reply.answer) + self._length_note(reply))
        return not stopped

    def _length_note(self, reply: Reply) -> str:
        """Returns a note about the limit that cut an answer off; "" if it ended by itself."""
        if reply.finish != "length":
            return ""
        if reply.answer.new_tokens >= self.session.params.max_tokens:
            return "; cut at max_tokens, /set max_tokens N for more"
        return "; cut at the maximum length of prompt and answer together"

    def print_note(self, text: str) -> None:
        """Prints a line that is not the model's text, dimmed on a terminal."""
        self._out.write(f"{self._dim[0]}{printable(text)}{self._dim[1]}\n")
        self._out.flush()

    def _print_reply(self, reply: Reply) -> None:
        """Prints the text of a reply as it is generated."""
        for piece in visible_pieces(reply, self.session.is_chat_model):
            self._out.write(printable(piece))
            self._out.flush()

    # Commands. Each receives the text after its name, without white space around it.

    def help(self, rest: str) -> None:
        """Prints the list of commands."""
        rows = [(command.usage, command.help) for command in COMMANDS]
        width = max(len(usage) for usage, _ in rows)
        lines = [f"  {usage:{width}}  {text}" for usage, text in rows]
        self.print_note("\n".join([HELP, *lines]))

    def system(self, rest: str) -> None:
        """Sets the system prompt to `rest`, removes it for "-", prints it for ""."""
        if not self.session.is_chat_model:
            raise UserError("A base model has no system prompt; write it before your text.")
        if not rest:
            self.print_note(self.session.system or "There is no system prompt.")
            return
        self.session.system = None if rest == "-" else rest
        self.print_note("The system prompt is set, also for the messages so far.")

    def clear(self, rest: str) -> None:
        """Clears the conversation."""
        self.session.history.clear()
        self._last_query = None
        self.print_note("The conversation is empty.")

    def screen(self, rest: str) -> None:
        """Clears the screen of a terminal."""
        if self._dim[0]:
            self._out.write("\x1b[2J\x1b[H")

    def history(self, rest: str) -> None:
        """Prints the conversation."""
        for query, answer in self.session.history:
            self.print_note(f"> {query}")
            self._out.write(printable(answer) + "\n")
        if not self.session.history:
            if self.session.is_chat_model:
                self.print_note("There are no messages yet.")
            else:
                self.print_note("A base model keeps no conversation.")

    def set_seed(self, rest: str) -> None:
        """Sets the seed unless `rest` is empty, and prints it."""
        if rest:
            if not rest.isdecimal() or int(rest) >= 2**63:
                raise UserError(f"The seed is {rest!r}; it must be an integer of 0 or more.")
            self.seed = int(rest)
        self.print_note(f"seed = {self.seed}")

    def set(self, rest: str) -> None:
        """Changes a setting given as "KEY VALUE" or "KEY=VALUE"; prints all settings for ""."""
        if not rest:
            self.print_note("\n".join(self._settings()))
            return
        name, _, value = rest.replace("=", " ", 1).partition(" ")
        name, value = _ALIASES.get(name.strip(), name.strip()), value.strip()
        if name == "seed":
            self.set_seed(value)
        elif name == "stop":
            self.session.stop = _parse_stop(value)
            self.print_note(f"stop = {json.dumps(self.session.stop, ensure_ascii=False)}")
        elif name == "thinking" and self.session.has_thinking_switch:
            if value not in ("on", "off"):
                raise UserError(f"thinking is {value!r}; it must be on or off.")
            self.session.thinking = value == "on"
            self.print_note(f"thinking = {value}")
        elif name not in SETTINGS:
            known = (*SETTINGS, "seed", "stop")
            raise UserError(f"There is no setting {name!r}{nearest(name, known)}; /set lists them.")
        else:
            number = _parse_number(name, value)
            self.session.params = override_params(self.session.params, {name: number})
            self.print_note(f"{name} = {number}")

    def reset(self, rest: str) -> None:
        """Restores the initial settings."""
        self.session.params, self.seed = self._initial_params, self._initial_seed
        self.session.stop, self.session.thinking = self.session.defaults.stop, None
        self.print_note("All settings have their initial values.")

    def show(self, rest: str) -> None:
        """Prints the model, the system prompt, the length of the conversation and all settings."""
        lines = [self._description]
        if self.session.is_chat_model:
            lines.append(f"system prompt: {self.session.system or 'none'}")
            lines.append(f"{len(self.session.history)} questions and answers so far")
        self.print_note("\n".join(lines + self._settings()))

    def save(self, rest: str) -> None:
        """Writes the conversation to a JSON file, as OpenAI messages."""
        file = _parse_path(rest, "save")
        text = json.dumps({"messages": self.session.messages()}, ensure_ascii=False, indent=1)
        try:
            write_text(file, text + "\n")
        except OSError as error:
            raise UserError(f"{file} cannot be written ({error.strerror}).") from None
        self.print_note(f"saved to {file}")

    def load(self, rest: str) -> None:
        """Replaces the conversation by one from a file that /save wrote, or a list of messages."""
        file = _parse_path(rest, "load")
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}).") from None
        except ValueError:
            raise UserError(f"{file} is not JSON; give a file that /save wrote.") from None
        self.session.restore(found.get("messages") if isinstance(found, dict) else found)
        self.print_note(f"loaded {len(self.session.history)} questions and answers")

    def retry(self, rest: str) -> None:
        """Generates another answer to the last message, which replaces the previous one.

        If it is stopped or fails, the previous answer is kept.
        """
        history = self.session.history
        if self._last_query is None and not history:
            raise UserError("There are no messages yet; there is nothing to retry.")
        before = list(history)
        if self._last_query is None or (history and history[-1][0] == self._last_query):
            self._last_query = history.pop()[0]
        self._num_retries += 1
        completed = False
        try:
            completed = self.answer(self._last_query)
        finally:
            if not completed:
                history[:] = before

    def undo(self, rest: str) -> None:
        """Removes the last message and its answer from the conversation."""
        query, _ = self.session.undo()
        self._last_query = None
        first = query.splitlines()[0]
        ellipsis = "…" if first != query or len(first) > 60 else ""
        self.print_note(f"removed: {first[:60]}{ellipsis}")

    def exit(self, rest: str) -> None:
        """Ends `run` after this command."""
        self._ended = True

    def _settings(self) -> list[str]:
        """Returns one line per setting, with the initial value where it was changed."""
        params, initial = self.session.params, self._initial_params
        lines = []
        for name in SETTINGS:
            value, was = getattr(params, name), getattr(initial, name)
            lines.append(f"{name} = {value}" + ("" if value == was else f" (was {was})"))
        stop = json.dumps(list(self.session.stop), ensure_ascii=False)
        if self.session.has_thinking_switch:
            lines.append(f"thinking = {'off' if self.session.thinking is False else 'on'}")
        return [*lines, f"seed = {self.seed}", f"stop = {stop}"]


def visible_pieces(reply: Reply, is_chat_model: bool) -> Iterator[str]:
    """Yields the pieces of a reply, for a chat model without leading white space.

    White space at the start of a chat model's answer is part of the chat format.
    """
    started = not is_chat_model
    for piece in reply:
        piece = piece if started else piece.lstrip()
        started = started or bool(piece)
        yield piece


@dataclasses.dataclass(frozen=True)
class Command:
    """A slash command of the chat.

    Attributes:
      names: words after "/" or ":" that run it; the first is the main one.
      usage: syntax, for /help.
      help: description in a few words, for /help.
      run: called with the `Repl` and the text after the command's name.
    """

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
        "/clear",
        "clear the conversation (also /clh)",
        Repl.clear,
    ),
    Command(("screen", "cl"), "/screen", "clear the screen (also /cl)", Repl.screen),
    Command(("history", "his"), "/history", "show the conversation", Repl.history),
    Command(("seed",), "/seed [N]", "show or set the seed", Repl.set_seed),
    Command(
        ("set", "conf", "config"),
        "/set [KEY VALUE]",
        "show or change settings (also /conf KEY=VALUE)",
        Repl.set,
    ),
    Command(("reset", "reset-conf"), "/reset", "restore the initial settings", Repl.reset),
    Command(("show",), "/show", "show the model and all settings", Repl.show),
    Command(("save",), "/save FILE", "write the conversation to a file", Repl.save),
    Command(("load",), "/load FILE", "continue a saved conversation", Repl.load),
    Command(("retry", "regen"), "/retry", "answer the last question again", Repl.retry),
    Command(("undo",), "/undo", "remove the last question and answer", Repl.undo),
    Command(("exit", "quit", "q", "bye"), "/exit", "leave (also Ctrl-D)", Repl.exit),
)
_COMMANDS_BY_NAME = {name: command for command in COMMANDS for name in command.names}
COMMAND_WORDS = tuple(f"/{command.names[0]}" for command in COMMANDS)


def format_speed(answer: Answer) -> str:
    """Returns number of tokens, tokens/s after the first, time to the first, and prompt tokens."""
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


def _parse_number(name: str, value: str) -> int | float:
    """Parses the value of sampling parameter `name`; raises UserError if it is not a number."""
    is_integer = isinstance(getattr(SamplingParams, name), int)
    try:
        return int(value) if is_integer else float(value)
    except ValueError:
        kind = "an integer" if is_integer else "a number"
        raise UserError(f"{name} is {value!r}; it must be {kind}.") from None


def _parse_stop(value: str) -> tuple[str, ...]:
    """Parses stop strings: a JSON list of strings, a JSON string, or plain text; "" for none.

    Raises:
      UserError: it is other JSON, or a string is empty.
    """
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


def _parse_path(rest: str, command: str) -> pathlib.Path:
    """Returns the path `rest` with "~" expanded; raises UserError if a `command` has none."""
    if not rest:
        raise UserError(f"Name a file: /{command} FILE.")
    return pathlib.Path(os.path.expanduser(rest))
