"""Settings of JAX for all tests, and fixtures for reference data and tokenizers."""

import importlib.util
import os
import pathlib

# Compiling takes most of the time of most tests, so the CPU compiler does not optimise: half the
# time. Must be set before JAX is imported; processes that tests start inherit it.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Size-1 mesh axes carry no information; without this, every array type names them.
jax.config.update("jax_remove_size_one_mesh_axis_from_type", True)

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def qwen1_small() -> pathlib.Path:
    """Tiny Qwen v1 checkpoint with what the released modelling code computes on it."""
    return FIXTURES / "qwen1-small"


@pytest.fixture(scope="session")
def qwen_tiktoken() -> pathlib.Path:
    """The released vocabulary, 151,643 ranks, as carried by the dashscope wheel (Apache-2.0)."""
    spec = importlib.util.find_spec("dashscope")
    assert spec is not None, "dashscope is missing: pip install -r requirements/dev.txt"
    path = pathlib.Path(spec.origin).parent / "resources" / "qwen.tiktoken"
    assert path.is_file(), f"{path} is missing from the installed dashscope"
    return path


@pytest.fixture(scope="session")
def qwen(qwen_tiktoken):
    from qwen_jax.tokenizer import load_tokenizer

    return load_tokenizer(qwen_tiktoken)


@pytest.fixture(scope="session")
def byte_tokenizer():
    from qwen_jax.tokenizer import Tokenizer
    from qwen_jax.tokenizer.huggingface import byte_order

    return Tokenizer(tuple(bytes([byte]) for byte in byte_order()))
