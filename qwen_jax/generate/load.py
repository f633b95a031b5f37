"""From a path to a model that talks, in three lines:

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
from qwen_jax.generate.source import Source, find_model, load_weights
from qwen_jax.generate.status_line import StatusLine, watch_log
from qwen_jax.model import ForwardOptions
from qwen_jax.model import layer_windows as windows_of_layers
from qwen_jax.model.options import DTYPES
from qwen_jax.parallel import MeshConfig, make_mesh

# By default nobody is refused: whoever submits a long list of prompts wants all of them answered.
_MAX_WAITING = 2**31


def load(
    path: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike | None = None,
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
    """Loads a model and starts an engine for it; a status line shows how far it is.

    Args:
      path: a Hugging Face folder (Qwen to Qwen3), a working folder of a training such as the
        `runs/demo` of `make demo`, or a folder of checkpoints.
      tokenizer: a vocabulary file or a folder that has one, where `path` has none.
      step: which checkpoint; the newest by default.
      chat_format: "chatml" for a chat model, "raw" for one that only continues text; by default
        what its generation config says.
      dtype: of weights, activations and cache; "float32" on CPUs and "bfloat16" elsewhere.
      weights: "int8" or "int4" quantises plain weights on the way in; a folder that holds
        quantised ones (GPTQ, or of `launch.quantise`) needs nothing.
      layer_windows: Qwen v1 beyond its trained length: lower layers see less far back, as the
        report has it and the release has not (docs/long_context.md).
      tensor: devices that share the model, heads and vocabulary divided among them; on
        accelerators as many of this host's as divide the kv heads, on CPUs one.
      warm_up: compile everything now; otherwise each program when it is first needed.
      max_waiting: requests that may wait; more are refused.
      **engine: fields of `EngineOptions`, such as max_running_requests=4, max_length=2048 or
        pages=512; what is not given follows from the model and the memory there is.

    Raises:
      UserError: there is no model, parts are missing or damaged, or it does not fit.
    """
    sizes = _engine_options(engine)
    dtype = _dtype(dtype)
    with StatusLine() as status:
        status.show(f"reading {path}")
        with watch_log(status.show):
            source = find_model(path, tokenizer=tokenizer, step=step, chat_format=chat_format)
            if layer_windows:
                source = with_layer_windows(source)
            running = start_engine(source, dtype, sizes, weights=weights, tensor=tensor)
        if warm_up:
            status.show("compiling the first program")
            running.warm_up(
                lambda done, total, name: status.show(f"compiling: {done} of {total} ({name})")
            )
    service = Service(running, source.tokenizer, max_waiting=max_waiting)
    return Qwen(service, source.config, source.defaults, source.name)


def start_engine(
    source: Source,
    dtype: str,
    sizes: EngineOptions,
    *,
    weights: str | None = None,
    tensor: int | None = None,
) -> Engine:
    """Reads the weights and makes an engine of them; arguments as those of `load`.

    Raises:
      UserError: as `load`.
    """
    config, devices = source.config, _devices(source.config.n_kv_heads, tensor)
    mesh = contextlib.nullcontext()
    if len(devices) > 1:
        mesh = jax.set_mesh(make_mesh(MeshConfig(fsdp=1, tensor=len(devices)), devices))
    with mesh:
        # Handed over at once: the engine may lay the weights out anew, and keeps no second copy.
        return Engine(
            load_weights(source, dtype, weights),
            config,
            ForwardOptions(dtype=dtype),
            sizes,
            vocab_size=min(source.tokenizer.vocab_size, config.vocab_size),
        )


def with_layer_windows(source: Source) -> Source:
    """The same model with the report's layer-wise windows (`model.layer_windows`).

    Raises:
      UserError: it is not one of Qwen v1 that extends its context, or has windows already.
    """
    config = source.config
    if not config.dynamic_ntk or config.windows:
        raise UserError(
            f"layer_windows extend models of Qwen v1 with dynamic NTK, and {source.name} is none; "
            "leave them out."
        )
    windows = windows_of_layers(config.n_layers, config.trained_length, longest=config.max_length)
    return dataclasses.replace(source, config=dataclasses.replace(config, windows=windows))


def _devices(kv_heads: int, tensor: int | None) -> list[jax.Device]:
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


def _dtype(dtype: str | None) -> str:
    if dtype is None:
        # CPUs multiply nothing narrower any faster.
        return "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise UserError(
            f"dtype is {dtype!r}{nearest(dtype, DTYPES)}; it must be one of {', '.join(DTYPES)}."
        )
    return dtype


def _engine_options(given: dict[str, Any]) -> EngineOptions:
    known = EngineOptions.__dataclass_fields__
    for name in given:
        if name not in known:
            raise UserError(
                f"{name!r} is no option of load{nearest(name, known)}; sizes are "
                f"{', '.join(known)}."
            )
    return EngineOptions(**given)
