"""Reading what a person or a pipe says: lines, several lines between triple quotes, history."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Protocol, TextIO

import prompt_toolkit
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings

QUOTES = '"""'

# Control characters are shown, not obeyed: text must not move the cursor or set colours.
_SHOWN = {c: 0x2400 + c for c in range(0x20) if c not in (0x09, 0x0A)}
_SHOWN |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def printable(text: str) -> str:
    """`text` with control characters, but for tabs and newlines, as visible signs."""
    return text.translate(_SHOWN)


class Lines(Protocol):
    """Where input comes from."""

    def read(self) -> str:
        """One input, perhaps of many lines, with its triple quotes if it has some.

        EOFError at the end, KeyboardInterrupt for Ctrl-C.
        """


class PlainLines:
    """Lines of a pipe; one that begins with triple quotes goes on to the closing ones."""

    def __init__(self, source: TextIO):
        self._source = source

    def read(self) -> str:
        """The next input."""
        text = self._line()
        while open_quotes(text):
            text += "\n" + self._line()
        return text

    def _line(self) -> str:
        line = self._source.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")


class Terminal:
    """A prompt with editing, history and several lines, by prompt_toolkit."""

    def __init__(self, history: pathlib.Path | None, commands: Sequence[str]):
        """`history`: file that keeps what was typed, or None; `commands`: words to complete."""
        keys = KeyBindings()

        @keys.add("enter")
        @keys.add("c-j")  # Enter, when it was typed before the prompt stood there
        def _(event) -> None:
            buffer = event.current_buffer
            if open_quotes(buffer.text):
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter")
        def _(event) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-c")
        def _(event) -> None:
            if event.current_buffer.text:
                event.current_buffer.reset()
            else:
                event.app.exit(exception=KeyboardInterrupt())

        kept = InMemoryHistory()
        if history is not None:
            kept = FileHistory(str(history))
        words = WordCompleter(list(commands), sentence=True)
        self._session = prompt_toolkit.PromptSession(
            "> ",
            multiline=True,
            prompt_continuation="· ",
            key_bindings=keys,
            history=kept,
            completer=words,
            complete_while_typing=False,
            enable_open_in_editor=True,
        )

    def read(self) -> str:
        """The next input, edited by a person."""
        return self._session.prompt()


def open_quotes(text: str) -> bool:
    """Whether triple quotes were opened at the beginning of `text` and not closed yet."""
    return text.lstrip().startswith(QUOTES) and text.count(QUOTES) < 2


def unquote(text: str) -> str:
    """The text between triple quotes, where it begins with them; else the text itself."""
    if not text.lstrip().startswith(QUOTES):
        return text
    return text.lstrip().removeprefix(QUOTES).partition(QUOTES)[0].strip("\n")
