"""A table over lengths and modes: what a mode runs, what is kept, what is shown."""

import dataclasses
import functools
import io
import json

import jax
import matplotlib.image
import numpy as np
import pytest

from qwen_jax.errors import UserError
from qwen_jax.evaluate import long_context
from qwen_jax.evaluate.long_context import MODES, PerplexityTable, TablePlan, measure, mode_config
from qwen_jax.evaluate.long_context_report import as_json, as_text, plot_png
from qwen_jax.evaluate.perplexity import Perplexity, perplexity, split_windows
from qwen_jax.model import abstract_params
from qwen_jax.parallel import MeshConfig, make_mesh
from tests import multiprocess
from tests.model import naive
from tests.model.families import FLOAT32, params

CONFIG = dataclasses.replace(naive.CONFIG, windows=())
WEIGHTS = functools.partial(params, naive.CONFIG)  # those of any windows
PLAN = TablePlan(CONFIG, FLOAT32, lengths=(8, 32), layers_per_window=1)
BYTES = np.arange(CONFIG.vocab_size, dtype=np.int32) % 5


def documents(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in (33, 20, 80, 32)]


class Weights:
    """The parameters, and how often they were asked for."""

    def __init__(self):
        self.loads = 0

    def __call__(self):
        self.loads += 1
        return WEIGHTS()


def fill(folder, plan=PLAN, weights=None, texts=None, which="a"):
    texts = documents() if texts is None else texts
    return measure(
        plan, Weights() if weights is None else weights, texts, BYTES, folder, {"weights": which}
    )


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    with jax.default_matmul_precision("highest"):
        return fill(tmp_path_factory.mktemp("table") / "cells")


def test_mode_sets_the_switches_of_the_network():
    """Only what changes something is on, so that equal computations are done once."""
    for mode in MODES:
        for length in (1, naive.S):
            run = mode_config(CONFIG, mode, length, 1)
            assert (run.dynamic_ntk, run.logn, run.windows) == (False, False, ())
    runs = {mode: mode_config(CONFIG, mode, 32, 1) for mode in (*MODES, "window", "logn")}
    assert {m: (r.dynamic_ntk, r.logn, r.windows) for m, r in runs.items()} == {
        "none": (False, False, ()),
        "ntk": (True, False, ()),
        "ntk+logn": (True, True, ()),
        "ntk+logn+window": (True, True, (8, 16, None, None)),
        "window": (False, False, (8, 16, None, None)),
        "logn": (False, True, ()),
    }
    assert mode_config(CONFIG, "window", 33, 2).windows == (8, 8, 16, 16)
    own = dataclasses.replace(CONFIG, windows=(8, None, 16, None))
    assert mode_config(own, "ntk", 16, 1).windows == (8, None, None, None)
    assert mode_config(own, "ntk", 8, 1).windows == ()


def test_all_cells_score_the_same_tokens(table):
    assert table.documents == 2 and table.tokens == 32 + 64
    assert set(table.cells) == {(mode, n) for mode in MODES for n in PLAN.lengths}
    kept = [d for d in documents() if len(d) > 32]
    targets = split_windows(kept, 32)[:, 1:]
    assert table.n_bytes == BYTES[targets].sum()
    with jax.default_matmul_precision("highest"):
        for mode, length in ((MODES[3], 32), ("none", 8)):
            config = mode_config(CONFIG, mode, length, 1)
            alone = perplexity(WEIGHTS(), split_windows(kept, length, 32), config, FLOAT32)
            np.testing.assert_allclose(table.cells[mode, length].nll, alone.nll, rtol=1e-5)
    for length in PLAN.lengths:
        found = {table.cells[mode, length].nll for mode in MODES}
        assert len(found) == (1 if length <= naive.S else 4)


