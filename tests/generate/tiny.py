"""Tiny random chat model with a byte vocabulary, as a Hugging Face folder."""

import functools
import pathlib

import jax

from qwen_jax import interop
from qwen_jax.model import ModelConfig, init_params
from qwen_jax.tokenizer import Tokenizer

TOKENIZER = Tokenizer(tuple(bytes([i]) for i in range(256)))

CONFIG = ModelConfig(
    family="qwen", vocab_size=512, d_model=32, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=8,
    d_ff=64, max_length=32768, trained_length=256, dynamic_ntk=True, logn=True, init_std=0.2,
)  # fmt: skip

CHAT = {
    "chat_format": "chatml", "do_sample": True, "eos_token_id": TOKENIZER.eod_id,
    "max_new_tokens": 40, "max_window_size": 600, "top_p": 0.8, "repetition_penalty": 1.1,
}  # fmt: skip

# Engine options with which all programs compile in a few seconds.
ENGINE = {"max_running_requests": 2, "max_length": 512, "page_size": 64, "prefill_tokens": 64}


@functools.cache
def params():
    """Returns the weights. Logits of control tokens are 0, so greedy decoding never ends."""
    tree = jax.jit(functools.partial(init_params, CONFIG))(jax.random.key(0))
    head = tree["head"]
    return tree | {"head": jax.tree.map(lambda x: x.at[:, TOKENIZER.n_ranks :].set(0), head)}


def write(folder: pathlib.Path, generation: dict | None = CHAT) -> pathlib.Path:
    """Writes the model with a generation config to `folder` and returns the folder."""
    interop.save_hf(folder, params(), CONFIG, dtype="float32", generation_config=generation)
    TOKENIZER.save(folder / "qwen.tiktoken")
    return folder
