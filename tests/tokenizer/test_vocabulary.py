"""Vocabulary files: the same ranks from every format, and rejection of invalid files."""

import base64
import itertools
import json

import pytest
import tokenizers

from qwen_jax.errors import UserError
from qwen_jax.tokenizer import load_tokenizer
from qwen_jax.tokenizer.huggingface import byte_alphabet, byte_order
from qwen_jax.tokenizer.pretokenize import PATTERN
from qwen_jax.tokenizer.vocabulary import (
    QWEN_RANKS,
    QWEN_SHA256,
    canonical_sha256,
    read_vocabulary,
    tiktoken_text,
    write_tiktoken,
)

BYTES = [bytes([byte]) for byte in byte_order()]
SMALL = [*BYTES, b"ab", b"abc", "你".encode()[:2], "你".encode()]


def lines(ranks) -> list[bytes]:
    return tiktoken_text(ranks).splitlines()


def final_merge(token: bytes, rank_of: dict[bytes, int]) -> list[bytes]:
    """Returns the two tokens that merge into `token`, by its BPE with the ranks below its own."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [rank_of.get(a + b, len(rank_of)) for a, b in itertools.pairwise(parts)]
        i = joined.index(min(joined))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def huggingface_files(ranks, added) -> tuple[dict, list[str], dict]:
    """Returns (vocab, merges, tokenizer.json object) as in Qwen2's files."""
    shown = {byte: character for character, byte in byte_alphabet().items()}

    def spell(token: bytes) -> str:
        return "".join(shown[byte] for byte in token)

    rank_of = {token: rank for rank, token in enumerate(ranks)}
    merges = [
        " ".join(map(spell, final_merge(token, rank_of))) for token in ranks if len(token) > 1
    ]
    vocab = {spell(token): rank for rank, token in enumerate(ranks)}
    split = {
        "type": "Split",
        "pattern": {"Regex": PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    level["use_regex"] = False
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    document = {
        "version": "1.0",
        "added_tokens": [{**token, **flags} for token in added],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
    return vocab, merges, document


def qwen2_added(first: int) -> list[dict]:
    """Returns control tokens with names and flags of Qwen2.5, two of them new since v1."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<tool_call>"]
    return [
        {"id": first + i, "content": name, "special": name != "<tool_call>"}
        for i, name in enumerate(names)
    ]


def test_released_file_is_in_canonical_form(qwen_tiktoken):
    ranks = read_vocabulary(qwen_tiktoken).ranks
    assert len(ranks) == QWEN_RANKS
    assert tiktoken_text(ranks) == qwen_tiktoken.read_bytes()
    assert canonical_sha256(ranks) == QWEN_SHA256
    assert list(ranks[:256]) == BYTES


def test_line_order_and_endings_of_a_tiktoken_file_do_not_matter(tmp_path):
    shuffled = tmp_path / "shuffled.tiktoken"
    shuffled.write_bytes(b"\r\n".join(lines(SMALL)[::-1]) + b"\r\n\r\n")
    straight = tmp_path / "qwen.tiktoken"
    write_tiktoken(SMALL, straight)
    assert load_tokenizer(shuffled) == load_tokenizer(straight)
    assert load_tokenizer(shuffled).sha256 == load_tokenizer(tmp_path).sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "qwen.tiktoken",
        "shuffled.tiktoken",
    ]


def test_saved_tokenizer_loads_as_equal(tmp_path, byte_tokenizer):
    byte_tokenizer.save(tmp_path / "small.tiktoken")
    assert load_tokenizer(str(tmp_path)) == byte_tokenizer


@pytest.fixture(scope="module")
def qwen_as_huggingface(qwen):
    return huggingface_files(qwen.ranks, qwen2_added(qwen.n_ranks))


def test_tokenizer_json_gives_the_released_ranks(tmp_path, qwen, qwen_as_huggingface):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(qwen_as_huggingface[2]), encoding="utf-8")
    loaded = load_tokenizer(tmp_path)
    assert loaded.ranks == qwen.ranks and loaded.sha256 == QWEN_SHA256
    # The tokenizers library reads the file too and gives the same ids.
    peer = tokenizers.Tokenizer.from_file(str(path))
    for text in ("Hello, it's 2023!\n\n  def f(x):\n", "你好，通义千问 🙂", "Việt e\u0301 한국어"):
        assert peer.encode(text).ids == loaded.encode(text)
    # Later models rename some reserved tokens; ids and vocab_size do not change.
    assert loaded.vocab_size == qwen.vocab_size
    text = "<|object_ref_start|><tool_call>x<|im_end|>"
    ids = loaded.encode(text, allowed_special="all")
    assert ids == peer.encode(text).ids == [151_646, 151_647, 87, 151_645]
    assert loaded.decode(ids) == text
    assert loaded.decode(ids, skip_special_tokens=True) == peer.decode(ids) == "<tool_call>x"
    assert "<|extra_0|>" not in loaded.special_tokens
    assert loaded.special_tokens["<|extra_2|>"] == 151_648


def test_vocab_and_merges_give_the_released_ranks(tmp_path, qwen, qwen_as_huggingface):
    vocab, merges, _ = qwen_as_huggingface
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    assert load_tokenizer(tmp_path) == qwen
    named = {str(token["id"]): {**token, "lstrip": False} for token in qwen2_added(151_643)}
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"added_tokens_decoder": named}), encoding="utf-8")
    assert load_tokenizer(tmp_path).special_tokens["<tool_call>"] == 151_647
    # Merges in another order than the ranks would encode differently.
    merges = [*merges[1:], merges[0]]
    (tmp_path / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    with pytest.raises(UserError, match=r"merge 1, .* does not produce"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"merges.txt is missing"):
        load_tokenizer(tmp_path)


def test_folder_is_searched_in_documented_order(tmp_path):
    with pytest.raises(UserError, match=r"contains no vocabulary: looked for qwen\.tiktoken"):
        load_tokenizer(tmp_path)
    vocab, merges, document = huggingface_files(BYTES, [])
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    assert load_tokenizer(tmp_path).n_ranks == 256
    _, _, document = huggingface_files(SMALL[:257], [])
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    assert load_tokenizer(tmp_path).n_ranks == 257
    write_tiktoken(SMALL[:258], tmp_path / "a.tiktoken")
    assert load_tokenizer(tmp_path).n_ranks == 258
    write_tiktoken(SMALL, tmp_path / "b.tiktoken")
    with pytest.raises(UserError, match=r"contains 2 vocabularies \(a.tiktoken, b.tiktoken\)"):
        load_tokenizer(tmp_path)
    write_tiktoken(SMALL[:259], tmp_path / "qwen.tiktoken")
    assert load_tokenizer(tmp_path).n_ranks == 259


def test_missing_path_is_rejected_by_name(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.tiktoken does not exist: give a tiktoken file"):
        load_tokenizer(tmp_path / "nowhere.tiktoken")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:b2b1b8df\nsize 2561218\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"  \n", "is empty"),
        (LFS, "is a Git LFS pointer, not the file itself: run `git lfs pull`"),
        (b"<!DOCTYPE html>\n<html>", "is a web page, not a vocabulary"),
        (b'{"error": "Entry not found"}', "is JSON"),
        (b"\x80\x04\x95\x00binary", "line 1, is .* base64, a space, a rank"),
        (b"hello world\n", "line 1, is 'hello world'"),
    ],
    ids=["empty", "blank", "git lfs", "html", "json", "binary", "text"],
)
def test_other_file_types_are_recognised_and_rejected(tmp_path, content, message):
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def damaged(change) -> bytes:
    rows = lines(SMALL)
    change(rows)
    return b"\n".join(rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (damaged(lambda rows: rows.insert(9, b"YWI=")), "line 10, is 'YWI='"),
        (damaged(lambda rows: rows.insert(9, b"Y*I= 260")), r"line 10, is 'Y\*I= 260'"),
        (damaged(lambda rows: rows.insert(9, b"YWI= twelve")), "line 10, is 'YWI= twelve'"),
        (damaged(lambda rows: rows.append(b"eHl6 257")), "line 261, gives rank 257 a second time"),
        (damaged(lambda rows: rows.pop(100)), "has 259 tokens but none of rank 100"),
        (damaged(lambda rows: rows.append(b"eHl6 -5")), "none of rank 260"),
        (damaged(lambda rows: rows.append(b"YWI= 260")), "rank 260, b'ab', repeats rank 256"),
        (b"eHl6 0\nYWI= 1\n", r"lacks 256 of the 256 single bytes \(the first is 0x00\)"),
    ],
    ids=[
        "cut line",
        "not base64",
        "not a rank",
        "rank twice",
        "gap",
        "negative",
        "token twice",
        "no bytes",
    ],
)
def test_damaged_files_are_rejected_with_the_line(tmp_path, content, message):
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(path)


def change_json(change) -> dict:
    document = huggingface_files(SMALL, qwen2_added(260))[2]
    change(document)
    return document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([1], "is a JSON list"),
        ({"model": {"type": "Unigram"}}, "a model of type 'Unigram'"),
        ({}, "a model of type None"),
        (
            change_json(lambda d: d["model"]["merges"].pop()),
            "4 tokens .* but 3 merges",
        ),
        (change_json(lambda d: d["model"]["vocab"].update({"▁a": 260})), "the character '▁'"),
        (change_json(lambda d: d["model"]["vocab"].update({"xyz": 257})), "'xyz' the id 257"),
        (change_json(lambda d: d.update(pre_tokenizer=None)), "splits text by"),
        (
            change_json(
                lambda d: d["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(
                    Regex=r"\p{N}{1,3}"
                )
            ),
            "only the pattern of Qwen",
        ),
        (change_json(lambda d: d["added_tokens"][0].pop("content")), "KeyError: 'content'"),
        (change_json(lambda d: d["added_tokens"][0].update(id=9_999)), "has the id 9999"),
        (change_json(lambda d: d["added_tokens"][0].update(id=261)), "is that of '<.im_start.>'"),
        (change_json(lambda d: d["added_tokens"][3].update(content="<|extra_5|>")), "has two ids"),
    ],
)
def test_unsupported_tokenizer_json_is_rejected(tmp_path, document, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_tokenizer(path)


def test_git_lfs_pointer_as_tokenizer_json_is_rejected(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(LFS)
    with pytest.raises(UserError, match=r"tokenizer.json is not JSON.*Git LFS pointer"):
        load_tokenizer(tmp_path)


def test_invalid_vocabulary_is_not_written(tmp_path):
    path = tmp_path / "qwen.tiktoken"
    write_tiktoken(BYTES, path)
    with pytest.raises(UserError, match="lacks 1 of the 256 single bytes"):
        write_tiktoken(BYTES[1:], path)
    with pytest.raises(UserError, match="is not a folder"):
        write_tiktoken(BYTES, tmp_path / "no" / "qwen.tiktoken")
    assert path.read_bytes() == tiktoken_text(BYTES)
    assert [base64.b64decode(line.split()[0]) for line in path.read_bytes().splitlines()] == BYTES
    assert [file.name for file in tmp_path.iterdir()] == ["qwen.tiktoken"]
