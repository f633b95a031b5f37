"""Loading a model for generation, with its engine started:

from qwen_jax import load
qwen = load("Qwen-7B-Chat")
print(qwen.chat("Hello!"))
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import Any

import jax

from qwen_jax.engine.engine import Engine
from qwen_jax.engine.options import EngineOptions
from qwen_jax.errors import UserError, nearest
from qwen_jax.generate.handle import Qwen
from qwen_jax.generate.service import Service
from qwen_jax.generate.source import ModelSource, find_model, load_weights
from qwen_jax.generate.status_line import StatusLine, forward_log
from qwen_jax.model import ForwardOptions
from qwen_jax.model import layer_windows as windows_of_layers
from qwen_jax.model.options import DTYPES
from qwen_jax.parallel import MeshConfig, make_mesh

# No request is refused by default, so that a long list of prompts can be submitted at once.
_MAX_WAITING = 2**31


def load(
    path: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    step: int | None = None,
    chat_format: str | None = None,
    dtype: str | None = None,
    weights: str | None = None,
    layer_windows: bool = False,
    tensor: int | None = None,
    warm_up: bool = True,
    max_waiting: int = _MAX_WAITING,
    **engine: Any,
) -> Qwen:
    """Loads a model and starts an engine for it, with a status line that shows the progress.

    Args:
      path: a Hugging Face folder (Qwen to Qwen3), a working folder of a training run such as the
        `runs/demo` of `make demo`, or a folder of checkpoints.
      tokenizer: a vocabulary file or a folder with one, if `path` has none.
      step: step of the checkpoint; the newest by default.
      chat_format: "chatml" for a chat model, "raw" for one that only continues text; by default
        that of the generation config.
      dtype: of weights, activations and cache; by default "float32" on CPUs, else "bfloat16".
      weights: "int8" or "int4" quantises unquantised weights while they are loaded; a folder with
        quantised weights (GPTQ, or from `launch.quantise`) needs no option.
      layer_windows: whether lower layers of Qwen v1 use sliding windows past the trained length, as
        in the report but not in the release (docs/long_context.md).
      tensor: number of devices over which heads and vocabulary are sharded; by default the largest
        number of this host's accelerators that divides the kv heads, and one on CPUs.
      warm_up: whether to compile all programs now; otherwise each is compiled when first needed.
      max_waiting: maximum number of requests in the queue; further ones are refused.
      **engine: fields of `EngineOptions`, such as max_running_requests=4, max_length=2048 or
        pages=512; the rest is derived from the model and the available memory.

    Raises:
      UserError: there is no model at `path`, parts are missing or damaged, an option has a bad
        value, or the model does not fit in memory.
    """
    options = _parse_engine_options(engine)
    dtype = _choose_dtype(dtype)
    with StatusLine() as status:
        status.show(f"reading {path}")
        with forward_log(status.show):
            source = find_model(path, tokenizer=tokenizer, step=step, chat_format=chat_format)
            if layer_windows:
                source = with_layer_windows(source)
            started = start_engine(source, dtype, options, weights=weights, tensor=tensor)
        if warm_up:
            status.show("compiling the first program")
            started.warm_up(
                lambda done, total, name: status.show(f"compiling: {done} of {total} ({name})")
            )
    service = Service(started, source.tokenizer, max_waiting=max_waiting)
    return Qwen(service, source.config, source.defaults, source.name)


def start_engine(
    source: ModelSource,
    dtype: str,
    options: EngineOptions,
    *,
    weights: str | None = None,
    tensor: int | None = None,
) -> Engine:
    """Reads the weights of a model and creates an engine with them.

    Args:
      source: the model.
      dtype: dtype name of weights, activations and cache.
      options: options of the engine.
      weights: as in `load`.
      tensor: as in `load`.

    Raises:
      UserError: weights are missing or damaged, an option has a bad value, or the model does not
        fit in memory.
    """
    config, devices = source.config, _choose_devices(source.config.n_kv_heads, tensor)
    mesh: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if len(devices) > 1:
        mesh = jax.set_mesh(make_mesh(MeshConfig(fsdp=1, tensor=len(devices)), devices))
    with mesh:
        # No reference to the weights is kept here: the engine may change their layout, and must be
        # able to free the originals.
        return Engine(
            load_weights(source, dtype, weights),
            config,
            ForwardOptions(dtype=dtype),
            options,
            vocab_size=min(source.tokenizer.vocab_size, config.vocab_size),
        )


def with_layer_windows(source: ModelSource) -> ModelSource:
    """Returns the model with the report's layer-wise attention windows (`model.layer_windows`).

    Raises:
      UserError: the model is not a Qwen v1 with dynamic NTK, or has windows already.
    """
    config = source.config
    if not config.dynamic_ntk or config.windows:
        raise UserError(
            f"layer_windows apply only to models of Qwen v1 with dynamic NTK, and {source.name} is "
            "not one; leave the option out."
        )
    windows = windows_of_layers(config.n_layers, config.trained_length, longest=config.max_length)
    return dataclasses.replace(source, config=dataclasses.replace(config, windows=windows))


def _choose_devices(kv_heads: int, tensor: int | None) -> list[jax.Device]:
    """Returns the devices over which a model with `kv_heads` kv heads is sharded.

    Args:
      kv_heads: number of key/value heads.
      tensor: number of devices; None as in `load`.

    Raises:
      UserError: `tensor` does not divide `kv_heads`, or this host has fewer devices.
    """
    devices = jax.local_devices()
    if tensor is None:
        most = 1 if devices[0].platform == "cpu" else len(devices)
        tensor = max(n for n in range(1, most + 1) if kv_heads % n == 0)
    if not 1 <= tensor <= len(devices) or kv_heads % tensor:
        raise UserError(
            f"tensor is {tensor}; it must divide the {kv_heads} kv heads, and this host has "
            f"{len(devices)} devices."
        )
    return devices[:tensor]


def _choose_dtype(dtype: str | None) -> str:
    """Returns `dtype`, or the default of the backend for None; raises UserError if unknown."""
    if dtype is None:
        # Narrower dtypes are not faster on CPUs.
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise UserError(
            f"dtype is {dtype!r}{nearest(dtype, DTYPES)}; it must be one of {', '.join(DTYPES)}."
        )
    return dtype


def _parse_engine_options(given: dict[str, Any]) -> EngineOptions:
    """Returns engine options with the `given` fields; raises UserError for an unknown field."""
    known = EngineOptions.__dataclass_fields__
    for name in given:
        if name not in known:
            raise UserError(
                f"{name!r} is not an option of load{nearest(name, known)}; the options of the "
                f"engine are {', '.join(known)}."
            )
    return EngineOptions(**given)
