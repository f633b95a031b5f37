"""The training step: loss and gradient do not depend on mesh, microbatches or attention kernel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import UserError
from qwen_jax.model import ForwardOptions, forward
from qwen_jax.model.options import REMAT
from qwen_jax.parallel import make_mesh
from qwen_jax.train.config import StepConfig, check_mesh
from qwen_jax.train.objective import NextToken
from qwen_jax.train.optimizer import OptimizerConfig, learning_rate
from qwen_jax.train.state import abstract_state, init_state
from qwen_jax.train.step import train_step
from tests import toy


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        reference(toy.STEP)  # computed on one device, outside any mesh
        yield


def gradients(params, batch, config):
    def loss(params):
        sums = NextToken()(params, batch, config, None)
        return sums.objective / sums.weight

    return jax.jit(jax.value_and_grad(loss))(params)


@functools.cache
def reference(config):
    """State, loss and gradients on one device from all logits, by autodiff."""
    state = jax.jit(functools.partial(init_state, config))(jax.random.key(1))
    batch = toy.place(toy.batch(), None)

    def loss(params):
        logits, _ = forward(
            params,
            batch["tokens"],
            config.model,
            ForwardOptions(dtype="float32", attention="reference"),
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
        )
        logprobs = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(logprobs, batch["targets"][..., None], -1)[..., 0]
        return -(picked * batch["loss_mask"]).sum() / batch["loss_mask"].sum()

    with jax.default_matmul_precision("highest"):
        value, grads = jax.jit(jax.value_and_grad(loss))(state.params)
    return jax.device_get((state, value, grads))


def assert_same(loss, grads, config=toy.STEP):
    _, expected_loss, expected = reference(config)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    jax.tree.map(toy.close, jax.device_get(grads), expected)


@pytest.mark.parametrize("attention", ["reference", "chunked"])
@pytest.mark.parametrize("name", ["none", *toy.MESHES])
def test_loss_and_gradients_do_not_depend_on_the_mesh(name, attention):
    config = dataclasses.replace(
        toy.STEP, options=ForwardOptions(dtype="float32", attention=attention)
    )
    with toy.use(name) as mesh:
        params = reference(toy.STEP)[0].params
        if mesh is not None:
            shardings = jax.tree.map(lambda a: a.sharding, abstract_state(config, mesh).params)
            params = jax.device_put(params, shardings)
        assert_same(*gradients(params, toy.place(toy.batch(), mesh), config))


@pytest.mark.parametrize("name", toy.MESHES)
def test_grouped_windowed_tied_models_do_not_depend_on_the_mesh(name):
    model = dataclasses.replace(
        toy.MODEL,
        family="qwen3",
        n_heads=16,
        qkv_bias=False,
        qk_norm=True,
        tie_embeddings=True,
        windows=(None, 5),
    )
    config = dataclasses.replace(toy.STEP, model=model)
    reference(config)  # computed on one device, outside any mesh
    with toy.use(name) as mesh:
        shardings = jax.tree.map(lambda a: a.sharding, abstract_state(config, mesh).params)
        params = jax.device_put(reference(config)[0].params, shardings)
        assert_same(*gradients(params, toy.place(toy.batch(), mesh), config), config)


def test_size_one_axes_in_array_types_change_nothing():
    jax.config.update("jax_remove_size_one_mesh_axis_from_type", False)
    try:
        with toy.use("8 fsdp") as mesh:
            shardings = jax.tree.map(lambda a: a.sharding, abstract_state(toy.STEP, mesh).params)
            params = jax.device_put(reference(toy.STEP)[0].params, shardings)
            assert_same(*gradients(params, toy.place(toy.batch(), mesh), toy.STEP))
    finally:
        jax.config.update("jax_remove_size_one_mesh_axis_from_type", True)


@pytest.mark.parametrize("remat", [*sorted(set(REMAT) - {"none"}), "full:1,out"])
def test_remat_changes_memory_only(remat):
    config = dataclasses.replace(toy.STEP, options=ForwardOptions(dtype="float32", remat=remat))
    with toy.use("4 fsdp × 2 tensor") as mesh:
        shardings = jax.tree.map(lambda a: a.sharding, abstract_state(config, mesh).params)
        params = jax.device_put(reference(toy.STEP)[0].params, shardings)
        assert_same(*gradients(params, toy.place(toy.batch(), mesh), config))


def run(name, config, steps=3, seed=0, dropout=None):
    """Runs `steps` steps on different batches; returns the state and the metrics of each."""
    with toy.use(name) as mesh:
        state = reference(toy.STEP)[0]
        if mesh is not None:
            shardings = jax.tree.map(lambda a: a.sharding, abstract_state(config, mesh))
            state = jax.device_put(state, shardings)
        else:
            state = jax.device_put(state)
        key = None if dropout is None else jax.random.key(dropout)
        step = jax.jit(
            functools.partial(train_step, config=config, objective=NextToken(), key=key),
            donate_argnums=0,
        )
        history = []
        for i in range(steps):
            state, metrics = step(state, toy.place(toy.batch(seed + i), mesh))
            history.append(jax.device_get(metrics))
        return jax.device_get(state), history


@pytest.mark.parametrize(
    ("name", "microbatches"), [("none", 4), ("2 × 2 × 2 data, fsdp, tensor", 2)]
)
def test_accumulation_does_not_change_the_loss(name, microbatches):
    """Microbatches have different numbers of loss tokens, so a mean of means would differ."""
    whole, metrics = run("none", toy.STEP)
    split, split_metrics = run(name, dataclasses.replace(toy.STEP, microbatches=microbatches))
    for a, b in zip(metrics, split_metrics, strict=True):
        for key in ("loss", "grad_norm", "update_norm", "bits_per_byte", "tokens"):
            np.testing.assert_allclose(a[key], b[key], rtol=2e-5)
    jax.tree.map(functools.partial(toy.close, rtol=1e-4), split.params, whole.params)


def test_dropout_masks_do_not_depend_on_the_mesh():
    model = dataclasses.replace(
        toy.MODEL, embed_dropout=0.1, attn_dropout=0.1, residual_dropout=0.1
    )
    config = dataclasses.replace(toy.STEP, model=model)
    _, one = run("none", config, dropout=7)
    _, eight = run("2 × 2 × 2 data, fsdp, tensor", config, dropout=7)
    _, off = run("none", config)
    np.testing.assert_allclose(one[-1]["loss"], eight[-1]["loss"], rtol=1e-5)
    assert abs(one[0]["loss"] - off[0]["loss"]) > 1e-4


def test_a_non_finite_step_changes_nothing_but_the_counters():
    state = jax.device_put(reference(toy.STEP)[0])
    step = jax.jit(functools.partial(train_step, config=toy.STEP, objective=NextToken()))
    bad = toy.batch() | {"loss_mask": np.full((8, 32), np.nan, np.float32)}
    state, _ = step(state, toy.place(toy.batch(1), None))
    after, metrics = step(state, toy.place(bad, None))
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, state.opt_state)
    assert (after.step, after.skipped, after.skipped_in_a_row) == (2, 1, 1)
    assert metrics["skipped"] == 1
    again, _ = step(after, toy.place(bad, None))
    assert again.skipped_in_a_row == 2
    good, _ = step(again, toy.place(toy.batch(2), None))
    assert (good.skipped, good.skipped_in_a_row) == (2, 0)
    assert not np.array_equal(good.params["head"]["kernel"], state.params["head"]["kernel"])


def test_adamw_equals_the_closed_form_with_decay_on_matrices_only():
    """First step in closed form: m̂ = g, v̂ = g², so the update is −lr (g/(|g| + eps) + wd·w)."""
    optimizer = OptimizerConfig(peak_lr=0.5, warmup_steps=0, weight_decay=0.1, clip_norm=1e9)
    config = dataclasses.replace(toy.STEP, optimizer=optimizer)
    before, _, grads = reference(toy.STEP)
    after, _ = jax.jit(functools.partial(train_step, config=config, objective=NextToken()))(
        jax.device_put(before), toy.place(toy.batch(), None)
    )

    def check(path, old, new, g):
        name = jax.tree_util.keystr(path)
        decays = not any(part in name for part in ("norm", "bias"))
        expected = old - 0.5 * (g / (np.abs(g) + 1e-8) + 0.1 * decays * old)
        sure = np.abs(g) > 1e-5  # elsewhere the sign of g depends on rounding
        np.testing.assert_allclose(np.asarray(new)[sure], expected[sure], rtol=1e-3, atol=1e-4)

    jax.tree_util.tree_map_with_path(check, before.params, after.params, grads)


def test_clipping_scales_the_gradient_to_norm_one():
    """With Adam's epsilon far above the gradient, the update is the clipped gradient / eps."""
    state, _, grads = reference(toy.STEP)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    clip = float(norm) / 4
    optimizer = OptimizerConfig(
        peak_lr=1.0, warmup_steps=0, weight_decay=0.0, clip_norm=clip, eps=1e6
    )
    config = dataclasses.replace(toy.STEP, optimizer=optimizer)
    _, metrics = jax.jit(functools.partial(train_step, config=config, objective=NextToken()))(
        jax.device_put(state), toy.place(toy.batch(), None)
    )
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(metrics["update_norm"], clip / 1e6, rtol=1e-3)


