"""Group-quantised matmul: packing, the reference and the interpreted TPU kernel against float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from qwen_jax.errors import UserError
from qwen_jax.kernels import quantised
from qwen_jax.kernels.quantised import GroupWeight, dequantise, group_matmul, pack, unpack
from qwen_jax.kernels.tpu import quantised_matmul as tpu_quantised
from tests.tpu import compiled, needs_libtpu


@dataclasses.dataclass
class Case:
    """x [M,K], a weight, and their product in float64."""

    x: jax.Array
    weight: GroupWeight
    expected: np.ndarray


def make_case(
    rows, inputs, outputs, *, bits=4, group=128, dtype=jnp.bfloat16, zeros=False, layers=None
):
    rng = np.random.default_rng(rows + inputs + outputs)
    count = layers or 1
    q = rng.integers(0, 2**bits, (count, inputs, outputs))
    shape = (count, inputs // group, 1, outputs)
    scales = rng.uniform(0.1, 2, shape).astype(np.float32)
    z = rng.integers(1, 2**bits + 1, shape) if zeros else np.full(shape, 2 ** (bits - 1))
    layer = count - 1
    dense = (q[layer].reshape(-1, group, outputs) - z[layer]) * scales[layer].astype(np.float64)
    weight = GroupWeight(
        pack(jnp.asarray(q), bits), jnp.asarray(scales), jnp.asarray(z, jnp.float32)
        if zeros else None, bits=bits,
    )  # fmt: skip
    if layers is None:
        weight = jax.tree.map(lambda a: a[0], weight)
    else:
        weight = dataclasses.replace(weight, layer=jnp.int32(layer))
    x = jnp.asarray(rng.standard_normal((rows, inputs)) + 1, dtype)
    expected = np.asarray(x, np.float64) @ dense.reshape(inputs, outputs)
    return Case(x, weight, expected)


CASES = {
    "one row": ((1, 256, 128), {}),
    "odd sizes": ((7, 384, 200), {}),
    "a stack, zeros of its own": ((17, 256, 130), {"layers": 3, "zeros": True}),
    "float32": ((5, 256, 96), {"dtype": jnp.float32, "zeros": True}),
    "8 bits": ((3, 256, 300), {"bits": 8}),
    "8 bits, float32, a stack": ((2, 128, 64), {"bits": 8, "dtype": jnp.float32, "layers": 2}),
    "8 bits, zeros up to 256": ((9, 256, 128), {"bits": 8, "zeros": True}),
    "groups of 256": ((4, 512, 128), {"group": 256}),
    "one group": ((4, 384, 128), {"group": 384, "zeros": True}),
    "more chunks than at once": ((2, 128 * 19, 128), {}),
    "a prompt": ((300, 256, 260), {}),
    "a prompt, 8 bits, zeros": ((80, 256, 130), {"bits": 8, "zeros": True, "layers": 2}),
    "a prompt, float32": ((90, 384, 100), {"dtype": jnp.float32, "group": 384}),
}


def error(got, case):
    assert got.shape == case.expected.shape and got.dtype == case.x.dtype
    got = np.asarray(got, np.float64)
    return np.linalg.norm(got - case.expected) / np.linalg.norm(case.expected)


def tolerance(case):
    """Of the whole norm: rounding to bf16 is 2⁻⁹/√3, twice that where weights are rounded too."""
    return 3e-3 if case.x.dtype == jnp.bfloat16 else 2e-6


@pytest.mark.parametrize("name", CASES)
def test_reference_is_the_product(name):
    sizes, how = CASES[name]
    case = make_case(*sizes, **how)
    assert error(jax.jit(group_matmul)(case.x, case.weight), case) < tolerance(case)


@pytest.mark.parametrize("name", CASES)
def test_interpreted_tpu_kernel_is_the_product(name):
    sizes, how = CASES[name]
    case = make_case(*sizes, **how)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        got = tpu_quantised.quantised_matmul(case.x, case.weight, columns=128)
    assert error(got, case) < tolerance(case)


@pytest.mark.parametrize("rows", [2, 80])
def test_two_cores_share_the_outputs(rows, monkeypatch):
    """Blocks of outputs are odd in number, so one core has one to do twice."""
    monkeypatch.setattr(tpu_quantised.mosaic, "num_cores", lambda: 2)
    case = make_case(rows, 256, 300)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        got = tpu_quantised.quantised_matmul(case.x, case.weight, columns=128)
    assert error(got, case) < tolerance(case)


@given(bits=st.sampled_from([4, 8]), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_packing_is_the_documented_one_and_its_own_inverse(bits, seed):
    words, per_word = 3, 32 // bits
    codes = np.random.default_rng(seed).integers(0, 2**bits, (words * per_word, 5))
    packed = pack(jnp.asarray(codes), bits)
    assert packed.dtype == jnp.int32
    np.testing.assert_array_equal(np.asarray(unpack(packed, bits)), codes)
    value = [
        sum(int(codes[row * per_word + i, 0]) << bits * i for i in range(per_word))
        for row in range(words)
    ]
    assert [int(w) % 2**32 for w in np.asarray(packed)[:, 0]] == value


def test_leading_axes_and_a_traced_layer():
    case = make_case(6, 256, 64, layers=4, dtype=jnp.float32)
    x = case.x.reshape(2, 3, 256)

    def every(i):
        return group_matmul(x, dataclasses.replace(case.weight, layer=i))

    got = jax.jit(lambda: jax.lax.map(every, jnp.arange(4)))()
    assert got.shape == (4, 2, 3, 64)
    assert error(got[3].reshape(6, 64), case) < 2e-6
    stack = dataclasses.replace(case.weight, layer=jnp.int32(1))
    np.testing.assert_allclose(got[1], x @ dequantise(stack), rtol=1e-4, atol=1e-4)


def test_what_cannot_run_says_why():
    case = make_case(2, 256, 64)
    for name, words in (("mosaic", "unknown"), ("pallas_tpu", "runs on tpu only")):
        with pytest.raises(UserError, match=words):
            group_matmul(case.x, case.weight, implementation=name)
    with pytest.raises(UserError, match="128 columns and the weight 256"):
        group_matmul(case.x[:, :128], case.weight)


def test_the_tpu_takes_what_its_kernel_can_and_names_the_rest(monkeypatch):
    monkeypatch.setattr(quantised, "platform", lambda: ("tpu", "v6e"))
    choose = quantised.choose_group_matmul
    assert choose("auto", make_case(2, 256, 64).weight, 2, jnp.bfloat16) == "pallas_tpu"
    small = make_case(2, 256, 64, group=32).weight
    assert choose("auto", small, 2, jnp.bfloat16) == "reference"
    with pytest.raises(UserError, match="groups of 32; the TPU kernel takes multiples of 128"):
        choose("pallas_tpu", small, 2, jnp.bfloat16)
    with pytest.raises(UserError, match="float16"):
        choose("pallas_tpu", make_case(2, 256, 64).weight, 2, jnp.float16)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_for_chips_without_unpacking_in_memory(chip):
    """Layers of a network in a scan, their weights stacked, on one chip and split over four."""
    results = compiled("tests.kernels.compile_quantised", chip)
    assert len(results) == 6
    for result in results:
        assert result["kernels"] == result["wanted_kernels"], result
        # Neither a layer's weights nor their scales are copied.
        assert result["temp"] < result["layer"] / 8, result
