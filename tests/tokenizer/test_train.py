"""Vocabulary training: exact BPE, parity with a public trainer, agreement with the encoder."""

import collections
import itertools
import json
import random
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import regex
import tokenizers

from qwen_jax.errors import UserError
from qwen_jax.tokenizer import Tokenizer, load_tokenizer
from qwen_jax.tokenizer.huggingface import byte_order
from qwen_jax.tokenizer.pretokenize import PATTERN
from qwen_jax.tokenizer.train import (
    JsonlTexts,
    count_pretokens,
    merge_pretokens,
    train_bpe,
    without_long_numbers,
)

BYTES = [bytes([byte]) for byte in byte_order()]


def segment(word: bytes, rank_of: dict[bytes, int], below: int) -> list[bytes]:
    """Encodes a word as tiktoken does with ranks < `below`: lowest rank first, then leftmost."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while len(parts) > 1:
        joined = [rank_of.get(a + b, below) for a, b in itertools.pairwise(parts)]
        lowest = min(joined)
        if lowest >= below:
            break
        i = joined.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def unreachable(ranks: list[bytes]) -> list[bytes]:
    """Returns the tokens whose bytes the vocabulary's own merges do not encode as that token."""
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    return [token for token in ranks if segment(token, rank_of, len(ranks)) != [token]]


def train_naively(texts: list[str], vocab_size: int, min_count: int = 2) -> list[bytes]:
    """Trains by recounting all pairs after each merge, on the segmentation of the encoder."""
    words = collections.Counter(w for text in texts for w in regex.findall(PATTERN, text))
    ranks = list(BYTES)
    while len(ranks) < vocab_size:
        rank_of = {token: rank for rank, token in enumerate(ranks)}
        counts: collections.Counter[bytes] = collections.Counter()
        for word, count in words.items():
            for a, b in itertools.pairwise(segment(word.encode(), rank_of, len(ranks))):
                counts[a + b] += count
        best = min(counts, key=lambda joined: (-counts[joined], joined), default=b"")
        if counts[best] < min_count:
            break
        ranks.append(best)
    return ranks


