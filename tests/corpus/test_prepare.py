"""Sources are written whole, found again and never replaced; a bad one is refused up front."""

import pytest

from qwen_jax.corpus import Document, JsonLines, PackConfig, write_jsonl
from qwen_jax.corpus.prepare import jsonl_source, pack_source, stdlib_sources, write_source
from qwen_jax.errors import UserError
from tests.byte_tokenizer import ByteTokenizer

DOCUMENTS = [Document(f"d{i}", f"text number {i}") for i in range(50)]


def test_both_sides_are_written_and_packed_once(tmp_path):
    write_jsonl(tmp_path / "web.jsonl.gz", DOCUMENTS)
    (name, sides), *others = jsonl_source(tmp_path / "web.jsonl.gz", heldout=0.3, seed=1).items()
    assert name == "web" and not others
    counts = write_source(tmp_path / "out", sides)
    assert set(counts) == {"train", "heldout"} and sum(counts.values()) == 50
    assert 0 < counts["heldout"] < counts["train"]
    read = [d for side in counts for d in JsonLines(tmp_path / "out" / f"{side}.jsonl")]
    assert sorted(read, key=lambda d: int(d.id[1:])) == DOCUMENTS
    assert write_source(tmp_path / "out", sides) == counts
    manifests = pack_source(tmp_path / "out", sides, ByteTokenizer(), PackConfig(32, shards=3))
    assert [m.documents for m in manifests.values()] == list(counts.values())
    assert [len(m.shards) for m in manifests.values()] == [3, 1]

    other = jsonl_source(tmp_path / "web.jsonl.gz", heldout=0.3, seed=2)["web"]
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"train\.jsonl already contains other documents"):
        write_source(tmp_path / "out", other)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_empty_side_is_refused_before_anything_is_written(tmp_path):
    sides = {"train": DOCUMENTS, "heldout": []}
    for write in (write_source, lambda *a: pack_source(*a, ByteTokenizer(), PackConfig(32))):
        with pytest.raises(UserError, match="heldout side of out has no documents"):
            write(tmp_path / "out", sides)
        assert not (tmp_path / "out").exists()


def test_without_held_out_share_there_is_only_the_training_side():
    sources = stdlib_sources(heldout=0.0, seed=0, max_bytes=100_000)
    assert set(sources) == {"code", "prose"}
    assert all(set(sides) == {"train"} for sides in sources.values())
