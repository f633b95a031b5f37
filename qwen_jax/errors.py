"""The exception for bad input, which programs show to the user as one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Error for bad input from outside: a config, a file, a request, a flag.

    The message is one plain sentence that names the thing, the value found, the value expected and
    the remedy. Programs in `launch/` print only the message, without a traceback, and exit with
    `status`.
    """

    status = 2


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the closest of `known`, or "" if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
