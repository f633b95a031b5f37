"""Serves a model over HTTP with OpenAI's API, and a chat page at `/`.

    python -m launch.serve --model=Qwen-7B-Chat                  http://127.0.0.1:8000
    python -m launch.serve --model=runs/demo --port=0            any free port
    QWEN_JAX_API_KEYS=KEY python -m launch.serve --model=DIR --host=0.0.0.0

--model is a Hugging Face folder, the folder of a training run, or a folder of checkpoints. Sampling
fields that a request leaves out come from the model's generation config. On SIGTERM and Ctrl-C,
running answers have --drain seconds to finish; a second signal cancels them. See docs/serving.md.
"""

from __future__ import annotations

import os
import time

from absl import flags, logging

from launch import program
from qwen_jax.engine.options import KV_DTYPES
from qwen_jax.errors import UserError
from qwen_jax.generate.load import load
from qwen_jax.server.app import create_app
from qwen_jax.server.config import ServerLimits, served_model
from qwen_jax.server.http_server import DrainingServer, bind_socket, is_loopback, socket_url

API_KEYS_VARIABLE = "QWEN_JAX_API_KEYS"

MODEL = flags.DEFINE_string("model", None, "Model folder or checkpoints.", required=True)
NAME = flags.DEFINE_string("name", None, "Model id in the API; the folder's name by default.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Vocabulary, if --model contains none.")
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest by default.")
FORMAT = flags.DEFINE_enum("chat_format", None, ["chatml", "raw"], "Overrides the model's own.")
DTYPE = flags.DEFINE_string("dtype", None, "Default: float32 on CPUs, bfloat16 elsewhere.")
WEIGHTS = flags.DEFINE_string("weights", None, "int8 or int4: quantise unquantised weights.")
LAYER_WINDOWS = flags.DEFINE_bool(
    "layer_windows",
    False,
    "Qwen v1: smaller attention windows in lower layers, for texts beyond its training length.",
)
TENSOR = flags.DEFINE_integer("tensor", None, "Number of devices that share the model.")
WARM_UP = flags.DEFINE_bool("warm_up", True, "Compile all programs before the first request.")
SIZES = {
    "max_running_requests": flags.DEFINE_integer(
        "max_running_requests", None, "Maximum number of requests decoded together."
    ),
    "max_length": flags.DEFINE_integer(
        "max_length", None, "Maximum number of tokens of prompt and answer together."
    ),
    "memory": flags.DEFINE_float("memory", None, "Fraction of a device's memory to use."),
    "pages": flags.DEFINE_integer("pages", None, "Number of pages of the KV cache."),
    "page_size": flags.DEFINE_integer("page_size", None, "Tokens per page of the KV cache."),
    "prefill_tokens": flags.DEFINE_integer(
        "prefill_tokens", None, "Maximum number of prompt tokens per prefill call."
    ),
    "kv_dtype": flags.DEFINE_enum(
        "kv_dtype", None, KV_DTYPES, "Data type of the KV cache; uint8 takes half the memory."
    ),
}

HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 for all.")
PORT = flags.DEFINE_integer("port", 8000, "Port; 0 for any free one.", 0, 65_535)
API_KEY = flags.DEFINE_multi_string(
    "api_key",
    [],
    "API key that requests must carry; may be repeated. Flags are visible to other users of this "
    f"machine: the environment variable {API_KEYS_VARIABLE} (comma-separated keys) is safer.",
)
CORS = flags.DEFINE_multi_string(
    "cors", [], "Origin whose pages may call this server; may be repeated; * for all."
)
ALLOWED_HOST = flags.DEFINE_multi_string(
    "allowed_host",
    [],
    "Host name under which this server may be called; may be repeated; * for all. Default: all, "
    "but on a loopback address only its own names.",
)
MAX_WAITING = flags.DEFINE_integer(
    "max_waiting", 256, "Maximum number of answers waiting for the engine.", 1
)
_DEFAULT = ServerLimits()
MAX_REQUESTS = flags.DEFINE_integer(
    "max_requests", _DEFAULT.max_requests, "Maximum number of concurrent completion requests."
)
MAX_BODY = flags.DEFINE_integer(
    "max_body_bytes", _DEFAULT.max_body_bytes, "Maximum size of a request body."
)
TIMEOUT = flags.DEFINE_float(
    "request_timeout",
    _DEFAULT.request_timeout_s,
    "Seconds after which an unfinished answer is cancelled.",
)
KEEP_ALIVE = flags.DEFINE_float(
    "keep_alive", _DEFAULT.keep_alive_s, "Seconds between keep-alive comments in an idle stream."
)
DRAIN = flags.DEFINE_float(
    "drain", _DEFAULT.drain_s, "Seconds that running requests have to finish after SIGTERM."
)


