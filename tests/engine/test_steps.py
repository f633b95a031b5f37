"""Device programs of the engine against the forward pass over the whole text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.engine.programs import CompiledPrograms
from qwen_jax.engine.request import SamplingParams
from qwen_jax.engine.sampling import count_row, stack_sampling_params
from qwen_jax.engine.steps import EngineShapes, empty_prefill, empty_rows
from qwen_jax.model import abstract_params, forward, ntk_alphas
from qwen_jax.parallel import MeshConfig, make_mesh
from tests.model.families import FLOAT32, MODELS, params

SHAPES = EngineShapes(
    max_rows=4,
    max_pages_per_request=8,
    page_size=4,
    num_pages=32,
    max_prompts=3,
    prefill_tokens=(16, 32),
    cached_pages=(0, 4),
    decode_rows=(2, 4),
    max_decode_steps=6,
    swap_pages=2,
)
TABLE = np.arange(32, dtype=np.int32).reshape(4, 8)


def programs(config, weights=None, shapes=SHAPES):
    weights = params(config) if weights is None else weights
    return CompiledPrograms(
        *(weights, config, FLOAT32, shapes), vocab_size=config.vocab_size, kv_dtype=jnp.float32
    )


def start(config, prompts, options, budget=8, table=TABLE):
    """Returns the batch of a prefill call with complete prompts, prompt i in row i."""
    batch = empty_prefill(SHAPES, len(config.distinct_windows), 32, 0)
    at = 0
    for i, ids in enumerate(prompts):
        here = slice(at, at + len(ids))
        batch.tokens[here], batch.segments[here] = ids, i + 1
        batch.positions[here] = np.arange(len(ids))
        n = -(-len(ids) // SHAPES.page_size)
        batch.new_pages[at // 4 : at // 4 + n] = table[i, :n]
        batch.alpha[i] = ntk_alphas(len(ids), config)
        batch.last_index[i], batch.row[i] = at + len(ids) - 1, i
        batch.length[i], batch.token_budget[i] = len(ids), budget
        at += n * SHAPES.page_size
    rows = [*options, *[None] * (SHAPES.max_prompts - len(options))]
    return dataclasses.replace(batch, sampling=stack_sampling_params(rows))


def greedy(config, ids, n):
    """Returns n greedy tokens by full recomputation, with the prompt's NTK factor."""
    switches = {"ntk_alpha": ntk_alphas(len(ids), config)[None], "logn": config.logn}
    out, width = list(ids), len(ids) + n
    run = jax.jit(lambda w, t: forward(w, t[None], config, FLOAT32, **switches)[0][0])
    for _ in range(n):
        padded = np.pad(np.array(out, np.int32), (0, width - len(out)))
        out.append(int(np.argmax(run(params(config), padded)[len(out) - 1])))
    return out[len(ids) :]


GREEDY = SamplingParams(temperature=0, seed=0)


def prompts_of(config, lengths=(9, 5, 12)):
    rng = np.random.default_rng(2)
    return [rng.integers(0, config.vocab_size, n).astype(np.int32) for n in lengths]


def test_decode_steps_equal_greedy_decoding_by_recomputation():
    config = MODELS["v1: NTK, LogN"]
    prompts = prompts_of(config)
    expected = [greedy(config, ids, 8) for ids in prompts]
    run = programs(config)
    state, first = run.prefill(run.init_state(), start(config, prompts, [GREEDY] * 3))
    state, one = run.decode(state, TABLE, 2)
    state, two = run.decode(state, TABLE, 6)
    got = np.concatenate([first.tokens[None], one.tokens[:2, :3], two.tokens[:5, :3]])
    np.testing.assert_array_equal(got.T, expected)
    assert (one.tokens[:, 3] == -1).all() and (one.tokens[2:] == -1).all()
    assert (two.tokens[5:] == -1).all(), "a row with a used-up budget samples nothing"
    assert not state.rows.alive.any()
    np.testing.assert_array_equal(state.rows.length[:3], [len(p) + 7 for p in prompts])


def test_stop_id_ends_a_row_and_a_stopped_row_samples_nothing():
    config = MODELS["v1: NTK, LogN"]
    prompts = prompts_of(config)
    expected = [greedy(config, ids, 8) for ids in prompts]
    stop = next(t for i, t in enumerate(expected[0]) if i >= 2 and t not in expected[0][:i])
    cut = expected[0].index(stop) + 1
    run = programs(config)
    batch = start(config, prompts, [GREEDY] * 3)
    batch.stop_ids[0, 0] = stop
    state, first = run.prefill(run.init_state(), batch)
    state = run.stop_rows(state, np.array([False, True, False, False]))
    state, out = run.decode(state, TABLE, 6)
    tokens = np.concatenate([first.tokens[None], out.tokens[:, :3]])
    assert tokens[:cut, 0].tolist() == expected[0][:cut] and (tokens[cut:, 0] == -1).all()
    assert (tokens[1:, 1] == -1).all()
    assert tokens[:, 2].tolist() == expected[2][:7]


