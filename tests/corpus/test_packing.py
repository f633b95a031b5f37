"""Packing equals a naive reference, survives being killed, and refuses what does not fit."""

import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from array_record.python import array_record_module
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.corpus import packing
from qwen_jax.corpus.documents import Document
from qwen_jax.corpus.packing import PackConfig, pack
from qwen_jax.corpus.records import cut_windows, decode_windows, read_manifest
from qwen_jax.errors import UserError
from tests.byte_tokenizer import ByteTokenizer

EOD = ByteTokenizer.eod_id


def corpus(count=60, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Document(f"doc{i}", "".join(rng.choice(list("ab  é通\n"), rng.integers(1, 90))))
        for i in range(count)
    ]


def read(folder):
    """(manifest, decoded windows of all shards in order)."""
    manifest = read_manifest(folder)
    records = []
    for shard in manifest.shards:
        path = pathlib.Path(folder) / shard.file
        data = path.read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
        reader = array_record_module.ArrayRecordReader(str(path))
        records += reader.read_all()
        reader.close()
    return manifest, decode_windows(records, manifest.seq_len)


def naive(documents, seq_len):
    """The definition, token by token: stream, document of each token, then windows."""
    stream, owner, first = [], [], []
    for number, tokens in enumerate(documents):
        for place, token in enumerate([*tokens, EOD]):
            stream.append(token)
            owner.append(number)
            first.append(place == 0)
    windows = []
    for start in range(0, len(stream) - 1, seq_len):
        row_tokens, row_segments, row_mask = [], [], []
        for position in range(start, start + seq_len + 1):
            inside = position < len(stream)
            row_tokens.append(stream[position] if inside else EOD)
            row_segments.append(owner[position] - owner[start] + 1 if inside else 0)
            if position > start:
                row_mask.append(int(inside and not first[position]))
        windows.append((row_tokens, row_segments, row_mask))
    return windows


documents_strategy = st.lists(
    st.lists(st.integers(0, 255), min_size=1, max_size=12), min_size=1, max_size=12
)


@settings(max_examples=300, deadline=None)
@given(documents_strategy, st.integers(1, 9))
def test_windows_equal_a_direct_implementation_of_the_definition(documents, seq_len):
    arrays = [np.array(tokens, np.uint32) for tokens in documents]
    found = [(t.tolist(), s.tolist(), m.tolist()) for t, s, m in cut_windows(arrays, seq_len, EOD)]
    assert found == naive(documents, seq_len)


@settings(max_examples=300, deadline=None)
@given(documents_strategy, st.integers(1, 9))
def test_every_token_is_predicted_exactly_once(documents, seq_len):
    """Trained targets, in order, are each document's tokens but its first, and its end."""
    arrays = [np.array(tokens, np.uint32) for tokens in documents]
    windows = list(cut_windows(arrays, seq_len, EOD))
    trained = [int(t) for tokens, _, mask in windows for t in tokens[1:][mask == 1]]
    assert trained == [t for tokens in documents for t in [*tokens[1:], EOD]]
    targets = [int(t) for tokens, segments, _ in windows for t in tokens[1:][segments[1:] > 0]]
    assert targets == [t for tokens in documents for t in [*tokens, EOD]][1:]


def test_manifest_counts_match_the_documents_and_windows(tmp_path):
    documents, tokenizer = corpus(), ByteTokenizer()
    manifest = pack(documents, tmp_path / "out", tokenizer, PackConfig(seq_len=32, shards=3))
    again, windows = read(tmp_path / "out")
    assert manifest == again and len(manifest.shards) == 3
    stream = np.concatenate([windows.tokens[:1, 0], windows.tokens[:, 1:].ravel()])
    stream = stream[: manifest.tokens].tolist()
    assert stream.pop() == EOD
    texts = [[]]
    for token in stream:
        texts.append([]) if token == EOD else texts[-1].append(token)
    decoded = [tokenizer.decode(tokens) for tokens in texts]
    assert sorted(decoded) == sorted(document.text for document in documents)
    assert decoded != [document.text for document in documents], "not shuffled"
    # The stored windows are the definition applied to that order.
    rows = naive([tokenizer.encode(text) for text in decoded], 32)
    assert windows.tokens.tolist() == [row[0] for row in rows]
    assert windows.segment_ids.tolist() == [row[1] for row in rows]
    assert windows.loss_mask.tolist() == [row[2] for row in rows]
    lengths = tokenizer.token_lengths
    for row in range(len(rows)):
        trained = windows.tokens[row, 1:][windows.loss_mask[row] == 1]
        assert windows.n_bytes[row] == sum(lengths[token] for token in trained)
    first_bytes = sum(int(lengths[tokenizer.encode(text)[0]]) for text in decoded)
    assert manifest.target_bytes == manifest.text_bytes - first_bytes
    assert manifest.target_tokens == manifest.tokens - len(documents)
    assert manifest.windows == len(rows)
    assert not (tmp_path / "out.partial").exists()


