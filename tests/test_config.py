"""The border between recipes and dataclasses: nothing is lost on the way, nothing wrong passes."""

import dataclasses
from typing import Literal

import pytest

from configs import pretrain as recipes
from qwen_jax.config import from_config_dict, to_config_dict
from qwen_jax.errors import UserError
from qwen_jax.model import ModelConfig, Yarn
from qwen_jax.model.presets import PRESETS
from qwen_jax.train.job import PretrainJob
from tests.train import jobs

NAMES = (*recipes.TOKENS, "demo", "toy", *PRESETS)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_survives_conversion_to_config_dict_and_back(name):
    config = recipes.get_config(name)
    job = from_config_dict(PretrainJob, config)
    assert to_config_dict(job) == config
    assert from_config_dict(PretrainJob, to_config_dict(job).to_dict()) == job


def test_recipes_have_the_numbers_of_the_report():
    """Table 1 and §2.4; 2.4T tokens at 4.19M a step."""
    for size, steps, layers in (("1.8b", 524_520, 24), ("7b", 572_204, 32), ("14b", 715_255, 40)):
        job = from_config_dict(PretrainJob, recipes.get_config(size))
        assert (job.train.steps, job.model.n_layers) == (steps, layers)
        assert job.optimizer.decay_steps == steps
        assert (job.optimizer.b1, job.optimizer.b2, job.optimizer.eps) == (0.9, 0.95, 1e-8)
        assert (job.optimizer.peak_lr, job.optimizer.final_lr_ratio) == (3e-4, 0.1)
        assert job.data.seq_len * job.data.global_batch == 4_194_304
        assert job.model.max_length == job.data.seq_len == 2048
        assert job.options.dtype == "bfloat16"
    assert to_config_dict(jobs.make("folder")).model.windows == (None, 6)


def test_pretraining_has_fewer_than_a_hundred_settings():
    def count(node):
        return sum(count(v) if hasattr(v, "keys") else 1 for v in node.values())

    assert count(recipes.get_config("7b")) < 100


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 1.0
    kind: Literal["a", "b"] = "a"


@dataclasses.dataclass(frozen=True)
class Outer:
    count: int
    inner: Inner = Inner()
    sizes: tuple[int | None, ...] = ()
    flag: bool = False
    yarn: Yarn | None = None


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "^config.count is missing; give it a value$"),
        (
            {"cuont": 1},
            r"config.cuont is not a setting \(did you mean 'count'\?\); config has count",
        ),
        ({"count": 1.0}, r"config.count is 1.0 \(float\); it must be int"),
        ({"count": True}, r"config.count is True \(bool\); it must be int"),
        ({"count": 1, "flag": 1}, r"config.flag is 1 \(int\); it must be bool"),
        ({"count": None}, "config.count is None"),
        ({"count": 1, "inner": 3}, r"config.inner is 3; it must be a group of keys \(Inner\)"),
        ({"count": 1, "inner": {"rate": "x"}}, "config.inner.rate is 'x'"),
        ({"count": 1, "inner": {"rate": float("nan")}}, "config.inner.rate is not a number"),
        ({"count": 1, "inner": {"kind": "c"}}, "config.inner.kind is 'c'; choose one of a, b"),
        ({"count": 1, "sizes": 3}, r"config.sizes is 3; it must be a list such as \(1, 2\)"),
        ({"count": 1, "sizes": "12"}, "config.sizes is '12'; it must be a list"),
        ({"count": 1, "sizes": (1, "x")}, r"config.sizes\[1\] is 'x'"),
        ({"count": 1, "yarn": {"factor": 2.0}}, "config.yarn.original_length is missing"),
    ],
)
def test_errors_name_the_complete_path_of_a_setting(config, said):
    with pytest.raises(UserError, match=said):
        from_config_dict(Outer, config)


def test_values_of_every_type_are_converted():
    config = {
        "count": 3,
        "inner": {"rate": 2},
        "sizes": [1, None],
        "yarn": {"factor": 4, "original_length": 32768},
    }
    made = from_config_dict(Outer, config)
    assert made == Outer(3, Inner(2.0), (1, None), False, Yarn(4.0, 32768))
    assert isinstance(made.inner.rate, float)
    assert from_config_dict(Outer, to_config_dict(made)) == made


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_layers": 0}, "model.n_layers is 0; it must be at least 1"),
        ({"n_heads": 3}, "model.n_heads=3 is not a multiple of model.n_kv_heads=2"),
        ({"windows": (1,)}, "model.windows names 1 layers but model.n_layers is 2"),
        ({"rope_fraction": 0.4}, "gives 3 rotated channels; it must be an even number"),
    ],
)
def test_impossible_network_shapes_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        dataclasses.replace(jobs.MODEL, **change)
    assert isinstance(jobs.MODEL, ModelConfig)