def test_swapping_a_request_to_other_pages_and_row_changes_nothing():
    """A request is moved to other pages and another row between two decode calls."""
    config = MODELS["2.5: grouped, tied, YaRN"]
    prompts = prompts_of(config, (9, 5, 9))
    drawn = SamplingParams(temperature=1.5, top_k=40, seed=11)
    run = programs(config)
    answers = []
    for move in (False, True):
        state, first = run.prefill(run.init_state(), start(config, prompts, [drawn] * 3))
        state, one = run.decode(state, TABLE, 2)
        table, slot = TABLE.copy(), 2
        if move:
            copies = [
                jax.tree.map(np.asarray, run.copy_pages_out(state, TABLE[2, i : i + 2]))
                for i in (0, 2)
            ]
            state = run.stop_rows(state, np.array([False, False, True, False]))
            for i, copy in zip((0, 2), copies, strict=True):
                # The last of the four is not in use: it goes nowhere.
                ids = np.array([30 - i, 29 - i if i == 0 else SHAPES.num_pages], np.int32)
                state = run.copy_pages_in(state, ids, copy)
            table[3, :3], slot = (30, 29, 28), 3
            row = dataclasses.replace(
                empty_rows(1, 1),
                token=np.array([one.tokens[1, 2]], np.int32),
                length=np.array([11], np.int32),
                token_budget=np.array([5], np.int32),
                alive=np.array([True]),
                sampling=stack_sampling_params([drawn]),
            )
            state = run.start_row(state, 3, row)
        state, two = run.decode(state, table, 4)
        answers.append(np.array([first.tokens[2], *one.tokens[:2, 2], *two.tokens[:4, slot]]))
    np.testing.assert_array_equal(*answers)


def test_penalties_count_prompt_and_output_tokens():
    config = MODELS["2.5: grouped, tied, YaRN"]
    prompts = prompts_of(config)
    params_ = SamplingParams(temperature=0, repetition_penalty=3.0, presence_penalty=2.0, seed=0)
    run = programs(config)
    state = run.init_state()
    stale = count_row([1, 2, 3], [4, 5], config.vocab_size)
    state = run.put_counts(state, 0, stale)
    state = run.put_counts(state, 0, count_row(prompts[0], [], config.vocab_size))
    state, first = run.prefill(state, start(config, prompts, [params_, GREEDY, GREEDY]))
    _, out = run.decode(state, TABLE, 6)
    got = [int(first.tokens[0]), *out.tokens[:, 0].tolist()]
    assert got[1:] != got[:-1]
    ids, expected = list(prompts[0]), []
    for _ in range(7):
        scores = np.array(forward(params(config), np.array([ids]), config, FLOAT32)[0][0, -1])
        known = sorted({*ids})
        scores[known] = np.where(scores[known] > 0, scores[known] / 3, scores[known] * 3)
        scores[sorted({*expected})] -= 2.0
        expected.append(int(scores.argmax()))
        ids.append(expected[-1])
    assert got == expected


def test_tensor_parallel_steps_equal_one_device():
    config = MODELS["2.5: grouped, tied, YaRN"]
    prompts = prompts_of(config)
    options = [GREEDY, SamplingParams(seed=3, top_p=0.9), SamplingParams(seed=4, logprobs=2)]

    def answers(run):
        state, first = run.prefill(run.init_state(), start(config, prompts, options))
        state = run.copy_pages_in(state, TABLE[3, :2], run.copy_pages_out(state, TABLE[0, :2]))
        state = run.put_counts(state, 3, count_row([1], [], config.vocab_size))
        state, out = run.decode(state, TABLE, 6)
        return jax.tree.map(np.asarray, (first, out))

    alone = answers(programs(config))
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=2), jax.devices()[:2])
    shardings = jax.tree.map(lambda x: x.sharding, abstract_params(config, mesh))
    with jax.set_mesh(mesh):
        split = answers(programs(config, jax.device_put(params(config), shardings)))
    for a, b in zip(alone, split, strict=True):
        np.testing.assert_array_equal(a.tokens[..., :3], b.tokens[..., :3])
        np.testing.assert_allclose(a.logprob[..., 2], b.logprob[..., 2], atol=1e-4)
