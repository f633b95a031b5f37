"""A result is computed once for its key, and a broken file is no result."""

import json

import pytest

from qwen_jax.artifact import once, write_text


def test_result_is_computed_once_per_key(tmp_path):
    path, calls = tmp_path / "folder" / "result.json", []

    def compute():
        calls.append(1)
        return {"n": len(calls), "pair": (0.1, "é")}

    first = once(path, {"seed": 0, "names": ("a", "b")}, compute)
    assert first == {"n": 1, "pair": [0.1, "é"]}
    assert once(path, {"names": ["a", "b"], "seed": 0}, compute) == first
    assert once(path, {"seed": 1}, compute)["n"] == 2
    assert once(path, {"seed": 0, "names": ("a", "b")}, compute)["n"] == 3
    text = path.read_text()
    for broken in (text[: len(text) // 2], "[]", "", '{"key": {}}', "\udcff"):
        path.write_bytes(broken.encode("utf-8", "surrogateescape"))
        before = len(calls)
        assert once(path, {"seed": 0}, compute)["n"] == before + 1 == len(calls)
    assert json.loads(path.read_text())["key"] == {"seed": 0}


def test_failed_computation_keeps_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    once(path, {"a": 1}, lambda: 5)

    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        once(path, {"a": 2}, fail)
    assert once(path, {"a": 1}, fail) == 5
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert once(path, {"a": 1}, fail) == 5