def limits_from_flags() -> ServerLimits:
    """Returns the access and resource limits given by the flags and the environment.

    Raises:
      UserError: a value is out of range, or an API key is not valid.
    """
    variable = os.environ.get(API_KEYS_VARIABLE, "")
    keys = [key.strip() for key in variable.split(",") if key.strip()]
    hosts = tuple(ALLOWED_HOST.value)
    if not hosts and is_loopback(HOST.value):
        hosts = ("127.0.0.1", "localhost", "::1", HOST.value)
    return ServerLimits(
        api_keys=tuple(dict.fromkeys([*API_KEY.value, *keys])),
        max_requests=MAX_REQUESTS.value,
        max_body_bytes=MAX_BODY.value,
        request_timeout_s=TIMEOUT.value,
        keep_alive_s=KEEP_ALIVE.value,
        drain_s=DRAIN.value,
        cors_origins=tuple(CORS.value),
        allowed_hosts=hosts or ("*",),
    )


def main() -> int:
    """Loads and serves the model; returns the exit status, 1 if the engine has failed."""
    try:
        return serve(limits_from_flags())
    except KeyboardInterrupt:  # while loading; while serving, Ctrl-C starts the drain
        return 130


def serve(limits: ServerLimits) -> int:
    """Serves the model given by the flags until a signal arrives and the server has drained.

    Returns:
      The exit status: 1 if the engine has failed, else 0.

    Raises:
      UserError: the address is in use, the model cannot be loaded, or a flag is not valid.
    """
    # Bound first, so that an address in use is reported before minutes of loading.
    listener = bind_socket(HOST.value, PORT.value)
    if NAME.value is not None and not NAME.value.strip():
        raise UserError("--name is empty; leave it out for the name of the model's folder.")
    if not limits.api_keys and not is_loopback(HOST.value):
        logging.warning(
            "%s is reachable from the network without an API key: anyone can use this server; "
            "set %s",
            HOST.value,
            API_KEYS_VARIABLE,
        )
    sizes = {name: flag.value for name, flag in SIZES.items() if flag.value is not None}
    with load(
        MODEL.value,
        tokenizer=TOKENIZER.value,
        step=STEP.value,
        chat_format=FORMAT.value,
        dtype=DTYPE.value,
        tensor=TENSOR.value,
        warm_up=WARM_UP.value,
        weights=WEIGHTS.value,
        layer_windows=LAYER_WINDOWS.value,
        max_waiting=MAX_WAITING.value,
        **sizes,
    ) as qwen:
        model = served_model(qwen, NAME.value, created=int(time.time()))
        if not qwen.session.is_chat_model:
            logging.warning(
                "%s is a base model: chats are continued as plain text without roles", model.name
            )
        server = DrainingServer(create_app(qwen.service, model, limits))
        print(f"serving {model.name} at {socket_url(listener)}", flush=True)
        server.run([listener])
        failed = qwen.service.failed is not None
    print("ended", flush=True)
    return int(failed)


if __name__ == "__main__":
    program.run(main, cache_by_default=True)