def test_order_depends_on_ids_and_seed_only(tmp_path):
    """Input order, run size and sharding do not move a token; another seed does."""
    documents, tokenizer = corpus(), ByteTokenizer()
    config = PackConfig(seq_len=16)
    pack(documents, tmp_path / "a", tokenizer, config)
    pack(documents[::-1], tmp_path / "b", tokenizer, PackConfig(seq_len=16, run_bytes=100))
    pack(documents, tmp_path / "c", tokenizer, PackConfig(seq_len=16, shards=7))
    pack(documents, tmp_path / "d", tokenizer, PackConfig(seq_len=16, seed=1))
    assert read_manifest(tmp_path / "a") == read_manifest(tmp_path / "b")  # Bytes: sha256 inside.
    tokens = {name: read(tmp_path / name)[1].tokens for name in "abcd"}
    np.testing.assert_array_equal(tokens["a"], tokens["c"])
    assert (tokens["a"] != tokens["d"]).any()


def test_equal_packing_is_reused_and_different_packing_refused(tmp_path):
    documents, config = corpus(), PackConfig(seq_len=32, shards=2)
    out = tmp_path / "out"
    first = pack(documents, out, ByteTokenizer(), config)
    stamp = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    tokenizer = ByteTokenizer()
    assert pack(documents[::-1], out, tokenizer, config) == first
    assert tokenizer.encoded_texts == 0
    changed = [*documents[:-1], Document(documents[-1].id, documents[-1].text[::-1] + "b")]
    for documents_2, tokenizer_2, config_2, message in [
        (documents, ByteTokenizer(), PackConfig(seq_len=16, shards=2), "seq_len is 32, not 16"),
        (documents, ByteTokenizer(), PackConfig(seq_len=32, seed=5, shards=2), "seed is 0, not 5"),
        (documents, ByteTokenizer(), PackConfig(seq_len=32, shards=3), "shards is 2, not 3"),
        (documents, ByteTokenizer("x"), config, "tokenizer_sha256 is 'bytes"),
        (changed, ByteTokenizer(), config, "documents_digest is"),
    ]:
        with pytest.raises(UserError, match=message):
            pack(documents_2, out, tokenizer_2, config_2)
    assert stamp == {path: path.stat().st_mtime_ns for path in out.iterdir()}


class Killed(BaseException):
    """Stands for the process ending at this point."""


def test_interrupted_packing_leaves_no_output_and_resumes(tmp_path, monkeypatch):
    documents = corpus()
    config = PackConfig(seq_len=32, shards=3, run_bytes=800)
    whole = pack(documents, tmp_path / "whole", ByteTokenizer(), config)
    real = {name: getattr(os, name) for name in ("fsync", "replace")}
    calls = {"count": 0, "limit": 10**9}

    def counted(name):
        def call(*args):
            calls["count"] += 1
            if calls["count"] > calls["limit"]:
                raise Killed
            return real[name](*args)

        return call

    for name in real:
        monkeypatch.setattr(os, name, counted(name))
    pack(documents, tmp_path / "count", ByteTokenizer(), config)
    steps = calls["count"]
    assert steps > 20
    reused = []
    for limit in range(steps):
        out = tmp_path / f"kill{limit}"
        calls.update(count=0, limit=limit)
        with pytest.raises(Killed):
            pack(documents, out, ByteTokenizer(), config)
        if out.exists():  # Only after the rename, and then it is complete.
            assert read(out)[0] == whole
        calls.update(count=0, limit=10**9)
        tokenizer = ByteTokenizer()
        assert pack(documents, out, tokenizer, config) == whole
        assert not out.with_name(out.name + ".partial").exists()
        reused.append(len(documents) - tokenizer.encoded_texts)
    assert reused == sorted(reused) and reused[0] == 0 and reused[-1] == len(documents)
    assert len(set(reused)) > 4, "finished runs are not reused"


def test_partial_results_of_other_inputs_are_not_reused(tmp_path, monkeypatch):
    config = PackConfig(seq_len=32, run_bytes=800)
    out = tmp_path / "out"

    def killed(*args):
        raise Killed

    for documents in (corpus(seed=1), corpus()[::-1]):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(packing, "_merge", killed)
            pack(documents, out, ByteTokenizer(), config)
    small = PackConfig(seq_len=32, run_bytes=5000)
    assert pack(corpus(), out, ByteTokenizer(), small) == pack(
        corpus(), tmp_path / "fresh", ByteTokenizer(), small
    )


