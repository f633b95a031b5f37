"""Products on CPUs: right whatever the order of the axes, bfloat16 where the compiled ones read."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.kernels import attention
from qwen_jax.kernels.cpu_matmul import einsum, matmul_f32
from qwen_jax.parallel import named_sharding, spec
from tests import toy

SIZES = {"B": 2, "T": 24, "D": 16, "F": 40, "N": 4, "H": 8, "S": 32, "V": 48}
LAYERS = ["BTD,DF->BTF", "BTF,FD->BTD", "BTD,DNH->BTNH", "BTNH,NHD->BTD"]
OTHERS = ["BNTH,BNSH->BNTS", "BNTS,BNSH->BNTH", "BNTH,BNTS->BNHS", "TD,TV->VD", "DV,TD->TV"]


def operand(letters: str, seed: int, dtype=jnp.bfloat16) -> jax.Array:
    shape = [SIZES[c] for c in letters]
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def operands(equation: str, dtype=jnp.bfloat16):
    terms = equation.split("->")[0].split(",")
    return [operand(letters, seed, dtype) for seed, letters in enumerate(terms)]


def wide(*arrays):
    return [np.asarray(x, np.float64) for x in arrays]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("equation", LAYERS + OTHERS)
def test_accumulates_in_float32_whatever_the_order(equation, dtype):
    a, b = operands(equation, dtype)
    with jax.default_matmul_precision("highest"):
        product = jax.jit(lambda a, b: matmul_f32(equation, a, b))(a, b)
    assert product.dtype == jnp.float32
    np.testing.assert_allclose(product, np.einsum(equation, *wide(a, b)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["none", "2 × 2 × 2 fsdp, context, tensor"])
@pytest.mark.parametrize("equation", LAYERS)
def test_layers_products_and_gradients_equal_float64(equation, name):
    """On a mesh too, where the gradient of a weight is summed over devices: one rounding each."""
    axes = {"B": "batch", "T": "sequence", "D": None, "F": "ffn", "N": "heads", "H": None}
    left, right, out = re.split(",|->", equation)
    a, b = operands(equation)
    d = operand(out, 2)
    x, w, g = wide(a, b, d)
    expected = (
        np.einsum(equation, x, w),
        np.einsum(f"{out},{right}->{left}", g, w),
        np.einsum(f"{left},{out}->{right}", x, g),
    )
    with toy.use(name) as mesh:
        sharding = None
        if mesh is not None:
            a, b, d = (
                jax.device_put(v, named_sharding(mesh, *(axes[c] for c in letters)))
                for v, letters in ((a, left), (b, right), (d, out))
            )
            sharding = spec(*(axes[c] for c in out))

        @jax.jit
        def run(a, b, d):
            y, pull = jax.vjp(lambda a, b: einsum(equation, a, b, out_sharding=sharding), a, b)
            return (y, *pull(d))

        actual = run(a, b, d)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=2e-4)


@pytest.mark.parametrize("equation", LAYERS)
def test_the_compiled_step_multiplies_bfloat16_natively(equation):
    """No product, forward or backward, reads operands that were widened, as `jnp.einsum`'s do."""
    a, b = operands(equation)
    d = operand(equation.split("->")[1], 2)

    def run(a, b, d):
        y, pull = jax.vjp(lambda a, b: einsum(equation, a, b), a, b)
        return (y, *pull(d))

    text = jax.jit(run).lower(a, b, d).compile().as_text()
    dtype = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", text))
    dots = [
        {dtype[x] for x in re.findall(r"%([\w.\-]+)", inside)}
        for inside in re.findall(r" dot\(([^)]*)\)", text)
    ]
    assert dots == [{"bf16"}] * 3


def test_another_order_of_the_result_is_refused():
    """XLA would transpose the product, fold that into it, and fail when it runs."""
    with pytest.raises(ValueError, match="the result's axes must be"):
        matmul_f32("BTD,DF->BFT", operand("BTD", 0), operand("DF", 1))


@pytest.mark.parametrize("length", [64, 100, 128, 257])
@pytest.mark.parametrize("heads", [(8, 2), (4, 4)])
def test_attention_in_blocks_differentiates_in_bfloat16_at_every_length(heads, length):
    """With one block nothing stands between a product and what moves its axes afterwards."""
    n, k = heads
    shapes = ((2, length, n, 64), (2, length, k, 64), (2, length, k, 64), (2, length, n, 64))
    q, k, v, d = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes))

    def run(dtype):
        def out(q, k, v):
            return attention(q, k, v, implementation="chunked")

        return jax.jit(lambda q, k, v, d: jax.vjp(out, q, k, v)[1](d))(
            *(x.astype(dtype) for x in (q, k, v, d))
        )

    for got, want in zip(run(jnp.bfloat16), run(jnp.float32), strict=True):
        error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
        assert error < 2e-2
