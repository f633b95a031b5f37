"""Sizes derived from the model and the machine, and refusals of impossible sizes."""

import jax
import pytest

from qwen_jax.engine.options import EngineOptions, choose_shapes, page_bytes
from qwen_jax.engine.steps import init_state
from qwen_jax.errors import UserError
from qwen_jax.model.presets import preset

GB = 10**9
SEVEN = preset("qwen-7b")


def shapes(config=SEVEN, platform="tpu", room=10 * GB, itemsize=2, tensor=1, **options):
    options = EngineOptions(**options)
    how = {"platform": platform, "cache_bytes": room, "itemsize": itemsize, "tensor": tensor}
    return choose_shapes(options, config, **how)


def test_page_bytes_equal_the_size_of_the_arrays():
    for dtype, itemsize in (("bfloat16", 2), ("uint8", 1), ("float32", 4)):
        sizes = shapes(platform="cpu", itemsize=itemsize, pages=10, max_length=64)
        cache = jax.eval_shape(lambda s=sizes, d=dtype: init_state(SEVEN, s, d)).cache
        total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
        assert total == 10 * page_bytes(SEVEN, 16, itemsize)
    # 512 KiB a token of 7B (spec of the release); a quarter of that on each of four devices.
    assert page_bytes(SEVEN, 128, 2) == 128 * 512 * 1024
    assert page_bytes(SEVEN, 128, 2, tensor=4) == 128 * 128 * 1024


def test_default_sizes_fill_the_available_memory():
    sizes = shapes()
    assert sizes.max_rows == 64 and sizes.page_size == 128
    assert sizes.prefill_tokens == (128, 512, 2048)
    assert sizes.decode_rows == (1, 4, 16, 64)
    assert sizes.num_pages == 10 * GB // page_bytes(SEVEN, 128, 2) == 149
    # 149 pages can't hold the 32,768 tokens that the model claims: the longest is what they hold.
    assert sizes.max_pages_per_request == 149 and sizes.cached_pages == (0, 9, 37, 149)
    # 8 bits and four float32 scales a head and token: 272 bytes for 512.
    assert shapes(itemsize=1).num_pages == 280
    assert shapes(tensor=4).max_pages_per_request == 256
    plenty = shapes(room=10_000 * GB)
    assert plenty.num_pages == 64 * 256, "no more than all rows can use"
    cpu = shapes(platform="cpu", itemsize=4)
    assert (cpu.max_rows, cpu.page_size, cpu.max_pages_per_request) == (8, 16, 256)
    assert cpu.prefill_tokens == (16, 64, 256) and cpu.decode_rows == (1, 2, 8)


def test_unusual_sizes_give_valid_program_shapes():
    for rows in (1, 3, 5, 100):
        for length in (2, 100, 4000):
            for page in (16, 48, 128):
                sizes = shapes(
                    max_running_requests=rows,
                    max_length=length,
                    page_size=page,
                    prefill_tokens=7 * page,
                )
                assert sizes.decode_rows[0] == 1 and sizes.decode_rows[-1] == rows
                assert (
                    sizes.cached_pages[0] == 0
                    and sizes.cached_pages[-1] == sizes.max_pages_per_request
                )
                assert (
                    sizes.max_pages_per_request * page
                    >= length
                    > (sizes.max_pages_per_request - 1) * page
                )
                assert not any(t % page for t in sizes.prefill_tokens)
                for buckets in (sizes.decode_rows, sizes.cached_pages, sizes.prefill_tokens):
                    assert list(buckets) == sorted(set(buckets))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_running_requests": 0}, "engine.max_running_requests is 0; it must be at least 1"),
        ({"decode_steps_per_call": 0}, "engine.decode_steps_per_call is 0; it must be at least 1"),
        ({"max_length": 1}, "a prompt and its answer need at least 2"),
        ({"memory": 0.0}, "engine.memory is 0.0; it must be above 0 and at most 1"),
        ({"seed": -1}, "engine.seed is -1; it must be 0 or more"),
        ({"kv_dtype": "unit8"}, "engine.kv_dtype is 'unit8' .did you mean 'uint8'"),
        ({"prefill_tokens": 100}, "must be a multiple of engine.page_size=128"),
        ({"pages": 200}, "engine.pages=200 need 13.42 GB.*room for 10.00 GB; ask for at most 149"),
        ({"max_length": 32768}, "room for 19072 tokens and engine.max_length is 32768"),
        ({"pages": 2, "max_length": 300}, "room for 256 tokens and engine.max_length is 300"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        shapes(**options)


def test_no_memory_for_the_cache_is_refused():
    with pytest.raises(UserError, match=r"room for 0 tokens .* give it more memory"):
        shapes(room=-GB)
