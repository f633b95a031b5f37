"""What every program does first and last: flags, logging, devices, errors as one sentence."""

from __future__ import annotations

import contextlib
import ctypes
import logging as python_logging
import re
import sys
from collections.abc import Callable

import jax
from absl import app, flags, logging

from qwen_jax.errors import UserError, nearest
from qwen_jax.parallel.distributed import initialize

CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", 0, "Split this host's CPU into so many devices, to try a mesh without hardware."
)

# Libraries whose INFO lines go through absl too and say nothing to the user of a program.
_CHATTY = re.compile(r"[/\\](orbax|grain|array_record|etils|jax|jaxlib)[/\\]")


def _quiet(record: python_logging.LogRecord) -> bool:
    return record.levelno > python_logging.INFO or not _CHATTY.search(record.pathname)


def _keep_freed_memory() -> None:
    """Tells glibc to reuse freed memory instead of giving it back to the system.

    XLA on CPU allocates and frees its buffers in every step; handed back, each comes again as fresh
    pages. A step of the demo takes 10 % less CPU time this way. Elsewhere than glibc: nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in (
            (-1, 2**31 - 1),  # M_TRIM_THRESHOLD: never shrink the heap
            (-3, 2**30),  # M_MMAP_THRESHOLD: buffers below 1 GiB come from the heap
            (-8, 1),  # M_ARENA_MAX: one heap for all threads
        ):
            mallopt(parameter, value)


def _start() -> None:
    logging.set_verbosity(logging.INFO)
    logging.use_absl_handler()
    logging.get_absl_handler().addFilter(_quiet)
    if CPU_DEVICES.value:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", CPU_DEVICES.value)
        _keep_freed_memory()
    jax.config.update("jax_remove_size_one_mesh_axis_from_type", True)
    initialize()


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, with a misspelt config key turned into a sentence."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _fail(f"{error}")
    except UserError as error:
        _fail(str(error))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        _fail(_config_error(argv, error))
    raise AssertionError("unreachable")


def _config_error(argv: list[str], error: Exception) -> str:
    """Names the first `--config.a.b=…` on the command line that the recipe does not have."""
    try:
        config = flags.FLAGS["config"].value
    except (KeyError, flags.Error):
        config = None
    for argument in argv[1:]:
        match = re.match(r"--?config\.([\w.]+)", argument)
        node, path = config, "config"
        for key in match.group(1).split(".") if match and config is not None else ():
            known = list(node) if hasattr(node, "keys") else []
            if key not in known:
                has = f"; {path} has {', '.join(known)}" if known else ""
                return f"{path}.{key} is not a setting{nearest(key, known)}{has}"
            node, path = node[key], f"{path}.{key}"
    return " ".join(str(error).split())


def _fail(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def run(main: Callable[[], int | None]) -> None:
    """Runs a program: `main` without arguments after flags are parsed and processes have joined.

    Bad input (`UserError`) ends it with one sentence on stderr and status 2, without a traceback.
    """

    def guarded(argv: list[str]) -> int:
        try:
            if argv[1:]:
                raise UserError(f"{argv[1]!r} is not a flag: write --name=value")
            _start()
            return main() or 0
        except UserError as error:
            _fail(str(error))
            return 2

    app.run(guarded, flags_parser=_parse)
