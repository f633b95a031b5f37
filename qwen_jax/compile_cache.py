"""Compiled programs kept on disk, so that a restart does not compile again.

jax keeps an executable under a key made of the program, the compiler's options and version, and
the devices. Process 0 writes, all processes read: on several hosts the folder must be shared.
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
    """What this process has done since: hits, programs taken from the cache; added, put there."""

    hits: int = 0
    added: int = 0


def use_compile_cache(folder: str) -> CacheCounts:
    """Turns jax's persistent compilation cache on; call it before anything is compiled.

    Programs that compile in less than a second are not kept (jax's own default).

    Args:
      folder: local, NFS or gs://; made if absent.

    Returns:
      counts that grow as programs are compiled.

    Raises:
      UserError: the folder cannot be made or written.
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
        if event == "/jax/compilation_cache/cache_hits":
            counts.hits += 1
        elif event == "/jax/compilation_cache/cache_misses":  # recorded when an entry is written
            counts.added += 1

    jax.monitoring.register_event_listener(listen)
    jax.config.update("jax_compilation_cache_dir", os.fspath(path))
    return counts
