"""Ring attention over a context axis equals attention on one device; zigzag order is undone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import UserError
from qwen_jax.kernels import attention
from qwen_jax.kernels.mask import Mask
from qwen_jax.kernels.ring import ring_attention
from qwen_jax.kernels.tpu.flash import tpu_kernel
from qwen_jax.parallel import MeshConfig, from_zigzag, make_mesh, spec, to_zigzag, zigzag_slots
from tests.toy import close

MESHES = {
    "2 context": MeshConfig(fsdp=2, context=2, tensor=2),
    "4 context": MeshConfig(fsdp=1, context=4, tensor=2),
    "8 context": MeshConfig(fsdp=1, context=8),
}

CASES = {
    "plain": {},
    "grouped": {"kv_heads": 2},
    "packed": {"segments": True},
    "window 1": {"window": 1},
    "window across chunks, packed, grouped": {"window": 11, "segments": True, "kv_heads": 2},
    "window wider than all": {"window": 1000},
}


def make(kv_heads=4, segments=False, window=None, length=64):
    rng = np.random.default_rng(3)
    q = rng.normal(size=(2, length, 4, 8)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, length, kv_heads, 8)).astype(np.float32)
    ids = np.sort(rng.integers(0, 5, (2, length)), axis=1)[:, ::-1].astype(np.int32)
    ids = np.where(ids > 0, 6 - ids, 0)  # ascending, then padding
    return (q, k, v), ids if segments else None, window


def total(q, k, v, ids, *, window, implementation):
    out = attention(
        *(q, k, v),
        q_segments=ids,
        k_segments=ids,
        window=window,
        implementation=implementation,
    )
    return jnp.sum(jnp.sin(out) * jnp.arange(8)), out


@functools.cache
def expected(name):
    arrays, ids, window = make(**CASES[name])
    f = functools.partial(total, ids=ids, window=window, implementation="reference")
    with jax.default_matmul_precision("highest"):
        (_, out), grads = jax.value_and_grad(f, (0, 1, 2), has_aux=True)(*arrays)
    return jax.device_get((out, grads))


@pytest.mark.parametrize(
    ("name", "mesh", "implementation"),
    [(name, mesh, "chunked") for name in CASES for mesh in MESHES]
    # Keys collected, for what a ring can't do; the hardest case says all there is to say.
    + [("window across chunks, packed, grouped", mesh, "reference") for mesh in MESHES],
)
def test_equals_one_device(name, mesh, implementation, monkeypatch):
    monkeypatch.setattr("qwen_jax.kernels.chunked.CHUNK", 8)
    (q, k, v), ids, window = make(**CASES[name])
    out, grads = expected(name)

    @jax.jit
    def run(q, k, v, ids, window):
        ids = None if ids is None else to_zigzag(ids)

        def f(q, k, v):
            q, k, v = to_zigzag(q), to_zigzag(k), to_zigzag(v)
            out = attention(
                *(q, k, v),
                q_segments=ids,
                k_segments=ids,
                window=window,
                implementation=implementation,
            )
            out = from_zigzag(out)
            return jnp.sum(jnp.sin(out) * jnp.arange(8)), out

        return jax.value_and_grad(f, (0, 1, 2), has_aux=True)(q, k, v)

    mesh = make_mesh(MESHES[mesh])
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        heads = spec("batch", "sequence", "heads", None)
        arrays = [jax.device_put(x, jax.NamedSharding(mesh, heads)) for x in (q, k, v)]
        rows = jax.NamedSharding(mesh, spec("batch", "sequence"))
        ids = None if ids is None else jax.device_put(ids, rows)
        everywhere = jax.NamedSharding(mesh, jax.P())
        window = None if window is None else jax.device_put(np.int32(window), everywhere)
        (_, got), got_grads = jax.device_get(run(*arrays, ids, window))
    close(got, out)
    for a, b in zip(got_grads, grads, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)  # with window 1, two of them are 0


@pytest.mark.parametrize("mesh", MESHES)
def test_zigzag_holds_the_slots_it_says_and_returns(mesh):
    mesh = make_mesh(MESHES[mesh])
    size, length = mesh.shape["context"], 48
    with jax.set_mesh(mesh):
        x = jnp.arange(2 * length, dtype=jnp.int32).reshape(2, length)
        x = jax.device_put(x, jax.NamedSharding(mesh, spec("batch", "sequence")))
        there = jax.jit(to_zigzag)(x)
        local = length // size
        slots = [zigzag_slots(local, i, size) for i in range(size)]
        np.testing.assert_array_equal(np.asarray(there)[0], np.concatenate(slots))
        np.testing.assert_array_equal(jax.jit(from_zigzag)(there), x)


def test_a_length_that_does_not_divide_is_refused():
    refused = pytest.raises(UserError, match=r"12 does not divide into 2 × mesh.context = 8")
    with jax.set_mesh(make_mesh(MESHES["4 context"])), refused:
        jax.eval_shape(to_zigzag, jax.ShapeDtypeStruct((1, 12), jnp.int32))


@pytest.mark.slow
def test_the_tpu_kernel_goes_around_as_it_would_on_tpus():
    """Interpreted: traced starts, chunks before and after the keys, float32 gradients, padding."""
    mesh = make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))
    batch, length, heads, width, scale = 2, 4 * 40, 4, 64, 0.2
    rng = np.random.default_rng(0)
    q, d_out = rng.normal(size=(2, batch, length, heads, width)).astype(np.float32)
    k, v = rng.normal(size=(2, batch, length, 2, width)).astype(np.float32)
    ids = np.repeat([[1, 2, 3, 0]], [15, 100, 30, 15], axis=1).repeat(2, axis=0).astype(np.int32)

    def local(q, k, v, d_out, ids):
        mask = Mask(q_segments=ids, k_segments=ids, window=70)
        out, pull = jax.vjp(
            lambda q, k, v: ring_attention(q, k, v, mask, scale, tpu_kernel("v5e", True)), q, k, v
        )
        return out, pull(d_out)

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(*operands):
        outs = (specs[0], (specs[0],) * 3)
        ring = jax.shard_map(local, in_specs=specs, out_specs=outs, check_vma=False)
        return jax.tree.map(from_zigzag, ring(*(to_zigzag(x) for x in operands)))

    with jax.set_mesh(mesh):
        specs = (spec("batch", "sequence", "heads", None),) * 4 + (spec("batch", "sequence"),)
        operands = [
            jax.device_put(x, jax.NamedSharding(mesh, at))
            for x, at in zip((q, k, v, d_out, ids), specs, strict=True)
        ]
        got, got_grads = jax.device_get(run(*operands))

    def plain(q, k, v):
        return attention(
            *(q, k, v), q_segments=ids, k_segments=ids, window=70, scale=scale,
            implementation="reference",
        )  # fmt: skip

    with jax.default_matmul_precision("highest"):
        out, pull = jax.vjp(plain, q, k, v)
        close(got, out)
        for a, b in zip(got_grads, pull(d_out), strict=True):
            np.testing.assert_allclose(a, b, atol=3e-5)


def test_every_device_has_the_same_work():
    """Visible pairs of a step, by counting: zigzag order balances what natural order does not."""
    size, half = 4, 8
    slots = [np.asarray(zigzag_slots(2 * half, i, size)) for i in range(size)]

    def pairs(i, r):
        return (slots[i][:, None] >= slots[(i - r) % size][None]).sum()

    for r in range(size):
        assert len({pairs(i, r) for i in range(size)}) == 1
        if r:  # two of the four half-by-half blocks, in full
            assert pairs(0, r) == 2 * half * half
