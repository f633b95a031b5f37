"""The one exception for bad input, raised at the border and shown to the user as one sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input from outside: a config, a file, a request, a flag.

    The message is one plain sentence that names the thing, the value found, the value wanted and
    what to do. Programs in `launch/` print it alone, without a traceback, and exit with `status`.
    """

    status = 2


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns " (did you mean 'x'?)" for the closest of `known`, or "" when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