@pytest.fixture(scope="module")
def corpus() -> tuple[list[str], list[str]]:
    """The standard library's sources: about 2 MB for training, 0.3 MB held out."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    return texts[::2][:80], texts[1::2][:15]


@pytest.fixture(scope="module")
def trained(corpus) -> list[bytes]:
    return train_bpe(corpus[0], 2_256)


@pytest.mark.parametrize("seed", range(6))
def test_training_equals_a_naive_reference(seed):
    generator = random.Random(seed)
    # Few letters and long words: overlaps such as aaa, ties and many ways to spell a token.
    letters = ["ab", "abc", "aé ", "你们 a\n", "01 a", "ab' \n"][seed]
    texts = ["".join(generator.choices(letters, k=generator.randrange(30))) for _ in range(120)]
    assert train_bpe(texts, 320) == train_naively(texts, 320)


def test_every_trained_token_is_reachable(trained):
    assert len(trained) == len(set(trained)) == 2_256
    assert trained[:256] == BYTES
    assert unreachable(trained) == []


def test_compression_matches_a_public_trainer(corpus, trained):
    train, held_out = corpus
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=2_256, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    peer.train_from_iterator(train, trainer)
    ours = Tokenizer(tuple(trained))
    theirs = sum(len(encoding.ids) for encoding in peer.encode_batch(held_out))
    mine = sum(len(ids) for ids in ours.encode_batch(held_out))
    assert abs(mine / theirs - 1) < 1e-3
    shown = {i: peer.id_to_token(i) for i in range(peer.get_vocab_size())}
    same = {tokenizers.decoders.ByteLevel().decode([text]) for text in shown.values()}
    common = sum(token.decode("utf-8", "replace") in same for token in trained)
    assert common > 0.99 * len(trained)


def test_training_does_not_depend_on_document_order(corpus):
    texts = corpus[0][:20]
    assert train_bpe(texts, 700) == train_bpe(texts[::-1], 700) == train_bpe(iter(texts), 700)


def test_trained_tokens_contain_no_digits(trained):
    for token in trained[256:]:
        text = token.decode("utf-8", "replace")
        assert not regex.search(r"\p{N}", text)
    assert train_bpe(["2023 2023 2023"], 300) == BYTES


def test_training_text_is_normalised_to_nfc():
    assert train_bpe(["e\u0301 e\u0301"], 257) == train_bpe(["é é"], 257)
    assert train_bpe(["e\u0301 e\u0301"], 257)[256] == "é".encode()


def test_training_handles_very_long_words_and_whitespace():
    ranks = train_bpe(["a" * 300_000, " " * 1_000_000], 300)
    assert b"a" * 64 in ranks and b" " * 64 in ranks


def test_resumed_training_equals_one_run(corpus, trained):
    half = merge_pretokens(count_pretokens(corpus[0]), 1_000)
    assert half == trained[:1_000]
    assert train_bpe(corpus[0], 2_256, base=half) == trained


def test_released_vocabulary_can_be_extended(qwen):
    texts = ["ᚠᛇᚻ ᛒᛦᚦ ᚠᚱᚩᚠᚢᚱ ᚠᛁᚱᚪ ᚷᛖᚻᚹᛦᛚᚳᚢᛗ", "ᛋᚳᛖᚪᛚ ᚦᛖᚪᚻ ᛗᚪᚾᚾᚪ ᚷᛖᚻᚹᛦᛚᚳ ᚠᛖᚻ"]
    ranks = train_bpe(texts, qwen.n_ranks + 20, base=qwen.ranks)
    extended = Tokenizer(tuple(ranks))
    assert tuple(ranks[: qwen.n_ranks]) == qwen.ranks
    assert extended.n_ranks == qwen.n_ranks + 20 == extended.eod_id
    assert len(extended.encode(texts[0])) < 0.8 * len(qwen.encode(texts[0]))
    assert extended.encode("Hello, 你好!") == qwen.encode("Hello, 你好!")
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    for token in ranks[qwen.n_ranks :]:
        assert segment(token, rank_of, len(ranks)) == [token]


def test_without_long_numbers_drops_multi_digit_tokens_only(qwen):
    numbers = [b"%02d" % i for i in range(100)]
    assert without_long_numbers([*BYTES, *numbers, b"ab", b"a1"]) == [*BYTES, b"ab", b"a1"]
    assert without_long_numbers(qwen.ranks) == list(qwen.ranks)


def test_training_stops_below_min_count_with_a_warning(caplog):
    assert train_bpe(["ab ab cd"], 5_000) == [*BYTES, b"ab"]
    assert train_bpe(["ab ab cd"], 5_000, min_count=1)[256:] == [b"ab", b" ab", b" c", b" cd"]
    assert "no other pair occurs 2 times" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 300), "no text to train"),
        (([""], 300), "no text to train"),
        ((["a"], 255), "vocab_size is 255: it must be at least the 256 single bytes"),
    ],
)
def test_invalid_training_arguments_are_rejected(arguments, message):
    with pytest.raises(UserError, match=message):
        train_bpe(*arguments)
    with pytest.raises(UserError, match="min_count is 0"):
        train_bpe(["a"], 300, min_count=0)
    with pytest.raises(UserError, match="at least the 256 ranks of the base"):
        train_bpe(["a"], 10, base=BYTES)
    with pytest.raises(UserError, match="lacks 255 of the 256"):
        train_bpe(["a"], 300, base=[b"a"])


def write_jsonl(path: Path, documents: list) -> Path:
    path.write_text("".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents), "utf-8")
    return path


def test_jsonl_documents_end_at_newlines_only(tmp_path):
    texts = ["one\u2028two\x85three\x0bfour", "five\r\nsix", ""]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    path.write_bytes(path.read_bytes() + b"\n  \n" + b'{"text": "no newline at the end"}')
    read = JsonlTexts((str(path), str(path)))
    assert list(read) == [*texts, "no newline at the end"] * 2
    assert list(read) == list(read)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{oops}", "a.jsonl, line 2, is not JSON"),
        (b"\xff\xfe{", "a.jsonl, line 2, is not JSON"),
        (b"[1]", "line 2, is a JSON list"),
        (b'{"texts": "x"}', r"no field 'text' \(did you mean 'texts'\?\)"),
        (b"{}", "it has none"),
        (b'{"text": 3}', "field 'text' is a int"),
    ],
)
def test_invalid_jsonl_lines_are_rejected_by_number(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        list(JsonlTexts((str(path),)))


def launch(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.train_tokenizer", *arguments]
    root = Path(__file__).parents[2]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)


def test_program_writes_a_loadable_vocabulary_and_does_not_overwrite(tmp_path, corpus):
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in corpus[0][:10]])
    second = write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in corpus[0][10:20]])
    output = tmp_path / "qwen.tiktoken"
    arguments = (f"--input={first},{second}", "--vocab_size=700", f"--output={output}")
    done = launch(*arguments)
    assert done.returncode == 0, done.stderr
    assert list(load_tokenizer(tmp_path).ranks) == train_bpe(corpus[0][:20], 700)
    assert "700 ranks and 908 ids" in done.stdout
    # An existing vocabulary is not replaced.
    before = output.read_bytes()
    again = launch(*arguments[:1], "--vocab_size=300", f"--output={output}")
    assert again.returncode == 2 and "already exists" in again.stderr
    assert output.read_bytes() == before


def test_program_prints_a_one_line_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"txt": 1}\n')
    done = launch(f"--input={path}", f"--output={tmp_path / 'x.tiktoken'}")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {path}, line 2, has no field 'text'")
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_trained_segmentation_equals_the_encoder(corpus, trained):
    """tiktoken splits each of over 15,000 words like the reference `segment`."""
    tokenizer = Tokenizer(tuple(trained))
    rank_of = {token: rank for rank, token in enumerate(trained)}
    words = count_pretokens(corpus[0])
    assert len(words) > 15_000
    for word in words:
        pieces = segment(word.encode(), rank_of, len(trained))
        assert tokenizer.encode(word) == [rank_of[piece] for piece in pieces]
    total = sum(np.asarray(list(words.values())))
    assert total == sum(len(regex.findall(PATTERN, text)) for text in corpus[0])
