"""Sampling on device: distributions of transformers' processors, fair samples, independent rows."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
import transformers

from qwen_jax.engine.request import MAX_LOGPROBS, SamplingParams
from qwen_jax.engine.sampling import (
    TokenCounts,
    count_row,
    count_tokens,
    init_counts,
    log_probabilities,
    put_row,
    sample_rows,
    stack_sampling_params,
)
from qwen_jax.parallel import MeshConfig, make_mesh, named_sharding

V, PADDED = 300, 307
"""Ids of the tokenizer and of the table: neither fills blocks of 128."""

sample = jax.jit(sample_rows, static_argnames="vocab_size")
distribution = jax.jit(log_probabilities, static_argnames="vocab_size")


def params(**kwargs) -> SamplingParams:
    return SamplingParams(**{"seed": 7} | kwargs)


def normal(seed: int, rows: int, vocab: int = PADDED, scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal((rows, vocab))).astype(np.float32)


def theirs(logits: np.ndarray, p: SamplingParams, ids: list[int]) -> np.ndarray:
    """Returns log-probabilities by the processors of transformers, float64 [V]."""
    steps = [transformers.RepetitionPenaltyLogitsProcessor(p.repetition_penalty)]
    if p.temperature:
        steps += [transformers.TemperatureLogitsWarper(p.temperature)] if p.temperature != 1 else []
        steps += [transformers.TopKLogitsWarper(p.top_k)] if p.top_k else []
        steps += [transformers.TopPLogitsWarper(p.top_p)] if p.top_p < 1 else []
        steps += [transformers.MinPLogitsWarper(p.min_p)] if p.min_p else []
    scores = torch.tensor(logits[None, :V].astype(np.float64))
    for step in steps:
        scores = step(torch.tensor([ids]), scores)
    return torch.log_softmax(scores, dim=-1)[0].numpy()


def ours(logits: np.ndarray, p: list[SamplingParams], ids: list[list[int]]) -> np.ndarray:
    seen = np.stack([count_row(row, [], logits.shape[1]) for row in ids])
    out = np.asarray(
        distribution(logits, stack_sampling_params(p), TokenCounts(seen), vocab_size=V)
    )
    assert (out[:, V:] == -np.inf).all()
    return out[:, :V]


def same(found: np.ndarray, logits: np.ndarray, p: SamplingParams, ids: list[int]) -> None:
    """Asserts equal probabilities; one token may differ if the sum without it is top_p to 1e-5."""
    wanted = theirs(logits, p, ids)
    kept, theirs_kept = found > -np.inf, wanted > -np.inf
    both = kept & theirs_kept
    if (kept != theirs_kept).any():
        before = theirs(logits, dataclasses.replace(p, top_p=1.0, min_p=0.0), ids)
        assert (kept ^ theirs_kept).sum() == 1, p
        assert abs(np.exp(before[both]).sum() - p.top_p) < 1e-5, p
        found = found - np.log(np.exp(found[both]).sum())
        wanted = wanted - np.log(np.exp(wanted[both]).sum())
    np.testing.assert_allclose(found[both], wanted[both], rtol=2e-6, atol=2e-5)


COMBINATIONS = [
    params(),
    params(temperature=0.3),
    params(temperature=5.0),
    params(top_k=1),
    params(top_k=17),
    params(top_k=V + 50),
    params(top_p=0.8),
    params(top_p=1e-6),
    params(top_p=0.9999),
    params(min_p=0.05),
    params(min_p=1.0),
    params(repetition_penalty=1.3),
    params(repetition_penalty=0.7),
    params(temperature=0.7, top_k=50, top_p=0.9),
    params(temperature=1.5, top_k=5, top_p=0.5, min_p=0.2),
    params(temperature=2.0, top_p=0.95, min_p=0.01, repetition_penalty=1.1),
    params(temperature=1e-4, top_k=40),
    params(temperature=1e-30, top_p=0.9),
    params(temperature=0.0, repetition_penalty=1.2),
]


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**32), scale=st.sampled_from([0.01, 1.0, 4.0, 30.0]))
def test_distribution_equals_transformers(seed, scale):
    logits = normal(seed, len(COMBINATIONS), scale=scale)
    ids = np.random.default_rng(seed).integers(0, V, (len(COMBINATIONS), 20)).tolist()
    found = ours(logits, COMBINATIONS, ids)
    for i, p in enumerate(COMBINATIONS):
        same(found[i], logits[i], p, ids[i])


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    seed=st.integers(0, 2**32),
    p=st.builds(
        params,
        temperature=st.floats(0.0625, 4, width=32),
        top_k=st.integers(0, 2 * V),
        top_p=st.floats(2**-10, 1, width=32),
        min_p=st.floats(2**-20, 1, width=32),
        repetition_penalty=st.floats(0.5, 2, width=32),
    ),
)
def test_random_parameter_combinations_equal_transformers(seed, p):
    logits = normal(seed, 1)
    ids = np.random.default_rng(seed).integers(0, V, (1, 30)).tolist()
    same(ours(logits, [p], ids)[0], logits[0], p, ids[0])


@pytest.mark.parametrize("levels", [1, 2, 7])
def test_ties_with_the_last_kept_token_are_kept(levels):
    """Logits with few values: top-k as transformers; top-p keeps equals that they cut by order."""
    rng = np.random.default_rng(levels)
    logits = rng.integers(-levels // 2, levels, (8, PADDED)).astype(np.float32)
    for p in (params(top_k=1), params(top_k=40), params(top_p=0.5), params(top_p=0.01, top_k=3)):
        found = ours(logits, [p] * 8, [[0]] * 8) > -np.inf
        for i in range(8):
            wanted = theirs(logits[i], p, [0]) > -np.inf
            lowest = logits[i, :V][wanted].min()
            np.testing.assert_array_equal(found[i], logits[i, :V] >= lowest)


def test_tokens_with_logit_minus_infinity_are_never_kept():
    logits = normal(0, 3)
    logits[:, 5:] = -np.inf
    found = ours(logits, [params(top_k=20), params(top_p=0.99), params()], [[0]] * 3)
    assert ((found > -np.inf).sum(axis=1) <= 5).all()
    np.testing.assert_array_equal(found[[0, 2], 5:], -np.inf)
    drawn = sample(
        logits, stack_sampling_params([params(top_k=20)] * 3), np.arange(3), None, vocab_size=V
    )
    assert (np.asarray(drawn.tokens) < 5).all()


def test_presence_and_frequency_penalties_have_the_closed_form():
    """After the repetition penalty, the only one for which the prompt counts."""
    logits = normal(1, 2)
    prompt, answer = [3, 4, 4, 250], [4, 9, 9, 9, 299]
    p = [params(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=-0.25), params()]
    seen = init_counts(2, PADDED)
    seen = put_row(seen, jnp.int32(0), count_row(prompt, answer[:2], PADDED))
    seen = put_row(seen, jnp.int32(1), count_row(range(V), range(V), PADDED))
    for token in answer[2:]:  # one by one, as they are drawn; the second row stands still
        seen = count_tokens(seen, jnp.array([token, 7]), jnp.array([True, False]))
    found = np.asarray(distribution(logits, stack_sampling_params(p), seen, vocab_size=V))[:, :V]

    x = logits[:, :V].astype(np.float64)
    for token in {*prompt, *answer}:
        x[0, token] = x[0, token] / 1.5 if x[0, token] > 0 else x[0, token] * 1.5
    for token in set(answer):
        x[0, token] -= 0.5 - 0.25 * answer.count(token)
    np.testing.assert_allclose(found, scipy.special.log_softmax(x, axis=1), atol=1e-5)


def test_counting_a_row_at_once_equals_counting_token_by_token():
    rng = np.random.default_rng(0)
    prompt, answer = rng.integers(0, V, 50), rng.integers(0, V, 400)
    step = jax.jit(count_tokens)
    seen = put_row(init_counts(3, PADDED), jnp.int32(2), count_row(prompt, [], PADDED))
    for token in answer:
        tokens, real = jnp.array([1, -1, token]), jnp.array([False, True, True])
        seen = step(seen, tokens, real)
    np.testing.assert_array_equal(seen.counts[2], count_row(prompt, answer, PADDED))
    assert not np.asarray(seen.counts[:2]).any()


def test_counts_saturate():
    row = count_row([5], [5] * 40_000, PADDED)
    assert row[5] == 2 * 16_000 + 1
    seen = TokenCounts(jnp.asarray(row)[None])
    for _ in range(3):
        seen = count_tokens(seen, jnp.array([5]), jnp.array([True]))
    assert seen.counts[0, 5] == 2 * 16_000 + 1


def draws(logits: np.ndarray, p: SamplingParams, count: int) -> np.ndarray:
    """Returns tokens of `count` seeds at 64 consecutive positions, int [count, 64]."""
    rows = stack_sampling_params([dataclasses.replace(p, seed=1000 + i) for i in range(count)])
    one = np.broadcast_to(logits, (count, logits.size))
    run = jax.jit(
        lambda x, rows: jax.lax.map(
            lambda t: sample_rows(x, rows, jnp.full(count, t), None, V).tokens, jnp.arange(64)
        )
    )
    return np.asarray(run(one, rows)).T


@pytest.mark.parametrize(
    "p", [params(), params(temperature=0.8, top_k=30), params(temperature=2.0, top_p=0.9)]
)
def test_samples_follow_the_distribution(p):
    """χ² of 65,536 samples, tokens expected less than 10 times pooled."""
    logits = normal(3, 1, scale=2.0)
    expected = np.exp(ours(logits, [p], [[0]])[0].astype(np.float64))
    tokens = draws(logits, p, 1024)
    counts = np.bincount(tokens.ravel(), minlength=V)
    assert counts[expected == 0].sum() == 0
    often = expected * tokens.size >= 10
    observed = np.append(counts[often], counts[~often].sum())
    wanted = np.append(expected[often], expected[~often].sum()) * tokens.size
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    assert scipy.stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3


def test_samples_of_neighbouring_positions_and_seeds_are_independent():
    logits = np.full((1, PADDED), -np.inf, np.float32)
    logits[0, [2, 130, 131, 290]] = [0.0, 0.5, 1.0, 0.2]  # in three blocks
    tokens = np.searchsorted([2, 130, 131, 290], draws(logits, params(), 1024))
    for first, second in ((tokens[:, :-1], tokens[:, 1:]), (tokens[:-1], tokens[1:])):
        table = np.zeros((4, 4))
        np.add.at(table, (first.ravel(), second.ravel()), 1)
        assert scipy.stats.chi2_contingency(table).pvalue > 1e-3


def test_a_row_depends_only_on_its_own_arguments():
    """Other rows, their number and order, and other parameters change nothing."""
    rng = np.random.default_rng(0)
    count = len(COMBINATIONS)
    logits, positions = normal(5, count), rng.integers(0, 9999, count).astype(np.int32)
    ps = [dataclasses.replace(p, seed=int(rng.integers(2**62))) for p in COMBINATIONS]
    ps = [dataclasses.replace(p, logprobs=4 if i % 2 else None) for i, p in enumerate(ps)]
    counts = np.stack([count_row(rng.integers(0, V, 9), [1, 1], PADDED) for _ in range(count)])

    def run(order):
        rows = stack_sampling_params([ps[i] for i in order])
        seen = TokenCounts(counts[order])
        return sample(logits[order], rows, positions[order], seen, vocab_size=V)

    whole = run(np.arange(count))
    for order in (rng.permutation(count), rng.permutation(count)[:7], *np.arange(count)[:, None]):
        part = run(order)
        np.testing.assert_array_equal(part.tokens, whole.tokens[order])
        asked = order % 2 == 1
        np.testing.assert_allclose(
            part.logprob[asked], whole.logprob[order][asked], rtol=1e-6, atol=1e-6
        )
        np.testing.assert_array_equal(part.top_ids[asked, :4], whole.top_ids[order][asked, :4])


def test_seed_and_position_determine_the_sample():
    logits = np.zeros((4, PADDED), np.float32)
    p = [params(seed=s) for s in (5, 5, 6, 5 + 2**40)]
    at = np.array([9, 9, 9, 9])
    first = np.asarray(sample(logits, stack_sampling_params(p), at, None, vocab_size=V).tokens)
    later = np.asarray(sample(logits, stack_sampling_params(p), at + 1, None, vocab_size=V).tokens)
    assert first[0] == first[1] and len(set(first.tolist())) == 3
    assert (first != later).all()


def test_greedy_takes_the_lowest_id_of_equals():
    logits = normal(2, 4)
    logits[:, [7, 200]] = logits.max() + 1
    logits[1, 3] = logits.max() + 1
    logits[2, V:] = logits.max() + 9  # padding
    greedy, drawn = params(temperature=0.0), params(top_k=1)
    for p in ([greedy] * 4, [greedy] * 3 + [drawn]):
        out = sample(logits, stack_sampling_params(p), np.zeros(4, np.int32), None, vocab_size=V)
        assert np.asarray(out.tokens)[:3].tolist() == [7, 3, 7]


@pytest.mark.parametrize("of", ["sampled", "raw"])
def test_logprobs_equal_float64(of):
    logits = normal(8, 4)
    logits[3, [11, 12]] = logits[3].max() + 1
    base = functools.partial(params, logprobs=20, logprobs_of=of)
    p = [
        base(),
        base(temperature=0.6, top_k=25),
        base(temperature=1.7, top_p=0.7),
        base(temperature=0.0, repetition_penalty=1.4),
    ]
    ids = [[1, 2, 3]] * 4
    seen = TokenCounts(np.stack([count_row(row, [], PADDED) for row in ids]))
    out = sample(logits, stack_sampling_params(p), np.arange(4), seen, vocab_size=V)
    raw = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
    for i in range(4):
        wanted = theirs(logits[i], p[i], ids[i])
        token = int(out.tokens[i])
        np.testing.assert_allclose(out.logprob[i], wanted[token], atol=1e-5)
        np.testing.assert_allclose(out.raw_logprob[i], raw[i, token], atol=1e-5)
        of_all = raw[i, :V] if of == "raw" else wanted
        best = np.argsort(-of_all, kind="stable")[:MAX_LOGPROBS]
        np.testing.assert_allclose(out.top_logprobs[i], of_all[best], atol=1e-5)
        some = of_all[best] > -np.inf
        np.testing.assert_array_equal(np.asarray(out.top_ids[i])[some], best[some])


def test_logprobs_are_zero_when_no_row_requests_them():
    p = stack_sampling_params([params(top_p=0.9)] * 2 + [None])
    out = sample(normal(0, 3), p, np.zeros(3, np.int32), None, vocab_size=V)
    reported = (out.logprob, out.raw_logprob, out.top_ids, out.top_logprobs)
    assert not any(np.asarray(x).any() for x in reported)


@pytest.mark.parametrize("sizes", [{"tensor": 8, "fsdp": 1}, {"tensor": 4, "data": 2}, {"fsdp": 8}])
def test_vocabulary_divided_over_devices_gives_the_same_samples(sizes):
    """2,048 logits: full blocks on each device, so that samples are identical."""
    vocab, count = 2048, 8
    mesh = make_mesh(MeshConfig(**{"fsdp": 1} | sizes))
    rng = np.random.default_rng(0)
    logits = normal(4, count, vocab)
    logits[:, ::2] = np.round(logits[:, ::2])
    ps = [COMBINATIONS[i] for i in (0, 4, 6, 9, 14, 15, 16, 18)]
    ps = [dataclasses.replace(p, seed=i, logprobs=20) for i, p in enumerate(ps)]
    counts = np.stack([count_row(rng.integers(0, V, 9), [2000], vocab) for _ in range(count)])

    def run(logits, rows, seen):
        drawn = sample_rows(logits, rows, jnp.arange(count, dtype=jnp.int32), seen, 2000)
        greedy = sample_rows(logits, stack_sampling_params([None] * count), rows.top_k, None, 2000)
        kept = log_probabilities(logits, rows, seen, 2000)
        tokens = jnp.where(drawn.tokens < 1000, drawn.tokens, 1999)
        seen = count_tokens(put_row(seen, jnp.int32(5), counts[0]), tokens, tokens % 2 == 0)
        return drawn, greedy, kept, seen

    rows = stack_sampling_params(ps)
    alone = jax.jit(run)(logits, rows, TokenCounts(counts))
    with jax.set_mesh(mesh):
        here = named_sharding(mesh, "batch", "vocab")
        meshed = jax.jit(run)(
            jax.device_put(logits, here),
            jax.device_put(rows, jax.NamedSharding(mesh, jax.P())),
            TokenCounts(jax.device_put(counts, here)),
        )
    assert meshed[2].sharding.is_equivalent_to(here, 2)
    for one, many in zip(jax.tree.leaves(alone), jax.tree.leaves(meshed), strict=True):
        exact = jnp.issubdtype(one.dtype, jnp.integer)
        np.testing.assert_allclose(many, one, rtol=0 if exact else 2e-5, atol=0 if exact else 2e-5)


def test_released_vocabulary_equals_sorting_in_float64():
    """151,936 logits of which 151,851 may be sampled: kept sets by sorting, and ranks."""
    vocab, real = 151_936, 151_851
    logits = normal(6, 4, vocab)
    ps = [params(top_k=1000), params(top_p=0.8), params(temperature=0.5, top_k=64, top_p=0.95)]
    ps += [params(temperature=0.0, logprobs=20)]
    found = np.asarray(distribution(logits, stack_sampling_params(ps), None, vocab_size=real))
    for i, p in enumerate(ps[:3]):
        x = np.sort(logits[i, :real].astype(np.float64) / p.temperature)[::-1]
        x = x[: p.top_k] if p.top_k else x
        mass = np.cumsum(scipy.special.softmax(x))
        kept = len(x) if p.top_p == 1 else int(np.searchsorted(mass, p.top_p)) + 1
        assert abs((found[i] > -np.inf).sum() - kept) <= (1e-5 * kept if p.top_p < 1 else 0)
        np.testing.assert_allclose(np.exp(found[i].astype(np.float64)).sum(), 1, atol=1e-5)
    out = sample(logits, stack_sampling_params(ps), np.zeros(4, np.int32), None, vocab_size=real)
    assert (found[np.arange(4), np.asarray(out.tokens)] > -np.inf).all()
    best = np.argsort(-logits[3, :real], kind="stable")[:MAX_LOGPROBS]
    np.testing.assert_array_equal(out.top_ids[3], best)
    assert int(out.tokens[3]) == best[0]
