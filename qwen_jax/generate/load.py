"""From a path to a model that talks, in three lines:

from qwen_jax import load
qwen = load("Qwen-7B-Chat")
print(qwen.chat("Hello!"))
"""

from __future__ import annotations

import os
from typing import Any

from qwen_jax.errors import UserError, nearest
from qwen_jax.generate.engine import Engine, EngineOptions
from qwen_jax.generate.handle import Qwen
from qwen_jax.generate.model import default_dtype, find_model, forward_options, load_weights
from qwen_jax.generate.service import Service
from qwen_jax.generate.status import StatusLine, watch_log
from qwen_jax.model.options import DTYPES

# Of a notebook: whoever submits a list of prompts wants all of them answered.
_MAX_WAITING = 2**31


def load(
    path: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike | None = None,
    step: int | None = None,
    chat_format: str | None = None,
    dtype: str | None = None,
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
      max_waiting: requests that may wait; more are refused.
      **engine: fields of `EngineOptions`, such as rows=4, max_length=2048 or pages=512; what is
        not given follows from the model and the memory there is.

    Raises:
      UserError: there is no model, parts are missing or damaged, or it does not fit.
    """
    dtype = default_dtype() if dtype is None else dtype
    if dtype not in DTYPES:
        raise UserError(
            f"dtype is {dtype!r}{nearest(dtype, DTYPES)}; it must be one of {', '.join(DTYPES)}."
        )
    with StatusLine() as status, watch_log(status.show):
        status.show(f"reading {path}")
        source = find_model(path, tokenizer=tokenizer, step=step, chat_format=chat_format)
        params = load_weights(source, dtype)
        running = Engine(
            params,
            source.config,
            forward_options(dtype),
            EngineOptions(**engine),
            vocab_size=min(source.tokenizer.vocab_size, source.config.vocab_size),
        )
        del params
        running.warm_up()
    service = Service(running, source.tokenizer, max_waiting=max_waiting)
    return Qwen(service, source.config, source.defaults, source.name)
