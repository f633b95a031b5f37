"""The report page: self-contained and escaped, with labels that never overlap."""

import base64
import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.train.report import (
    Sample,
    TrainingReport,
    render,
    score_table,
    series,
    smoothed,
    spread,
)

SCORES = {
    "model": {"code": 1.5, "prose": 2.5},
    "gzip": {"code": 2.0, "prose": 2.25},
    "xz": {"code": 1.5, "prose": 2.75},
}


def report(**change) -> TrainingReport:
    metrics = [{"step": s, "loss": 5 - s / 9, "lr": 0.1, "grad_norm": 1.0} for s in range(1, 9)]
    metrics += [
        {"step": s, "eval/code/bits_per_byte": 3.0 - s / 9, "eval/prose/bits_per_byte": 4.0}
        for s in (4, 8)
    ]
    fields = {
        "title": "A title",
        "summary": "A sentence.",
        "facts": {"parameters": "3.4M"},
        "scores": SCORES,
        "notes": {name: f"what {name} counts" for name in SCORES},
        "metrics": metrics,
        "samples": [Sample("def f(", {"greedy": "self):", "sampled": "x):"})],
        "config": '{"seed": 0}',
    }
    return TrainingReport(**(fields | change))


def test_generated_text_is_escaped():
    hostile = "</pre><script>alert('x')</script><img src=x onerror=alert(1)>&amp;"
    page = render(report(samples=[Sample(hostile, {hostile: hostile})]))
    assert "<script" not in page and "<img src=x" not in page
    assert page.count("&lt;script&gt;") == 3 and "&amp;amp;" in page


def test_page_has_no_outside_resources_and_every_plot_is_an_inline_image():
    page = render(report())
    images = re.findall(r'src="([^"]*)"', page)
    assert len(images) == 5
    for image in images:
        prefix, _, data = image.partition(",")
        assert prefix == "data:image/svg+xml;base64"
        svg = base64.b64decode(data)
        assert ElementTree.fromstring(svg).tag.endswith("svg") and len(svg) > 5000
    rest = re.sub(r'src="data:[^"]*"', "", page)
    assert not re.search(r"https?://|url\(|@import|<link|<script|href=", rest)
    assert render(report()) == page
    assert render(report(metrics=report().metrics[3:])) != page


def test_the_lowest_score_of_each_column_is_marked():
    page = render(report())
    rows = re.findall(r"<tr.*?</tr>", page, re.DOTALL)[1:]
    marked = [[bool(cell) for cell in re.findall(r"<span( class=\"best\")?>", r)] for r in rows]
    assert marked == [[True, False], [False, True], [True, False]]
    for (name, row), html in zip(SCORES.items(), rows, strict=True):
        assert name in html and f"what {name} counts" in html
        assert all(f"{value:.3f}" in html for value in row.values())
    assert score_table(SCORES) == "\n".join(
        [
            "bits per byte, held out      code     prose",
            "model                      1.500*    2.500 ",
            "gzip                       2.000     2.250*",
            "xz                         1.500*    2.750 ",
        ]
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=8), st.floats(0.01, 2))
def test_labels_keep_their_distance_and_order(values, gap):
    places = spread(values, gap)
    ordered = sorted(places)
    assert all(b - a > gap * (1 - 1e-6) for a, b in itertools.pairwise(ordered))
    by_value = sorted(range(len(values)), key=lambda i: (values[i], places[i]))
    assert [places[i] for i in by_value] == ordered
    # Labels move only as needed: the mean is kept, and labels far apart are not moved.
    assert math.isclose(sum(places), sum(values), abs_tol=1e-6)
    if all(b - a > gap for a, b in itertools.pairwise(sorted(values))):
        assert places == values


def test_smoothing_keeps_a_line_and_damps_noise():
    line = [3.0 - 0.25 * i for i in range(20)]
    assert smoothed(line) == pytest.approx(line)
    assert smoothed([0.0, 1.0] * 20, radius=1)[20] == pytest.approx(2 / 3)
    assert series([{"step": 1, "a": 2.0}, {"step": 2}, {"step": 3, "a": 4.0}], "a") == (
        [1, 3],
        [2.0, 4.0],
    )
