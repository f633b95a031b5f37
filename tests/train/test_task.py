"""The loop runs any stage: here one with two sets of parameters and batches made by one of them."""

import contextlib
import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.errors import UserError
from qwen_jax.parallel import MeshConfig, make_mesh
from qwen_jax.train.checkpoint import read_header
from qwen_jax.train.config import RunConfig
from qwen_jax.train.loop import Outcome, TrainingDiverged, train
from qwen_jax.train.metrics import read_metrics
from qwen_jax.train.task import Task

WIDTH, STEPS = 16, 7


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ActorCriticState:
    """A policy's mean, a critic that follows its reward, a frozen reference, a running mean."""

    step: jax.Array
    policy: dict
    critic: dict
    reference: dict
    reward_mean: jax.Array


@dataclasses.dataclass(frozen=True)
class Score:
    reward: float

    def metrics(self):
        return {"reward": self.reward}


def actor_critic_step(state, batch):
    """The policy moves to the better rollouts, the critic to their mean reward."""
    reward = -jnp.square(batch["rollouts"] - 1.0).sum(-1)
    advantage = reward - state.critic["value"]
    direction = batch["rollouts"] - state.policy["mean"]
    pull = 0.1 * (state.reference["mean"] - state.policy["mean"])
    mean = state.policy["mean"] + 0.01 * (advantage[:, None] * direction).mean(0) + 0.01 * pull
    after = ActorCriticState(
        step=state.step + 1,
        policy={"mean": mean},
        critic={"value": state.critic["value"] + 0.5 * advantage.mean()},
        reference=state.reference,
        reward_mean=0.9 * state.reward_mean + 0.1 * reward.mean(),
    )
    return after, {"reward": reward.mean(), "skipped_in_a_row": batch["bad_steps"]}


def make_task(seed=0, bad_from=STEPS, asked=None):
    """A task whose rollouts are noise around the policy's mean; `asked` collects their steps."""
    mesh = make_mesh(MeshConfig(fsdp=8))
    whole = jax.NamedSharding(mesh, jax.P())
    rows = jax.NamedSharding(mesh, jax.P("fsdp"))

    def init():
        state = ActorCriticState(
            step=jnp.int32(0),
            policy={"mean": jnp.zeros(WIDTH)},
            critic={"value": jnp.float32(0)},
            reference={"mean": jnp.zeros(WIDTH)},
            reward_mean=jnp.float32(0),
        )
        return jax.device_put(state, whole)

    @contextlib.contextmanager
    def open_batches(start):
        assert start < STEPS

        def rollouts(step, state):
            assert int(state.step) == step
            if asked is not None:
                asked.append(step)
            noise = np.random.default_rng((seed, step)).normal(size=(8, WIDTH)).astype(np.float32)
            mean = np.asarray(state.policy["mean"])
            bad = max(0, step - bad_from + 1)
            return {
                "rollouts": jax.device_put(mean + noise, rows),
                "bad_steps": jax.device_put(jnp.float32(bad), whole),
            }

        yield rollouts

    shape = jax.ShapeDtypeStruct
    return Task(
        mesh=mesh,
        step=actor_critic_step,
        abstract_state=jax.tree.map(
            lambda x: shape(x.shape, x.dtype, sharding=whole), jax.eval_shape(init)
        ),
        init_state=init,
        example_batch={
            "rollouts": shape((8, WIDTH), jnp.float32, sharding=rows),
            "bad_steps": shape((), jnp.float32, sharding=whole),
        },
        open_batches=open_batches,
        fingerprint={"stage": "actor-critic", "seed": seed},
        description="a policy and a critic",
        tokens_per_step=8,
        flops_per_token=1.0,
        checkpoint_info=lambda step: {"rollouts": 8 * step},
        evaluate=lambda state: {"game": Score(float(state.reward_mean))},
    )


def run_config(**changes):
    settings = {"steps": STEPS, "log_every": 1, "eval_every": 3, "checkpoint_every": 2}
    return RunConfig(**settings | {"tensorboard": False} | changes)


def series(folder, name):
    return [
        (row["step"], row[name]) for row in read_metrics(folder / "metrics.jsonl") if name in row
    ]


def test_a_stage_with_two_parameter_sets_trains_and_resumes_bit_for_bit(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="absl")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    outcome = train(run_config(), make_task(), str(whole))
    assert outcome.finished and outcome.step == STEPS
    rewards = [reward for _, reward in series(whole, "reward")]
    assert len(rewards) == STEPS and rewards[-1] > rewards[0]
    assert [step for step, _ in series(whole, "eval/game/reward")] == [3, 6, 7]
    assert outcome.evaluations == {"game": Score(series(whole, "eval/game/reward")[-1][1])}
    assert "a policy and a critic" in caplog.text
    assert read_header(f"{whole}/checkpoints").info == {
        "data_position": STEPS, "tokens_seen": 8 * STEPS, "rollouts": 8 * STEPS,
    }  # fmt: skip

    asked = []
    assert train(run_config(steps=4), make_task(asked=asked), str(parts)).step == 4
    train(run_config(), make_task(asked=asked), str(parts))
    assert asked == list(range(STEPS))  # one batch per step, none of them twice
    assert series(parts, "reward") == series(whole, "reward")
    assert series(parts, "eval/game/reward")[-1] == series(whole, "eval/game/reward")[-1]


def test_a_stage_without_evaluation_reports_none(tmp_path):
    task = dataclasses.replace(make_task(), evaluate=None)
    assert train(run_config(), task, str(tmp_path)) == Outcome(STEPS, True, {})
    assert not series(tmp_path, "eval/game/reward")


def test_a_checkpoint_of_another_fingerprint_is_refused(tmp_path):
    train(run_config(steps=2), make_task(), str(tmp_path))
    with pytest.raises(UserError, match=r"seed = 0, this run has 1"):
        train(run_config(), make_task(seed=1), str(tmp_path))


def test_the_run_stops_when_the_step_reports_too_many_skipped_steps(tmp_path):
    with pytest.raises(TrainingDiverged, match=r"stopped at step 5: the last 2 steps"):
        train(run_config(max_skipped=2), make_task(bad_from=3), str(tmp_path))
    assert read_header(f"{tmp_path}/checkpoints").step == 4
