"""The search against a synthetic model of memory and speed: the optimum in few compilations."""

import json
import re

import pytest

from qwen_jax.aot.search import REMAT_POLICIES, SearchLog, search
from qwen_jax.errors import UserError
from qwen_jax.model.options import REMAT


def machine(hbm):
    """Reports of a chip where a row takes 10 and each remat policy 4 more; counts calls."""
    calls = []

    def measure(batch, remat):
        calls.append((batch, remat))
        policy = REMAT_POLICIES.index(remat)
        fits = batch * (10 + 4 * policy) <= hbm
        rate = 1000 * batch / (batch + 1) * (1 + policy / 10)
        report = {"memory": {"fits": fits}}
        if fits:
            report["prediction"] = {"tokens_per_second_per_chip": rate}
        return report

    return measure, calls


def exhaustive(measure, batches):
    trials = [(measure(b, r), b, r) for b in batches for r in REMAT_POLICIES]
    fitting = [t for t in trials if t[0]["memory"]["fits"]]
    return max(fitting, key=lambda t: t[0]["prediction"]["tokens_per_second_per_chip"])[1:]


@pytest.mark.parametrize("hbm", [10, 37, 100, 333, 5000])
def test_search_finds_the_optimum_of_an_exhaustive_search(hbm):
    measure, calls = machine(hbm)
    log = SearchLog(None)
    for _ in search(measure, log, largest_batch=64):
        pass
    assert len(calls) == len(set(calls)) <= 14
    fitting = [b for b in (1, 2, 4, 8, 16, 32, 64) if 10 * b <= hbm]
    assert (log.best.batch, log.best.remat) == exhaustive(measure, fitting[-2:])


def test_search_without_a_fitting_trial_has_no_best():
    measure, calls = machine(9)
    log = SearchLog(None)
    assert [t.fits for t in search(measure, log)] == [False]
    assert log.best is None and calls == [(1, "full")]


def test_interrupted_search_resumes_from_its_log(tmp_path):
    path = tmp_path / "search.jsonl"
    measure, calls = machine(100)
    steps = search(measure, SearchLog(str(path)))
    for _ in range(3):
        next(steps)
    with path.open("a") as sink:
        sink.write('{"batch": 2, "rem')  # killed while writing
    again = SearchLog(str(path))
    assert again.best.batch == 4
    list(search(measure, again))
    whole, fresh = machine(100)
    log = SearchLog(None)
    list(search(whole, log))
    assert (again.best.batch, again.best.remat) == (log.best.batch, log.best.remat)
    assert sorted(calls) == sorted(fresh)
    heading, *trials = [json.loads(line) for line in path.read_text().splitlines()]
    assert heading["search"] and len(trials) == len(calls)


def test_log_of_another_search_is_refused(tmp_path):
    """Its trials are of another chip or model: taken over, they would be this search's answer."""
    path = tmp_path / "search.jsonl"
    asked = {"topology": "v5e:4x4", "model.d_model": 64, "model.windows": (1, None)}
    list(search(machine(100)[0], SearchLog(str(path), asked)))
    before = path.read_text()
    assert SearchLog(str(path), asked).best
    for other, sentence in (
        (asked | {"topology": "v6e:8x8"}, "topology is 'v5e:4x4' there but 'v6e:8x8' now"),
        (asked | {"--xla": {"a": "b"}}, "--xla is absent there but {'a': 'b'} now"),
        ({"topology": "v5e:4x4"}, "model.d_model is 64 there but absent now"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            SearchLog(str(path), other)
    assert path.read_text() == before


@pytest.mark.parametrize(
    "text",
    [
        '{"batch": 1, "remat": "full", "report": {"memory": {"fits": false}}}\n',  # no heading
        "not JSON\n",
        "[1]\n",
        '{"search": {"version": 1}}\n{"batch": 1, "remat": "full", "report": {}}\n',
        '{"search": {"version": 1}}\n{"batch": 1, "rem\n{"batch": 2}\n',
    ],
)
def test_file_that_is_not_a_log_is_refused_and_unchanged(tmp_path, text):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=r"line [12] of .* is not a line of a search log"):
        SearchLog(str(path))
    assert path.read_text() == text


def test_unwritable_log_is_refused_before_compilation(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "x.jsonl"):
        with pytest.raises(UserError, match=r"search log .* cannot be used"):
            SearchLog(str(path))


def test_every_searched_policy_exists():
    assert set(REMAT_POLICIES) <= set(REMAT)
