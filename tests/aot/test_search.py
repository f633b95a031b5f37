"""The search against a made-up memory and speed: it finds the best with few compilations."""

import json
import re

import pytest

from qwen_jax.aot.search import RUNGS, Log, search
from qwen_jax.errors import UserError
from qwen_jax.model.options import REMAT


def machine(hbm):
    """Reports of a chip where a row costs 10 and each rung 4 more per row; calls are counted."""
    calls = []

    def measure(batch, remat):
        calls.append((batch, remat))
        rung = RUNGS.index(remat)
        fits = batch * (10 + 4 * rung) <= hbm
        rate = 1000 * batch / (batch + 1) * (1 + rung / 10)
        report = {"memory": {"fits": fits}}
        if fits:
            report["prediction"] = {"tokens_per_second_per_chip": rate}
        return report

    return measure, calls


def exhaustive(measure, batches):
    tries = [(measure(b, r), b, r) for b in batches for r in RUNGS]
    fitting = [t for t in tries if t[0]["memory"]["fits"]]
    return max(fitting, key=lambda t: t[0]["prediction"]["tokens_per_second_per_chip"])[1:]


@pytest.mark.parametrize("hbm", [10, 37, 100, 333, 5000])
def test_it_finds_what_trying_everything_finds(hbm):
    measure, calls = machine(hbm)
    log = Log(None)
    for _ in search(measure, log, largest_batch=64):
        pass
    assert len(calls) == len(set(calls)) <= 14
    fitting = [b for b in (1, 2, 4, 8, 16, 32, 64) if 10 * b <= hbm]
    assert (log.best.batch, log.best.remat) == exhaustive(measure, fitting[-2:])


def test_nothing_fits():
    measure, calls = machine(9)
    log = Log(None)
    assert [t.fits for t in search(measure, log)] == [False]
    assert log.best is None and calls == [(1, "full")]


def test_a_search_goes_on_where_it_was_interrupted(tmp_path):
    path = tmp_path / "search.jsonl"
    measure, calls = machine(100)
    steps = search(measure, Log(str(path)))
    for _ in range(3):
        next(steps)
    with path.open("a") as sink:
        sink.write('{"batch": 2, "rem')  # killed while writing
    again = Log(str(path))
    assert again.best.batch == 4
    list(search(measure, again))
    whole, fresh = machine(100)
    log = Log(None)
    list(search(whole, log))
    assert (again.best.batch, again.best.remat) == (log.best.batch, log.best.remat)
    assert sorted(calls) == sorted(fresh)
    heading, *tries = [json.loads(line) for line in path.read_text().splitlines()]
    assert heading["search"] and len(tries) == len(calls)


def test_the_log_of_another_search_is_refused(tmp_path):
    """Its tries are of another chip or model: taken over, they would be this search's answer."""
    path = tmp_path / "search.jsonl"
    asked = {"topology": "v5e:4x4", "model.d_model": 64, "model.windows": (1, None)}
    list(search(machine(100)[0], Log(str(path), asked)))
    before = path.read_text()
    assert Log(str(path), asked).best
    for other, sentence in (
        (asked | {"topology": "v6e:8x8"}, "topology is 'v5e:4x4' there and 'v6e:8x8' here"),
        (asked | {"--xla": {"a": "b"}}, "--xla is absent there and {'a': 'b'} here"),
        ({"topology": "v5e:4x4"}, "model.d_model is 64 there and absent here"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            Log(str(path), other)
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
def test_a_file_that_is_no_log_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=r"line [12] of .* is not one of a search log"):
        Log(str(path))
    assert path.read_text() == text


def test_a_log_that_cannot_be_written_is_refused_before_anything_is_compiled(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "x.jsonl"):
        with pytest.raises(UserError, match=r"search log .* cannot be used"):
            Log(str(path))


def test_every_rung_is_a_policy():
    assert set(RUNGS) <= set(REMAT)
