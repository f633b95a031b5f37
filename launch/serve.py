"""Serves a model over HTTP, as OpenAI's API, with a page to chat at `/`.

    python -m launch.serve --model=Qwen-7B-Chat                  http://127.0.0.1:8000
    python -m launch.serve --model=runs/demo --port=0            any free port
    QWEN_JAX_API_KEYS=KEY python -m launch.serve --model=DIR --host=0.0.0.0

--model is a Hugging Face folder, a working folder of a training, or a folder of checkpoints. What
requests do not say comes from the model's own generation config. SIGTERM and Ctrl-C let running
answers finish for --drain seconds; a second one cuts them. docs/serving.md has the rest.
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
from qwen_jax.server.config import Limits, served_model
from qwen_jax.server.run import Server, bind, is_local, url

KEYS = "QWEN_JAX_API_KEYS"

MODEL = flags.DEFINE_string("model", None, "Model folder or checkpoints.", required=True)
NAME = flags.DEFINE_string("name", None, "Name of the model in the API; its folder's by default.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Vocabulary, where --model has none.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint; the newest by default.")
FORMAT = flags.DEFINE_enum("chat_format", None, ["chatml", "raw"], "Instead of the model's own.")
DTYPE = flags.DEFINE_string("dtype", None, "float32 (CPU) or bfloat16 (elsewhere) by default.")
WEIGHTS = flags.DEFINE_string("weights", None, "int8 or int4: quantise plain weights.")
LAYER_WINDOWS = flags.DEFINE_bool(
    "layer_windows", False, "Qwen v1: lower layers see less far back; for texts beyond its length."
)
TENSOR = flags.DEFINE_integer("tensor", None, "Devices that share the model.")
WARM_UP = flags.DEFINE_bool("warm_up", True, "Compile everything before the first request.")
SIZES = {
    "rows": flags.DEFINE_integer("rows", None, "Most requests that decode side by side."),
    "max_length": flags.DEFINE_integer("max_length", None, "Longest prompt and answer."),
    "memory": flags.DEFINE_float("memory", None, "Share of a device's memory to use."),
    "pages": flags.DEFINE_integer("pages", None, "Pages of the cache."),
    "page_size": flags.DEFINE_integer("page_size", None, "Tokens a page of the cache."),
    "prefill_tokens": flags.DEFINE_integer("prefill_tokens", None, "Of prompts, in one call."),
    "kv_dtype": flags.DEFINE_enum("kv_dtype", None, KV_DTYPES, "Of the cache; uint8 is half."),
}

HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 for all.")
PORT = flags.DEFINE_integer("port", 8000, "Port; 0 for any free one.", 0, 65_535)
API_KEY = flags.DEFINE_multi_string(
    "api_key", [], f"Key that requests must bring; may be repeated. Other users of this machine "
    f"can see flags: the variable {KEYS}, keys with commas between, is safer.",
)  # fmt: skip
CORS = flags.DEFINE_multi_string("cors", [], "Origin whose pages may call this server; * for all.")
ALLOWED_HOST = flags.DEFINE_multi_string(
    "allowed_host", [], "Name that this server may be called by; by default any, on a local "
    "address only its own. * for any.",
)  # fmt: skip
MAX_WAITING = flags.DEFINE_integer("max_waiting", 256, "Answers that may wait for the engine.", 1)
_DEFAULT = Limits()
MAX_REQUESTS = flags.DEFINE_integer(
    "max_requests", _DEFAULT.max_requests, "Requests that may be under way at once."
)
MAX_BODY = flags.DEFINE_integer("max_body_bytes", _DEFAULT.max_body_bytes, "Longest request.")
TIMEOUT = flags.DEFINE_float(
    "request_timeout", _DEFAULT.request_timeout_s, "Seconds after which an answer is cut."
)
KEEP_ALIVE = flags.DEFINE_float(
    "keep_alive", _DEFAULT.keep_alive_s, "Seconds between signs of life in a silent stream."
)
DRAIN = flags.DEFINE_float("drain", _DEFAULT.drain_s, "Seconds to finish in after SIGTERM.")


def limits() -> Limits:
    """Who is let in, by the flags and the environment."""
    keys = [key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip()]
    hosts = tuple(ALLOWED_HOST.value)
    if not hosts:
        hosts = ("127.0.0.1", "localhost", "::1", HOST.value) if is_local(HOST.value) else ("*",)
    return Limits(
        api_keys=tuple(dict.fromkeys([*API_KEY.value, *keys])),
        max_requests=MAX_REQUESTS.value,
        max_body_bytes=MAX_BODY.value,
        request_timeout_s=TIMEOUT.value,
        keep_alive_s=KEEP_ALIVE.value,
        drain_s=DRAIN.value,
        cors_origins=tuple(CORS.value),
        allowed_hosts=hosts,
    )


def main() -> int:
    """Loads, serves, drains; status 1 when the engine has failed on the way."""
    try:
        return serve(limits())
    except KeyboardInterrupt:  # while loading; later it is a signal to drain
        return 130


def serve(allowed: Limits) -> int:
    """Serves the model of the flags until a signal comes."""
    # First, so that an address that is taken is known before minutes of loading.
    listener = bind(HOST.value, PORT.value)
    if NAME.value is not None and not NAME.value.strip():
        raise UserError("--name is empty; leave it out for the name of the model's folder.")
    if not allowed.api_keys and not is_local(HOST.value):
        logging.warning(
            "%s is open to the network and asks for no key: anybody who reaches it can use it; "
            "set %s", HOST.value, KEYS,
        )  # fmt: skip
    place = {"tokenizer": TOKENIZER.value, "step": STEP.value, "chat_format": FORMAT.value}
    how = {"dtype": DTYPE.value, "tensor": TENSOR.value, "warm_up": WARM_UP.value}
    how |= {"weights": WEIGHTS.value, "layer_windows": LAYER_WINDOWS.value}
    sizes = {name: flag.value for name, flag in SIZES.items() if flag.value is not None}
    with load(MODEL.value, **place, **how, max_waiting=MAX_WAITING.value, **sizes) as qwen:
        model = served_model(qwen, NAME.value, created=int(time.time()))
        if not qwen.session.chats:
            logging.warning("%s is a base model: chats with it are continued text", model.name)
        server = Server(create_app(qwen.service, model, allowed))
        print(f"serving {model.name} at {url(listener)}", flush=True)
        server.run([listener])
        failed = qwen.service.failed is not None
    print("ended", flush=True)
    return int(failed)


if __name__ == "__main__":
    program.keep_compiled()
    program.run(main)