def test_packing_resumes_after_sigkill(tmp_path):
    """A real process, a real SIGKILL while it tokenises, and a second one that goes on."""
    program = """
import sys, time
from qwen_jax.corpus.packing import PackConfig, pack
from tests.byte_tokenizer import ByteTokenizer
from tests.corpus.test_packing import corpus

class Slow(ByteTokenizer):
    def encode_batch(self, texts):
        time.sleep(float(sys.argv[2]))
        return super().encode_batch(texts)

tokenizer = Slow()
pack(corpus(), sys.argv[1], tokenizer, PackConfig(seq_len=32, run_bytes=400))
print(tokenizer.encoded_texts)
"""
    out = tmp_path / "out"
    command = [sys.executable, "-c", program, str(out)]
    process = subprocess.Popen([*command, "0.3"], stdout=subprocess.PIPE)
    deadline = time.time() + 60
    while len(list(tmp_path.glob("out.partial/run-*.json"))) < 2 and time.time() < deadline:
        time.sleep(0.02)
    with pytest.raises(UserError, match="Another process is packing"):
        pack(corpus(), out, ByteTokenizer(), PackConfig(seq_len=32, run_bytes=400))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists() and (tmp_path / "out.partial").exists()
    encoded = int(subprocess.check_output([*command, "0"]))
    assert 0 < encoded < len(corpus())
    want = pack(corpus(), tmp_path / "whole", ByteTokenizer(), PackConfig(seq_len=32))
    assert read(out)[0] == want


def test_empty_texts_are_counted_and_tiny_corpora_are_packed(tmp_path):
    documents = [Document("a", ""), Document("b", "x"), Document("c", "")]
    manifest = pack(documents, tmp_path / "out", ByteTokenizer(), PackConfig(seq_len=8, shards=4))
    assert (manifest.documents, manifest.empty_documents, manifest.windows) == (1, 2, 1)
    assert len(manifest.shards) == 1
    _, windows = read(tmp_path / "out")
    assert windows.tokens.tolist() == [[ord("x")] + [EOD] * 8]
    assert windows.loss_mask.tolist() == [[1] + [0] * 7]
    assert windows.segment_ids.tolist() == [[1, 1] + [0] * 7]
    assert windows.n_bytes.tolist() == [0]
    # Asked again for four shards, the one there is is the same.
    assert pack(documents, tmp_path / "out", ByteTokenizer(), PackConfig(8, shards=4)) == manifest


def test_bad_input_is_refused(tmp_path):
    config = PackConfig(seq_len=8)
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no documents"):
        pack([], out, ByteTokenizer(), config)
    with pytest.raises(UserError, match="have no tokens"):
        pack([Document("a", "")], out, ByteTokenizer(), config)
    for run_bytes in (1, 1 << 20):  # Within a run and across runs.
        with pytest.raises(UserError, match="id 'twice' occurs more than once"):
            documents = [Document("twice", "a"), Document("b", "b"), Document("twice", "c")]
            pack(documents, out, ByteTokenizer(), PackConfig(seq_len=8, run_bytes=run_bytes))

    class Parses(ByteTokenizer):
        def encode(self, text):
            return [EOD if char == "!" else ord(char) for char in text]

    with pytest.raises(UserError, match="'bad' encodes to the end-of-document token"):
        pack([Document("ok", "a"), Document("bad", "a!")], out, Parses(), config)
    with pytest.raises(UserError, match="seq_len is 0"):
        PackConfig(seq_len=0)
    with pytest.raises(TypeError, match="only once"):
        pack(iter(corpus()), out, ByteTokenizer(), config)
    assert not out.exists()
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not a packed data folder"):
        pack(corpus(), out, ByteTokenizer(), config)
    assert (out / "thesis.txt").read_text() == "precious"


def test_damaged_output_is_refused_and_not_overwritten(tmp_path):
    out, config = tmp_path / "out", PackConfig(seq_len=8)
    manifest = pack(corpus(), out, ByteTokenizer(), config)
    shard = out / manifest.shards[0].file
    whole = shard.read_bytes()
    flipped = bytearray(whole)
    flipped[200] ^= 1
    shard.write_bytes(flipped)
    with pytest.raises(UserError, match="differs from the SHA-256"):
        pack(corpus(), out, ByteTokenizer(), config)
    shard.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="bytes, but its manifest says"):
        pack(corpus(), out, ByteTokenizer(), config)
    fields = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(fields | {"format": "other"}))
    with pytest.raises(UserError, match="has format 'other'"):
        read_manifest(out)
    (out / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        read_manifest(out)
