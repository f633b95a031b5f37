"""Documents to measure on, from every place that has some; one sentence where there are none."""

import pytest

from qwen_jax.corpus import Document, PackConfig, write_jsonl
from qwen_jax.corpus.prepare import pack_source
from qwen_jax.corpus.texts import read_texts
from qwen_jax.errors import UserError
from tests.byte_tokenizer import ByteTokenizer

TEXTS = [Document("a", "Ein Wort.\u2028Noch eins.\n", "web"), Document("b", "東京" * 5, "web")]


def test_documents_are_read_from_every_supported_format(tmp_path):
    write_jsonl(tmp_path / "web.jsonl.gz", TEXTS)
    write_jsonl(tmp_path / "web.jsonl", TEXTS)
    pack_source(
        tmp_path / "data" / "web",
        {"train": [Document("c", "other")], "heldout": TEXTS},
        ByteTokenizer(),
        PackConfig(4),
    )
    for place in ("web.jsonl.gz", "web.jsonl", "data/web/heldout", "data/web"):
        assert list(read_texts(tmp_path / place)) == TEXTS, place
    (tmp_path / "book.txt").write_text(TEXTS[0].text, encoding="utf-8")
    assert list(read_texts(tmp_path / "book.txt")) == [Document("book.txt", TEXTS[0].text)]


def test_missing_or_unsupported_paths_are_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "folder").mkdir()
    for place, message in (
        ("latin.txt", r"latin.txt is not UTF-8 \(byte 2\)"),
        ("folder", "folder is a folder without heldout.jsonl"),
        ("nothing.txt", "nothing.txt does not exist"),
        ("nothing.jsonl", "nothing.jsonl is not a file"),
    ):
        with pytest.raises(UserError, match=message):
            list(read_texts(tmp_path / place))
