"""Compiler options by kind of device, and the compiled step."""

import jax
import numpy as np

from qwen_jax.config import from_config_dict
from qwen_jax.train.compiling import XLA_OPTIONS, compile_step, lower_step, xla_options
from qwen_jax.train.job import PretrainJob
from qwen_jax.train.objective import NextToken
from qwen_jax.train.pretrain import pretraining_step
from qwen_jax.train.state import abstract_state, init_state
from qwen_jax.train.step import train_step
from tests import toy


def test_each_device_kind_has_its_own_options_and_unknown_ones_have_none():
    assert xla_options("TPU v5") == XLA_OPTIONS["TPU v5"]
    assert xla_options("TPU v5 lite") == {}  # v5e has no SparseCores
    assert xla_options("cpu") == {} and xla_options("NVIDIA A100-SXM4-80GB") == {}
    found = xla_options("TPU v6 lite")
    found["more"] = "true"
    assert "more" not in xla_options("TPU v6 lite")


def test_the_compiled_step_equals_train_step_and_donates_its_state():
    from configs import pretrain

    job = from_config_dict(PretrainJob, pretrain.get_config("toy"))
    config = job.step_config
    with toy.use("8 fsdp") as mesh:
        abstract = abstract_state(config, mesh)
        batch = toy.place(toy.batch(rows=8, length=64, vocab=512), mesh)
        compiled = compile_step(lower_step(pretraining_step(job), abstract, batch), "cpu")
        shardings = jax.tree.map(lambda a: a.sharding, abstract)
        state = jax.jit(lambda: init_state(config, jax.random.key(0)), out_shardings=shardings)()
        expected = jax.jit(train_step, static_argnums=(2, 3))(state, batch, config, NextToken())[1]
        given = state.params["final_norm"]["scale"]
        state, metrics = compiled(state, batch)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    assert int(state.step) == 1
    assert given.is_deleted()  # donated
