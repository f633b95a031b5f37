"""Persistent cache of compiled programs, so that a restart does not compile again.

JAX stores an executable under a key made of the program, the options and version of the compiler,
and the devices. Process 0 writes and all processes read: with several hosts the folder must be
shared.
"""

from __future__ import annotations

import dataclasses
import os
import socket

import jax
from etils import epath

from qwen_jax.errors import UserError


@dataclasses.dataclass
class CacheCounts:
    """Number of programs this process has read from and added to the compile cache.

    Attributes:
      hits: programs read from the cache.
      added: programs compiled and written to the cache.
    """

    hits: int = 0
    added: int = 0


def use_compile_cache(folder: str) -> CacheCounts:
    """Enables JAX's persistent compilation cache; call it before anything is compiled.

    Programs that compile in less than a second are not stored (JAX's default).

    Args:
      folder: a local, NFS or gs:// folder; created if missing.

    Returns:
      Counts that are updated as programs are compiled.

    Raises:
      UserError: the folder cannot be created or written.
    """
    path = epath.Path(folder).expanduser()
    probe = path / f".writable-{socket.gethostname()}-{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    # Object stores raise errors of their own, and a missing client library an ImportError.
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(f"{error!r}".split())
        raise UserError(
            f"The compile cache {folder} cannot be written ({reason}): give a folder that every "
            "process may write to, or leave out --compile_cache."
        ) from error
    counts = CacheCounts()

    def listen(event: str, **_) -> None:
        """Counts cache events as JAX reports them."""
        if event == "/jax/compilation_cache/cache_hits":
            counts.hits += 1
        elif event == "/jax/compilation_cache/cache_misses":  # recorded when an entry is written
            counts.added += 1

    jax.monitoring.register_event_listener(listen)
    jax.config.update("jax_compilation_cache_dir", os.fspath(path))
    return counts
