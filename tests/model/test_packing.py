"""Documents packed into one row with masks give the logits that each gives alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.corpus import Document, PackConfig, pack
from qwen_jax.data import Batches, DataConfig
from qwen_jax.model import forward
from tests.byte_tokenizer import ByteTokenizer
from tests.model.families import FLOAT32, MODELS, params

SEQ_LEN = 32


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Packing -> batch of four rows that hold several documents each."""
    folder = tmp_path_factory.mktemp("packed") / "texts"
    rng = np.random.default_rng(0)
    documents = [Document(f"d{i}", "ab c" * int(rng.integers(1, 5)) + f"{i}") for i in range(40)]
    pack(documents, folder, ByteTokenizer(), PackConfig(SEQ_LEN))
    return {
        packing: Batches(DataConfig(str(folder), SEQ_LEN, 4, packing=packing)).rows(0)
        for packing in ("masked", "plain")
    }


@pytest.mark.parametrize("name", MODELS)
def test_masked_packing_equals_each_document_alone(rows, name):
    config = MODELS[name]
    batch = rows["masked"]
    # Every piece of a document, from its first token in the row, alone and right-padded.
    places = [
        (row, np.flatnonzero(batch["segment_ids"][row] == segment))
        for row in range(4)
        for segment in np.unique(batch["segment_ids"][row])
        if segment
    ]
    assert len(places) >= 8 and max(len(slots) for _, slots in places) > 10
    alone = np.zeros((len(places), SEQ_LEN), np.int32)
    for i, (row, slots) in enumerate(places):
        alone[i, : len(slots)] = batch["tokens"][row, slots]

    @jax.jit
    def packed(weights, batch):
        return forward(
            weights,
            batch["tokens"],
            config,
            FLOAT32,
            segment_ids=batch["segment_ids"],
            positions=batch["positions"],
        )[0]

    with jax.default_matmul_precision("highest"):
        weights = params(config)
        expected = jax.jit(lambda w, t: forward(w, t, config, FLOAT32)[0])(weights, alone)
        masked, plain = (
            np.asarray(packed(weights, jax.tree.map(jnp.asarray, rows[packing])))
            for packing in ("masked", "plain")
        )
    seen = 0.0
    for i, (row, slots) in enumerate(places):
        one = expected[i, : len(slots)]
        np.testing.assert_allclose(masked[row, slots], one, atol=1e-5 * np.abs(one).max())
        if slots[0] > 0:
            seen = max(seen, np.abs(plain[row, slots] - one).max() / np.abs(one).max())
    assert seen > 1e-2, "plain packing must let documents see what stands before them"
