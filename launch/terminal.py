"""User input for `launch.chat` from a terminal or a pipe, and escaping of control characters."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Protocol, TextIO

import prompt_toolkit
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

QUOTES = '"""'

# Control characters are replaced by visible ones, so that a text cannot move the cursor or change
# colours: C0 codes by Unicode's control pictures, C1 codes by U+FFFD.
_VISIBLE = {c: 0x2400 + c for c in range(0x20) if c not in (0x09, 0x0A)}
_VISIBLE |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def printable(text: str) -> str:
    """Replaces control characters in `text`, except tabs and newlines, by visible characters."""
    return text.translate(_VISIBLE)


class InputReader(Protocol):
    """Source of user input for `Repl`."""

    def read(self) -> str:
        """Reads one input, which may have several lines; triple quotes around it are kept.

        Raises:
          EOFError: there is no more input.
          KeyboardInterrupt: Ctrl-C was pressed.
        """


class PipeReader:
    """Reads inputs from a pipe or file: one line each, or several lines between triple quotes."""

    def __init__(self, stream: TextIO):
        """Reads from `stream`."""
        self._stream = stream

    def read(self) -> str:
        """Reads the next input; raises EOFError at the end."""
        text = self._read_line()
        while has_open_quotes(text):
            text += "\n" + self._read_line()
        return text

    def _read_line(self) -> str:
        """Reads a line without its newline; raises EOFError at the end."""
        line = self._stream.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")


class TerminalReader:
    """Reads inputs from a terminal with editing, history and completion, by prompt_toolkit."""

    def __init__(self, history: pathlib.Path | None, commands: Sequence[str]):
        """Creates the prompt.

        Args:
          history: file in which inputs are kept; None keeps them in memory.
          commands: words that the Tab key completes.
        """
        keys = KeyBindings()

        @keys.add("enter")
        @keys.add("c-j")  # Enter, if it was typed before the prompt was shown
        def _submit_or_break_line(event: KeyPressEvent) -> None:
            """Submits the input; inside triple quotes, inserts a newline instead."""
            buffer = event.current_buffer
            if has_open_quotes(buffer.text):
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _break_line(event: KeyPressEvent) -> None:
            """Inserts a newline."""
            event.current_buffer.insert_text("\n")

        @keys.add("c-c")
        def _clear_or_interrupt(event: KeyPressEvent) -> None:
            """Clears the input; if it is empty, ends the prompt with KeyboardInterrupt."""
            if event.current_buffer.text:
                event.current_buffer.reset()
            else:
                event.app.exit(exception=KeyboardInterrupt())

        inputs: History = InMemoryHistory()
        if history is not None:
            inputs = FileHistory(str(history))
        self._session: prompt_toolkit.PromptSession[str] = prompt_toolkit.PromptSession(
            "> ",
            multiline=True,
            prompt_continuation="· ",
            key_bindings=keys,
            history=inputs,
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            enable_open_in_editor=True,
        )

    def read(self) -> str:
        """Shows the prompt and reads the next input; raises as `InputReader.read`."""
        return self._session.prompt()


def has_open_quotes(text: str) -> bool:
    """Returns whether `text` begins with triple quotes that are not closed yet."""
    return text.lstrip().startswith(QUOTES) and text.count(QUOTES) < 2


def unquote(text: str) -> str:
    """Returns the text between triple quotes if `text` begins with them, else `text` itself."""
    if not text.lstrip().startswith(QUOTES):
        return text
    return text.lstrip().removeprefix(QUOTES).partition(QUOTES)[0].strip("\n")
