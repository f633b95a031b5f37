"""launch.perplexity: both kinds of checkpoint, one device or a mesh, bad input."""

import dataclasses
import json

import matplotlib.image
import numpy as np
import pytest

from qwen_jax.corpus import Document, write_jsonl
from qwen_jax.tokenizer import Tokenizer
from qwen_jax.tokenizer.huggingface import byte_order
from tests import programs
from tests.interop.folders import V1, random_tensors, write

MODEL = dataclasses.replace(V1, vocab_size=512, trained_length=16)
TEXT = "Perplexity is measured on a text, and this is one; its words come again and again. " * 2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder with a model whose vocabulary is the 256 bytes, and three documents."""
    place = tmp_path_factory.mktemp("place")
    tensors = {k: 0.5 * t for k, t in random_tensors(MODEL).items()}
    folder = write(place / "hf", MODEL, tensors)
    Tokenizer(tuple(bytes([i]) for i in byte_order())).save(folder / "qwen.tiktoken")
    write_jsonl(place / "web.jsonl", [Document("a", TEXT), Document("b", "too short")])
    (place / "book.txt").write_text(TEXT[::-1])
    return place


def arguments(place, out, *more):
    """Returns the call of launch.perplexity that writes to folder `out`, with more flags."""
    return [
        "launch.perplexity", f"--checkpoint={place}/hf", f"--out={place}/{out}",
        f"--corpus={place}/web.jsonl,{place}/book.txt", "--dtype=float32", "--lengths=16,64",
        "--layers_per_window=1", "--modes=none,ntk+logn+window", *more,
    ]  # fmt: skip


def result(place, out):
    """Returns (mode, length) -> nll of each cell, and the JSON result, of folder `out`."""
    stored = json.loads((place / out / "perplexity.json").read_text())
    return {(c["mode"], c["length"]): c["nll"] for c in stored["cells"]}, stored


@pytest.mark.slow
def test_checkpoint_formats_and_meshes_give_the_same_table(place):
    native = [f"--checkpoint={place}/native", f"--tokenizer={place}/hf"]
    done = programs.run(
        [
            arguments(place, "hf-out"),
            ["launch.convert", f"--hf_dir={place}/hf", f"--out={place}/native"],
            arguments(
                place,
                "native-out",
                *native,
                "--cpu_devices=8",
                "--fsdp=2",
                "--context=2",
                "--tensor=2",
            ),
            arguments(place, "hf-out", "--trained_length=64"),
            arguments(place, "hf-out"),
        ]
    )
    assert [d.status for d in done] == [0] * 5, [d.output[-600:] for d in done if d.status]
    first, stored = result(place, "native-out")
    again, _ = result(place, "hf-out")
    assert first.keys() == again.keys() and len(first) == 4
    for cell, nll in first.items():
        assert again[cell] == pytest.approx(nll, rel=1e-4), cell
    assert first["none", 16] == first["ntk+logn+window", 16]
    assert abs(first["none", 64] - first["ntk+logn+window", 64]) > 1e-3 * first["none", 64]
    assert stored["documents"] == 2 and stored["tokens"] == stored["bytes"] == 2 * 128
    # With a trained length of 64 the modes have no effect; the last call computed no cells.
    assert "| ntk+logn+window |" in done[3].output
    rows = [r.split("|")[2:4] for r in done[3].output.splitlines() if r.startswith(("| n",))]
    assert rows[0] == rows[1]
    table = [line for line in done[0].output.splitlines() if line.startswith("|")]
    assert table == [line for line in done[4].output.splitlines() if line.startswith("|")]
    assert "loaded qwen" in done[0].output and "loaded qwen" not in done[4].output
    image = matplotlib.image.imread(place / "hf-out" / "perplexity.png")
    assert image.ndim == 3 and np.ptp(image) > 0
    assert not list(place.rglob("*.partial"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--corpus="], "--corpus is missing"),
        (["--checkpoint={place}/none"], "none does not exist"),
        (["--lengths=16,x"], "--lengths=16,x must be integers"),
        (["--lengths=16,20"], "lengths has 16, which does not divide the longest, 20"),
        (["--lengths=256"], "none of the 3 documents of --corpus has more than 256 tokens"),
        (["--modes=window,nkt"], "has 'nkt' (did you mean 'ntk'?)"),
        (["--tokenizer={place}/web.jsonl"], "web.jsonl"),
        (["--dtype=int8"], "options.dtype is 'int8'"),
        (["--documents=0"], "--documents is 0"),
        (["--step=3"], "is a Hugging Face folder, which has no steps"),
        (["--trained_length=1"], "trained_length is 1"),
        (["--tensor=3", "--cpu_devices=8"], "mesh.tensor=3 does not divide model.n_heads=4"),
        (["--tensor=2"], "needs 2 devices but there are 1"),
    ],
)
def test_bad_input_is_one_sentence(place, flags, message, refusals):
    done = refusals[tuple(flags)]
    assert done.status == 2, done.output
    assert done.last_line.startswith("error: ") and message in done.last_line
    assert "Traceback" not in done.output


@pytest.fixture(scope="module")
def refusals(place):
    """Flags -> how the program ended, for all cases of the test, run together."""
    marks = test_bad_input_is_one_sentence.pytestmark
    cases = [flags for mark in marks for flags, _ in mark.args[1]]
    calls = [
        arguments(place, "refused", *(f.format(place=place) for f in flags)) for flags in cases
    ]
    done = programs.run(calls)
    assert not (place / "refused").exists()
    return dict(zip(map(tuple, cases), done, strict=True))
