"""What every program does first and last: flags, logging, devices, errors as one sentence."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging as python_logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

from qwen_jax.compile_cache import CacheCounts, use_compile_cache
from qwen_jax.errors import UserError, nearest
from qwen_jax.parallel.distributed import end_process, initialize

CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", 0, "Split this host's CPU into so many devices, to try a mesh without hardware."
)
START_TIMEOUT = flags.DEFINE_float(
    "start_timeout", 300.0, "Seconds that the processes of a job wait for each other at the start."
)
COMPILE_CACHE = flags.DEFINE_string(
    "compile_cache", None, "Folder that keeps compiled programs for the next start; gs:// too."
)
COMPILED = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "qwen_jax", "compiled")
"""Where `keep_compiled` keeps programs."""

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


def _start() -> CacheCounts | None:
    logging.set_verbosity(logging.INFO)
    logging.use_absl_handler()
    logging.get_absl_handler().addFilter(_quiet)
    if CPU_DEVICES.value:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", CPU_DEVICES.value)
        _keep_freed_memory()
    jax.config.update("jax_remove_size_one_mesh_axis_from_type", True)
    counts = use_compile_cache(COMPILE_CACHE.value) if COMPILE_CACHE.value else None
    initialize(timeout_s=START_TIMEOUT.value)
    return counts


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, after a look of our own at the recipe, whose errors it would bury."""
    try:
        if "config" in flags.FLAGS:
            _check_recipe(argv)
        return flags.FLAGS(argv)
    except (flags.Error, UserError) as error:
        _fail(" ".join(str(error).split()))


def _check_recipe(argv: list[str]) -> None:
    """Loads the recipe of `--config` and refuses the first `--config.a.b=…` that it has not.

    Raises:
      UserError: no such file or recipe, or an unknown key; names the nearest.
    """
    place, overrides = None, []
    for argument, following in zip(argv[1:], [*argv[2:], ""], strict=False):
        if match := re.fullmatch(r"--?config(?:=(.*))?", argument):
            place = match.group(1) if match.group(1) is not None else following
        elif match := re.match(r"--?(?:no)?config\.([\w.]+)", argument):
            overrides.append(match.group(1).split("."))
    if place is None:
        if overrides:
            raise UserError("--config is missing: give a recipe, such as configs/pretrain.py:7b")
        return
    config = _load_recipe(*place.split(":", 1))
    for keys in overrides:
        node, path = config, "config"
        for key in keys:
            if not hasattr(node, "keys"):
                raise UserError(f"{path} is {node!r} and has no {key!r}; leave out .{key}")
            if key not in node:
                raise UserError(
                    f"{path}.{key} is not a setting{nearest(key, node)}; "
                    f"{path} has {', '.join(node)}"
                )
            node, path = node[key], f"{path}.{key}"


def _load_recipe(path: str, *argument: str) -> Any:
    """What `get_config(argument)` of the Python file at `path` returns."""
    if not os.path.isfile(path) or not path.endswith(".py"):
        raise UserError(f"--config={path} is not a Python file; give configs/pretrain.py:SIZE")
    spec = importlib.util.spec_from_file_location("_recipe", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["_recipe"] = module  # where dataclasses in a recipe look themselves up
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={path} has no get_config; give configs/pretrain.py:SIZE")
    return module.get_config(*argument)


def _fail(sentence: str, status: int = UserError.status) -> NoReturn:
    """One sentence and the status. Of several processes, this may be the only one that fails."""
    print(f"error: {sentence}", file=sys.stderr)
    end_process(status)


def keep_compiled() -> None:
    """Has compiled programs kept for the next start even if no flag says so, where there is room.

    For programs that people start again and again; call it before `run`.
    """
    with contextlib.suppress(OSError):
        folder = os.path.expanduser(COMPILED)
        os.makedirs(folder, exist_ok=True)
        if os.access(folder, os.W_OK):
            flags.set_default(COMPILE_CACHE, folder)


def run(
    main: Callable[..., int | None], *, commands: Sequence[str] = (), devices: bool = True
) -> None:
    """Runs a program: `main` after flags are parsed and the processes of the job have joined.

    Bad input (`UserError`) ends it with one sentence on stderr and status 2, without a traceback;
    processes of the job that did not come, with status 69.

    Args:
      main: called without arguments, or with the command where there are some.
      commands: words of which the first argument must be one.
      devices: False for a program that only reads and writes text: jax is not started.
    """
    arguments = sys.argv[1:2] if commands else []

    def guarded(argv: list[str]) -> int:
        counts = None
        try:
            if argv[1:]:
                raise UserError(f"{argv[1]!r} is not a flag: write --name=value")
            if devices:
                counts = _start()
            status = main(*arguments) or 0
        except UserError as error:
            _fail(str(error), error.status)
        if counts:
            logging.info(
                "compile cache %s: %d programs taken from it, %d added",
                *(COMPILE_CACHE.value, counts.hits, counts.added),
            )
        return status

    argv = sys.argv
    if commands and not {"--help", "-help", "--helpfull", "-h"}.intersection(arguments):
        word = arguments[0] if arguments else ""
        if word not in commands:
            found = f"{word!r} is none{nearest(word, commands)}" if word else "none is given"
            _fail(f"the first argument is a command, {found}; choose one of {', '.join(commands)}")
        argv = [sys.argv[0], *sys.argv[2:]]
    app.run(guarded, argv=argv, flags_parser=_parse)
