"""Incremental text joined equals the full decode up to the first stop string, for any split."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.errors import UserError
from qwen_jax.generate.detokenizer import StreamDecoder
from qwen_jax.tokenizer import Tokenizer

# All bytes, and merges such that stop strings begin and end inside tokens.
MERGES = (
    b"ab",
    b"ba",
    b"abc",
    b"bc",
    "é".encode(),
    "你".encode()[:2],
    "你".encode(),
    b"\n\n",
    b"aa",
)
TOKENIZER = Tokenizer((*(bytes([i]) for i in range(256)), *MERGES))
SPECIAL = [TOKENIZER.eod_id, TOKENIZER.im_start_id, TOKENIZER.vocab_size + 3]

# Mostly a small alphabet, so that stop strings occur; also any byte, merges, control tokens.
IDS = st.lists(
    st.one_of(
        st.sampled_from([*b"abc\n"]),
        st.integers(256, 256 + len(MERGES) - 1),
        st.sampled_from([*"你é😀".encode()]),
        st.integers(0, 255),
        st.sampled_from(SPECIAL),
    ),
    max_size=40,
)
STOPS = st.lists(
    st.one_of(
        st.text("abc", min_size=1, max_size=5),
        st.text("ab你é\ufffd\n😀", min_size=1, max_size=4),
    ),
    max_size=4,
)


def first_stop(text, stops):
    """Returns (end of the text, stop string) by brute force.

    It is the stop string that is completed first, and the longest of several.
    """
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return end - len(stop), stop
    return len(text), None


def decoded(ids):
    """Returns the text of the ids without control tokens."""
    return TOKENIZER.decode(ids, skip_special_tokens=True)


@settings(max_examples=400, deadline=None)
@given(IDS, STOPS, st.data())
def test_pieces_joined_are_the_text_up_to_the_first_stop_string(ids, stops, data):
    stream = StreamDecoder(TOKENIZER, stops)
    returned, at = "", 0
    cut, stop = first_stop(decoded(ids), stops)
    while at < len(ids):
        size = data.draw(st.integers(0, 5)) if at else data.draw(st.integers(1, 5))
        returned += stream.push(ids[at : at + size])
        at += size
        # The pieces are a prefix of the final text, and `num_text_tokens` tokens spell them.
        assert decoded(ids)[:cut].startswith(returned)
        if stream.stop_string is None:
            assert stream.num_tokens == min(at, len(ids))
        assert_fewest_tokens(stream, ids, returned)
    returned += stream.finish()
    assert returned == decoded(ids)[:cut]
    assert stream.stop_string == stop
    if stop is None:
        assert stream.num_text_tokens == len(ids)
    else:
        assert_fewest_tokens(stream, ids, returned)
    assert stream.finish() == "" and (stop is None or stream.push([97]) == "")


def assert_fewest_tokens(stream, ids, text):
    """Asserts that `num_text_tokens` is the smallest number of tokens that spell the text."""

    def num_characters(n):  # complete characters in the first n tokens
        raw = b"".join(TOKENIZER.token_bytes(i) for i in ids[:n] if not TOKENIZER.n_ranks <= i)
        return len(raw.decode("utf-8", "replace")) - num_incomplete(raw)

    if text:
        assert (
            num_characters(stream.num_text_tokens)
            >= len(text)
            > num_characters(stream.num_text_tokens - 1)
        )
    else:
        assert stream.num_text_tokens == 0


def num_incomplete(raw):
    """Returns 1 if `raw` ends with an incomplete character, else 0."""
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(raw)
    return int(bool(decoder.getstate()[0]))


@settings(max_examples=200, deadline=None)
@given(st.text("abc", max_size=30), STOPS)
def test_longest_suffix_that_starts_a_stop_string_is_held_back(text, stops):
    stream = StreamDecoder(TOKENIZER, stops)
    out = ""
    for character in text:
        out += stream.push(TOKENIZER.encode(character))
        if stream.stop_string is not None:
            return
        done = text[: stream.num_tokens]
        held = max((n for s in stops for n in range(len(s)) if done.endswith(s[:n])), default=0)
        assert out == done[: len(done) - held]


def test_incomplete_characters_are_held_back():
    stream = StreamDecoder(TOKENIZER)
    pieces = [stream.push([byte]) for byte in "你好😀".encode()]
    assert "".join(pieces) == "你好😀"
    assert [i for i, piece in enumerate(pieces) if piece] == [2, 5, 9]
    assert stream.push([0xE4]) == "" and stream.finish() == "\ufffd"


def test_stop_string_is_found_across_tokens_and_inside_a_token():
    stream = StreamDecoder(TOKENIZER, ["bca"])
    abc = 256 + MERGES.index(b"abc")
    assert stream.push([abc]) == "a" and stream.stop_string is None
    assert stream.push([97, 98]) == "" and stream.stop_string == "bca"
    assert stream.num_text_tokens == 1 and stream.finish() == ""
    inside = StreamDecoder(TOKENIZER, ["b"])
    assert inside.push([abc, 97]) == "a" and (inside.num_text_tokens, inside.num_tokens) == (1, 1)


def test_invalid_stop_strings_are_refused():
    for stop in ("ab", [""], ["a", None], [3]):
        with pytest.raises(UserError, match="stop"):
            StreamDecoder(TOKENIZER, stop)
