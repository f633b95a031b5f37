"""The released tokenizer, loaded once, and a small vocabulary of single bytes."""

import pytest

from qwen_jax.tokenizer import Tokenizer, load_tokenizer
from qwen_jax.tokenizer.huggingface import byte_order


@pytest.fixture(scope="session")
def qwen(qwen_tiktoken) -> Tokenizer:
    return load_tokenizer(qwen_tiktoken)


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    return Tokenizer(tuple(bytes([byte]) for byte in byte_order()))