def test_interrupted_anywhere_a_rerun_completes_the_table(tmp_path, table, monkeypatch):
    """Whichever cell is cut short, those before it are not computed again."""
    computed = []
    cell = long_context._compute_cell

    def dies(*args):
        if len(computed) == 4:
            raise KeyboardInterrupt
        computed.append(args)
        return cell(*args)

    with jax.default_matmul_precision("highest"):
        monkeypatch.setattr(long_context, "_compute_cell", dies)
        with pytest.raises(KeyboardInterrupt):
            fill(tmp_path)
        monkeypatch.setattr(long_context, "_compute_cell", cell)
        again, stamps = Weights(), {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
        assert len(stamps) == 4
        assert fill(tmp_path, weights=again).cells == table.cells
        assert again.loads == 1
        assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
        done = Weights()
        assert fill(tmp_path, weights=done).cells == table.cells
        assert done.loads == 0  # the weights of a finished table are not even read


def test_changed_weights_text_or_switches_are_recomputed(tmp_path, table):
    plan = dataclasses.replace(PLAN, lengths=(32,), modes=("none", "ntk+logn+window"))
    with jax.default_matmul_precision("highest"):
        first = Weights()
        fill(tmp_path, plan, first)
        for change in (
            {"which": "b"},
            {"texts": documents(1)},
            {"plan": dataclasses.replace(plan, layers_per_window=2)},
        ):
            other = Weights()
            fill(tmp_path, **({"plan": plan} | change), weights=other)
            assert other.loads == 1, change


def test_text_and_json_state_the_same_numbers(table):
    text = as_text(table)
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in text.split("\n") if "|" in line]
    assert lines[0] == ["perplexity", "8", "32"]
    assert [line[0] for line in lines[2:6]] == list(MODES)
    assert float(lines[5][2]) == pytest.approx(table.cells[MODES[3], 32].perplexity, abs=0.01)
    bits = table.cells["none", 32].nll / np.log(2) / table.n_bytes
    assert lines[8][2] == f"{bits:.3f}"
    assert "96 tokens" in text and "2 documents" in text and "Trained at 8." in text
    stored = json.loads(json.dumps(as_json(table)))
    assert len(stored["cells"]) == 8 and stored["tokens"] == 96
    for cell in stored["cells"]:
        found = table.cells[cell["mode"], cell["length"]]
        assert np.log(cell["perplexity"]) == pytest.approx(found.loss)
        assert np.mean(cell["nats_by_position"]) == pytest.approx(found.loss)


@pytest.mark.parametrize("worst", [2.0, 6.0, 800.0])
def test_png_is_reproducible_and_has_every_line(table, worst):
    """Any range of values, an infinite perplexity too, draws without a warning."""
    cells = dict(table.cells)
    cells["none", 32] = Perplexity((96 * worst,), (96,))
    shown = PerplexityTable(PLAN, cells, table.documents, table.n_bytes)
    image = matplotlib.image.imread(io.BytesIO(plot_png(shown)), format="png")
    assert image.shape[0] > 300 and image.shape[1] > 900
    assert np.unique(image[..., :3].reshape(-1, 3), axis=0).shape[0] > 20
    assert plot_png(shown) == plot_png(shown)
    assert ("inf" in as_text(shown)) == (worst == 800.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": ()}, "lengths and modes are empty"),
        ({"lengths": (6, 16)}, "lengths has 6, which does not divide the longest, 16"),
        ({"lengths": (0, 16)}, "lengths has 0"),
        ({"lengths": (16, 16)}, "lengths has an entry twice: 16, 16"),
        ({"modes": ("ntk", "ntk")}, "modes has an entry twice"),
        ({"modes": ("ntk+lognn",)}, r"has 'lognn' \(did you mean 'logn'\?\)"),
        ({"context": 8}, "lengths has 8, which is no multiple of twice context=8"),
        ({"batch_tokens": -1}, "batch_tokens=-1 must be at least 0"),
        ({"layers_per_window": 0}, "layers_per_window=0 at least 1"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PLAN, **change)


def test_short_documents_are_refused(tmp_path):
    with pytest.raises(UserError, match="no document has the 33 tokens"):
        fill(tmp_path, texts=[[1] * 32])


def never():
    raise AssertionError("weights are read for what is kept")


def _on_a_mesh_of_two(folder: str) -> dict:
    host = jax.tree.map(np.asarray, WEIGHTS())
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))

    def weights():
        def place(x, like):
            return jax.make_array_from_callback(x.shape, like.sharding, lambda index: x[index])

        return jax.tree.map(place, host, abstract_params(CONFIG, mesh))

    plan = dataclasses.replace(PLAN, lengths=(32,), modes=("ntk+logn+window",))
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        cells = fill(folder, plan, weights).cells
        assert fill(folder, plan, never).cells == cells
    return {f"{mode} {length}": cell.nll for (mode, length), cell in cells.items()}


@pytest.mark.slow
def test_two_processes_agree(tmp_path, table):
    """Each has a part of the weights; the first keeps the cells, and nothing is done twice."""
    found = multiprocess.run(
        _on_a_mesh_of_two, processes=2, devices=4, folder=str(tmp_path / "cells")
    )
    assert found[0] == found[1] and len(found[0]) == 1
    for name, nll in found[0].items():
        mode, length = name.split()
        np.testing.assert_allclose(nll, table.cells[mode, int(length)].nll, rtol=1e-5)
    assert len(list((tmp_path / "cells").iterdir())) == 1
