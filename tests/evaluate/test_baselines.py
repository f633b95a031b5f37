"""The n-gram model is a probability model with the published formulas; baselines are in bounds."""

import collections
import gzip
import time

import numpy as np
import pytest

from qwen_jax.corpus import stdlib
from qwen_jax.corpus.documents import Document
from qwen_jax.errors import UserError
from qwen_jax.evaluate.baselines import CONTEXT_OF, compute_baselines
from qwen_jax.evaluate.ngram import train_ngram

TEXTS = [b"the cat sat on the mat. the cat ate.\n" * 3, b"a bat sat, and that was that\n", b"z"]


@pytest.mark.parametrize("order", [1, 2, 3, 5, 8])
def test_probabilities_sum_to_one_in_every_context(order):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, size, np.uint8).tobytes() for size in (500, 3000)]
    for texts in (TEXTS, [*TEXTS, *noise]):
        model = train_ngram(texts, order)
        contexts = [b"", b"the c", b"unseen\xff\xfe", b"that w", bytes(9)]
        contexts += [rng.integers(0, 256, 12, np.uint8).tobytes() for _ in range(20)]
        contexts += [texts[i % 3][: int(rng.integers(0, 40))] for i in range(20)]
        p = model.probabilities(contexts)
        assert p.shape == (len(contexts), 256) and (p > 0).all()
        np.testing.assert_allclose(p.sum(1), 1, rtol=1e-12)


def naive_kneser_ney(texts, order):
    """The published recursion over dictionaries, one probability at a time."""
    padded = [bytes(7) + text for text in texts]
    grams = collections.Counter(
        text[i - order + 1 : i + 1] for text in padded for i in range(7, len(text))
    )
    tables = {}
    for n in range(order, 0, -1):
        tables[n] = grams
        grams = collections.Counter(gram[1:] for gram in grams)
    discounts = {}
    for n, table in tables.items():
        n1, n2, n3, n4 = (sum(c == i for c in table.values()) for i in (1, 2, 3, 4))
        if n1 and n2 and n3 and n4:
            y = n1 / (n1 + 2 * n2)
            d = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
            discounts[n] = [0, *(min(max(x, 0.01), i + 1) for i, x in enumerate(d))]
        else:
            discounts[n] = [0, 0.5, 1, 1.5]

    def probability(context, byte, n):
        if n == 0:
            return 1 / 256
        context = context[len(context) - n + 1 :]
        lower = probability(context, byte, n - 1)
        row = {gram[-1]: c for gram, c in tables[n].items() if gram[:-1] == context}
        if not row:
            return lower
        count = row.get(byte, 0)
        reserved = sum(discounts[n][min(c, 3)] for c in row.values())
        kept = count - discounts[n][min(count, 3)]
        return (kept + reserved * lower) / sum(row.values())

    return lambda context, byte: probability((bytes(7) + context)[-7:], byte, order)


@pytest.mark.parametrize("order", [1, 2, 4, 8])
def test_probabilities_equal_the_published_recursion(order):
    model, reference = train_ngram(TEXTS, order), naive_kneser_ney(TEXTS, order)
    for context in (b"", b"the ", b"th", b"q", b"at that"):
        found = model.probabilities([context])[0]
        want = [reference(context, byte) for byte in range(256)]
        np.testing.assert_allclose(found, want, rtol=1e-12)
    text = b"the bat sat on a zebra"
    want = -sum(np.log2(reference(text[:i], text[i])) for i in range(len(text)))
    np.testing.assert_allclose(model.bits([b"", text, b"t"])[1], want, rtol=1e-12)
    assert model.bits([b"", text])[0] == 0


def test_closed_forms():
    """One symbol once: discount 1/2 of count 1 goes to the uniform distribution."""
    p = train_ngram([b"a"], 1).probabilities([b""])[0]
    np.testing.assert_allclose(p[ord("a")], 0.5 + 0.5 / 256, rtol=1e-12)
    np.testing.assert_allclose(p[ord("b")], 0.5 / 256, rtol=1e-12)
    # "ab" as bigrams: (start, a), (a, b). After "a": b has 1 - 1/2, and half of its unigram mass,
    # where a and b were each seen after one byte: (1 - 1/2 + 1 · 1/256) / 2.
    p = train_ngram([b"ab"], 2).probabilities([b"a"])[0]
    unigram = (0.5 + 1 / 256) / 2
    np.testing.assert_allclose(p[ord("b")], 0.5 + 0.5 * unigram, rtol=1e-12)
    np.testing.assert_allclose(p[ord("a")], 0.5 * unigram, rtol=1e-12)


def test_bits_converge_to_the_entropy_of_a_source():
    """A Markov chain's entropy rate is approached from above, and noise costs 8 bits."""
    rng = np.random.default_rng(0)
    # From each of 4 letters: 1/2, 1/4, 1/8, 1/8, rotated: 1.75 bits per byte.
    steps = rng.choice(4, 60_000, p=[0.5, 0.25, 0.125, 0.125])
    chain = (np.cumsum(steps) % 4 + ord("a")).astype(np.uint8).tobytes()
    model = train_ngram([chain[:50_000]], 3)
    found = model.bits([chain[50_000:]])[0] / 10_000
    assert 1.72 < found < 1.80
    noise = rng.integers(0, 256, 60_000, np.uint8).tobytes()
    found = [train_ngram([noise[:50_000]], n).bits([noise[50_000:]])[0] / 10_000 for n in (1, 3)]
    assert 8 <= found[0] < 8.01 and found[1] >= 8


def test_documents_are_independent():
    model = train_ngram(TEXTS)
    together = model.bits([b"the cat", b" sat on"])
    np.testing.assert_allclose(together, [model.bits([b"the cat"])[0], model.bits([b" sat on"])[0]])
    assert together.sum() > model.bits([b"the cat sat on"])[0]


def test_baselines_on_the_standard_library_are_ordered_as_expected():
    corpus = stdlib.load(max_bytes=4_000_000, heldout=0.1)
    train, heldout = (
        [document for document in side if document.source == "prose"]
        for side in (corpus.train, corpus.heldout)
    )
    start = time.process_time()
    found = compute_baselines(train, heldout, prime_bytes=500_000)
    assert time.process_time() - start < 10
    held = "".join(document.text for document in heldout).encode()
    assert found.heldout_bytes == len(held)
    assert found.gzip == 8 * len(gzip.compress(held, 9, mtime=0)) / len(held)
    assert found.xz_primed < found.xz < found.gzip < 4
    assert 1 < found.ngram < found.gzip
    assert 300_000 < found.primed_bytes < 700_000
    assert "byte 8-gram" in found.table()
    assert set(CONTEXT_OF) == {"gzip", "xz", "xz_primed", "ngram"} <= set(vars(found))


def test_more_training_text_lowers_the_bits():
    corpus = stdlib.load(max_bytes=2_000_000, heldout=0.1)
    texts = [document.text.encode() for document in corpus.train]
    held = [document.text.encode() for document in corpus.heldout]
    costs = [train_ngram(texts[::stride]).bits(held).sum() for stride in (16, 4, 1)]
    assert costs[0] > costs[1] > costs[2]


def test_missing_text_is_refused():
    full, empty = [Document("a", "text")], [Document("b", "")]
    with pytest.raises(UserError, match="no held-out text"):
        compute_baselines(full, empty)
    with pytest.raises(UserError, match="no training text"):
        compute_baselines(empty, full)
    for order in (0, 9):
        with pytest.raises(UserError, match="order is"):
            train_ngram([b"a"], order)