def test_schedule_warms_up_to_the_peak_and_ends_at_a_tenth():
    config = OptimizerConfig(peak_lr=3e-4, warmup_steps=2000, decay_steps=572_204)
    lr = [float(learning_rate(config, jnp.asarray(s))) for s in (0, 999, 1999, 572_203, 10**6)]
    np.testing.assert_allclose(lr, [1.5e-7, 1.5e-4, 3e-4, 3e-5, 3e-5], rtol=1e-4)
    middle = float(learning_rate(config, jnp.asarray((2000 + 572_204) // 2)))
    np.testing.assert_allclose(middle, 3e-4 * 0.55, rtol=1e-3)


@pytest.mark.parametrize(
    ("mesh", "change", "message"),
    [
        ("8 fsdp", {"global_batch": 12}, r"data.global_batch=12 .* = 1×8×1 = 8"),
        ("8 tensor", {"model": {"n_heads": 12}}, r"mesh.tensor=8 does not divide model.n_heads=12"),
        ("8 tensor", {"model": {"n_kv_heads": 2}}, r"tensor=8 does not divide model.n_kv_heads=2"),
        ("8 fsdp", {"model": {"d_model": 60}}, r"mesh.fsdp×tensor=8 does not divide model.d_model"),
        (
            "2 × 2 × 2 fsdp, context, tensor",
            {"seq_len": 30},
            r"mesh.context×2=4 .* data.seq_len=30",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused_naming_axis_and_dimension(mesh, change, message):
    change = dict(change)
    model = change.pop("model", {})
    if "n_heads" in model:
        model["n_kv_heads"] = model["n_heads"]
    args = {"global_batch": 8, "microbatches": 1, "seq_len": 32} | change
    with pytest.raises(UserError, match=message):
        check_mesh(dataclasses.replace(toy.MODEL, **model), make_mesh(toy.MESHES[mesh]), **args)


def test_state_is_initialised_sharded_and_in_float32():
    config = StepConfig(toy.MODEL, ForwardOptions(), toy.STEP.optimizer)
    with toy.use("4 fsdp × 2 tensor") as mesh:
        abstract = abstract_state(config, mesh)
        state = jax.jit(functools.partial(init_state, config))(jax.random.key(0))

    def check(leaf, planned):
        assert leaf.sharding.is_equivalent_to(planned.sharding, leaf.ndim)
        assert leaf.dtype in (jnp.float32, jnp.int32)

    jax.tree.map(check, state, abstract)
    up = state.opt_state[0].mu["layers"]["mlp"]["up"]
    assert up.addressable_shards[0].data.shape == (2, 64 // 4, 96 // 2)
