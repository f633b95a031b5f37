"""Start and end of every program: flags, logging, devices, and errors as one sentence."""

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

from launch.resolved import resolved_flags
from qwen_jax.compile_cache import CacheCounts, use_compile_cache
from qwen_jax.errors import UserError, nearest
from qwen_jax.parallel.distributed import end_process, initialize

CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", 0, "Number of devices to split this host's CPU into; 0: not split, or no CPU."
)
START_TIMEOUT = flags.DEFINE_float(
    "start_timeout", 300.0, "Seconds to wait at start-up for the other processes of the job."
)
COMPILE_CACHE = flags.DEFINE_string(
    "compile_cache", None, "Folder for compiled programs, reused by the next start; gs:// too."
)
PRINT_CONFIG = flags.DEFINE_bool(
    "print_config",
    False,
    "Print every flag, and every key of the recipe, with its resolved value and exit. The output "
    "is a flag file: compare two with diff, or pass one to --flagfile.",
)
DEFAULT_CACHE = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "qwen_jax", "compiled")
"""Folder for compiled programs if `run` is called with cache_by_default."""

# Libraries that also log through absl, and whose INFO lines do not concern the user of a program.
_VERBOSE_LIBRARIES = re.compile(r"[/\\](orbax|grain|array_record|etils|jax|jaxlib)[/\\]")


def _is_relevant(record: python_logging.LogRecord) -> bool:
    """Returns whether a log record is shown: warnings, and lines not from verbose libraries."""
    return record.levelno > python_logging.INFO or not _VERBOSE_LIBRARIES.search(record.pathname)


def _keep_freed_memory() -> None:
    """Configures glibc to reuse freed memory instead of returning it to the system.

    XLA on CPU allocates and frees its buffers in every step; returned to the system, each is mapped
    again as fresh pages. A step of the demo takes 10 % less CPU time this way. No effect without
    glibc.
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
    """Sets up logging, devices, compile cache and the job's processes; returns cache counters."""
    logging.set_verbosity(logging.INFO)
    logging.use_absl_handler()
    logging.get_absl_handler().addFilter(_is_relevant)
    if CPU_DEVICES.value:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", CPU_DEVICES.value)
        _keep_freed_memory()
    jax.config.update("jax_remove_size_one_mesh_axis_from_type", True)
    counts = use_compile_cache(COMPILE_CACHE.value) if COMPILE_CACHE.value else None
    initialize(timeout_s=START_TIMEOUT.value)
    return counts


def _parse(argv: list[str]) -> list[str]:
    """Parses flags as absl does, after checking the recipe's keys for clearer errors."""
    try:
        if "config" in flags.FLAGS:
            _check_recipe(argv)
        return flags.FLAGS(argv)
    except (flags.Error, UserError) as error:
        _fail(" ".join(str(error).split()))


def _check_recipe(argv: list[str]) -> None:
    """Loads the recipe of `--config` and checks that every `--config.a.b=…` is one of its keys.

    Raises:
      UserError: no such file or recipe, or an unknown key; the message has the nearest one.
    """
    place: str | None = None
    overrides: list[list[str]] = []
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
    """Returns the result of `get_config(argument)` in the Python file at `path`."""
    if not os.path.isfile(path) or not path.endswith(".py"):
        raise UserError(f"--config={path} is not a Python file; give configs/pretrain.py:SIZE")
    spec = importlib.util.spec_from_file_location("_recipe", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules["_recipe"] = module  # dataclasses in a recipe look up their module
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={path} has no get_config; give configs/pretrain.py:SIZE")
    return module.get_config(*argument)


def _fail(sentence: str, status: int = UserError.status) -> NoReturn:
    """Prints an error sentence and ends the process with `status`, also if others continue."""
    print(f"error: {sentence}", file=sys.stderr)
    end_process(status)


def _cache_by_default() -> None:
    """Sets --compile_cache to `DEFAULT_CACHE` if it is not given and the folder is writable."""
    with contextlib.suppress(OSError):
        folder = os.path.expanduser(DEFAULT_CACHE)
        os.makedirs(folder, exist_ok=True)
        if os.access(folder, os.W_OK):
            flags.set_default(COMPILE_CACHE, folder)


def run(
    main: Callable[..., int | None],
    *,
    recipe: type | None = None,
    commands: Sequence[str] = (),
    devices: bool = True,
    cache_by_default: bool = False,
) -> None:
    """Runs a program: parses flags, joins the processes of the job, and calls `main`.

    Bad input (`UserError`) ends the program with one sentence on stderr and status 2, without a
    traceback; a process of the job that fails to join, with status 69. With --print_config, `main`
    is not called and nothing is written.

    Args:
      main: called without arguments, or with the command if there are commands; returns the exit
        status, None for 0.
      recipe: dataclass that the flag --config describes, if the program has it.
      commands: words of which the first argument must be one.
      devices: False for a program that only reads and writes text: jax is not started.
      cache_by_default: whether compiled programs are cached in `DEFAULT_CACHE` without a flag; for
        programs that are started often.
    """
    arguments = sys.argv[1:2] if commands else []

    def guarded(argv: list[str]) -> int:
        counts = None
        try:
            if argv[1:]:
                raise UserError(f"{argv[1]!r} is not a flag: write --name=value")
            if PRINT_CONFIG.value:
                print(resolved_flags(recipe), end="")
                return 0
            if cache_by_default:
                _cache_by_default()
            if devices:
                counts = _start()
            status = main(*arguments) or 0
        except UserError as error:
            _fail(str(error), error.status)
        if counts:
            logging.info(
                "compile cache %s: %d programs taken from it, %d added",
                COMPILE_CACHE.value,
                counts.hits,
                counts.added,
            )
        return status

    try:
        # Expanded here, because the recipe's keys are looked up in `sys.argv`.
        sys.argv = flags.FLAGS.read_flags_from_files(sys.argv, force_gnu=False)
    except flags.Error as error:
        _fail(" ".join(str(error).split()))
    argv = sys.argv
    if commands and not {"--help", "-help", "--helpfull", "-h"}.intersection(arguments):
        word = arguments[0] if arguments else ""
        if word not in commands:
            found = f"{word!r} is not one{nearest(word, commands)}" if word else "none is given"
            choices = ", ".join(commands)
            _fail(f"the first argument must be a command, {found}; choose one of {choices}")
        argv = [sys.argv[0], *sys.argv[2:]]
    app.run(guarded, argv=argv, flags_parser=_parse)
