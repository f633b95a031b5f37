"""launch.prepare: documents to readable packed data, and one sentence for bad input."""

import json
import subprocess
import sys

import pytest

from qwen_jax.corpus import Document, JsonLines, read_manifest, write_jsonl
from qwen_jax.data import Batches, DataConfig, eval_batches
from qwen_jax.tokenizer import Tokenizer, load_tokenizer
from qwen_jax.tokenizer.huggingface import byte_order


def prepare(*flags):
    """Runs launch.prepare with the flags."""
    return subprocess.run(
        [sys.executable, "-m", "launch.prepare", *flags], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """File of a vocabulary with the 256 bytes only."""
    path = tmp_path_factory.mktemp("vocabulary") / "bytes.tiktoken"
    Tokenizer(tuple(bytes([i]) for i in byte_order())).save(path)
    return path


def test_prepared_data_can_be_read_and_is_not_rewritten(tmp_path, vocabulary):
    documents = [Document(f"d{i}", f"Document number {i}, " * (i % 7 + 1)) for i in range(200)]
    write_jsonl(tmp_path / "web.jsonl.gz", documents)
    out = tmp_path / "data"
    corpus = f"--corpus=stdlib,{tmp_path}/web.jsonl.gz"
    flags = [corpus, f"--out={out}", "--heldout=0.2", "--stdlib_bytes=250000"]
    done = prepare(*flags)
    assert done.returncode == 0, done.stderr
    train, heldout = (
        list(JsonLines(out / "web" / f"{side}.jsonl")) for side in ("train", "heldout")
    )
    assert sorted([*train, *heldout], key=lambda d: int(d.id[1:])) == documents
    assert 20 < len(heldout) < 60

    flags += [f"--tokenizer={vocabulary}", "--seq_len=64", "--shards=2"]
    done = prepare(*flags)
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(vocabulary)
    sources = []
    for name in ("code", "prose", "web"):
        manifest = read_manifest(out / name / "train")
        assert len(manifest.shards) == 2 and manifest.tokenizer_sha256 == tokenizer.sha256
        sources.append(f"{out / name / 'train'}=1")
        held = sum(len(d.text.encode()) for d in JsonLines(out / name / "heldout.jsonl"))
        assert read_manifest(out / name / "heldout").text_bytes == held
        assert next(eval_batches(out / name / "heldout", 4))["tokens"].shape == (4, 64)
    reader = Batches(DataConfig(",".join(sources), 64, 12), tokenizer.sha256)
    texts = [tokenizer.decode(row.tolist()) for row in reader.rows(0)["tokens"]]
    assert sum("ocument number" in text for text in texts) == 4

    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.array_record")}
    again = prepare(*flags)
    assert again.returncode == 0 and again.stdout == done.stdout
    assert stamps == {path: path.stat().st_mtime_ns for path in out.rglob("*.array_record")}
    other = prepare(*flags, "--seed=1")
    assert other.returncode == 2
    assert other.stderr.strip().splitlines()[-1].startswith(f"error: {out}/code/train already")


def test_bad_input_is_one_sentence(tmp_path, vocabulary):
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "1", "text": "t"}) + "\n{\n")
    (tmp_path / "a.jsonl.gz").write_bytes(b"")
    out = f"--out={tmp_path}/out"
    for flags, message in [
        ([out], "--corpus is missing"),
        (["--corpus=stdlib"], "--out is missing"),
        ([f"--corpus={tmp_path}/none.jsonl", out], "none.jsonl is not a file"),
        ([f"--corpus={tmp_path}/a.jsonl,{tmp_path}/a.jsonl.gz", out], "two sources named 'a'"),
        ([f"--corpus={tmp_path}/a.jsonl", out, "--heldout=0"], "a.jsonl:2 is not JSON"),
        (["--corpus=stdlib", out, "--heldout=1.5"], "--heldout is 1.5"),
        (["--corpus=stdlib", out, f"--tokenizer={tmp_path}/no"], "error:"),
        (["--corpus=stdlib", out, "--seq_len=0"], "seq_len is 0"),
        (["stdlib", out], "'stdlib' is not a flag"),
    ]:
        done = prepare(*flags)
        assert done.returncode == 2, (flags, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert message in done.stderr.strip().splitlines()[-1], done.stderr
