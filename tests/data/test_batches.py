"""Batches are a pure function of the step, for any number of hosts and after any resume."""

import threading
import time

import numpy as np
import pytest

from qwen_jax.corpus.documents import Document
from qwen_jax.corpus.packing import PackConfig, pack
from qwen_jax.data import mixture
from qwen_jax.data.batches import Batches, eval_batches, make_batch
from qwen_jax.data.config import DataConfig, DataSource, parse_sources
from qwen_jax.data.mixture import (
    WindowSource,
    check_fingerprint,
    data_fingerprint,
    epochs_at,
    open_sources,
    proportions,
)
from qwen_jax.errors import UserError
from tests.byte_tokenizer import ByteTokenizer

T = 16
# One letter per source, so that a row identifies its source.
LETTERS = "abc"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Three packed sources of different sizes and shard counts."""
    root = tmp_path_factory.mktemp("packed")
    rng = np.random.default_rng(0)
    for letter, count, shards in zip(LETTERS, (100, 37, 8), (3, 1, 2), strict=True):
        documents = [Document(f"{i}", letter * int(rng.integers(3, 40))) for i in range(count)]
        pack(documents, root / letter, ByteTokenizer(), PackConfig(T, shards=shards))
    return root


def config(packed, weights=(5.0, 3.0, 2.0), global_batch=24, **kwargs):
    sources = ",".join(
        f"{packed / letter}={weight}" for letter, weight in zip(LETTERS, weights, strict=False)
    )
    return DataConfig(sources, seq_len=T, global_batch=global_batch, **kwargs)


def assert_equal(left, right):
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)


def source_of(row):
    """Returns the letter of the source of a row of tokens."""
    (letter,) = {chr(token) for token in row if token != ByteTokenizer.eod_id}
    return letter


@pytest.mark.parametrize("packing", ["plain", "masked"])
def test_rows_of_all_hosts_in_order_are_the_batch_of_one_host(packed, packing):
    cfg = config(packed, packing=packing)
    for step in (0, 5, 1000, 123456):
        whole = Batches(cfg).rows(step)
        for count in (1, 2, 4, 8):
            reader = Batches(cfg)  # each host opens its own
            size = cfg.global_batch // count
            parts = [reader.rows(step, index * size, size) for index in range(count)]
            joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            assert_equal(joined, whole)


def test_resume_at_any_step_equals_the_uninterrupted_run(packed):
    cfg = config(packed)
    with Batches(cfg).iterate(0) as reader:
        run = [next(reader) for _ in range(40)]
    assert [step for step, _ in run] == list(range(40))
    for start in (1, 17, 39):
        with Batches(cfg).iterate(start, prefetch=3) as reader:
            step, batch = next(reader)
        assert step == start
        assert_equal(batch, run[start][1])


def test_keys_shapes_and_dtypes(packed):
    batch = Batches(config(packed)).rows(3, 12, 12)
    assert {key: (value.dtype.name, value.shape) for key, value in batch.items()} == {
        "tokens": ("int32", (12, T)),
        "targets": ("int32", (12, T)),
        "loss_mask": ("float32", (12, T)),
        "segment_ids": ("int32", (12, T)),
        "positions": ("int32", (12, T)),
        "n_bytes": ("float32", (12,)),
    }


def test_mixture_shares_are_in_tokens(packed):
    """Shares are exact in each sequence of sum(proportions) rows, and close in every prefix."""
    cfg = config(packed)
    assert proportions((5.0, 3.0, 2.0)) == (250, 150, 100)
    reader = Batches(cfg)
    letters = []
    for step in range(-(-500 // 24)):
        letters += [source_of(row) for row in reader.rows(step)["tokens"]]
    assert [letters[:500].count(letter) for letter in LETTERS] == [250, 150, 100]
    for prefix in range(10, 500, 10):
        counts = [letters[:prefix].count(letter) for letter in LETTERS]
        np.testing.assert_allclose(counts, np.array([0.5, 0.3, 0.2]) * prefix, atol=1.01)
    epochs = epochs_at(cfg, 100)
    windows = WindowSource(packed / "c").manifest.windows
    assert epochs[str(packed / "c")] == pytest.approx(100 * 24 * 0.2 / windows)


def test_weights_are_quantised_within_half_a_percent_of_the_smallest():
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights = tuple(rng.uniform(0.01, 1, 4))
        shares = np.array(proportions(weights))
        wanted = np.array(weights) / min(weights)
        np.testing.assert_allclose(shares / 100, wanted, atol=0.005)
    # Grain itself truncates: 0.7 · (100 / 0.1) is 699.99... in floating point.
    assert proportions((0.1, 0.2, 0.7)) == (100, 200, 700)


def test_each_epoch_has_every_window_once_in_a_different_order(packed):
    cfg = config(packed, weights=(1.0,), global_batch=1)
    windows = len(WindowSource(packed / "a"))
    reader = Batches(cfg)
    everything = sorted(
        row.tobytes() for batch in eval_batches(packed / "a", 1) for row in batch["tokens"]
    )
    epochs = [
        [reader.rows(epoch * windows + i)["tokens"].tobytes() for i in range(windows)]
        for epoch in range(3)
    ]
    for epoch in epochs:
        assert sorted(epoch) == everything
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = Batches(config(packed, weights=(1.0,), global_batch=1, seed=1))
    assert [other.rows(i)["tokens"].tobytes() for i in range(windows)] != epochs[0]


def test_packing_modes_equal_a_plain_loop(packed):
    source = WindowSource(packed / "a")
    records = [source[i] for i in range(len(source))]
    masked, plain = (make_batch(records, T, packing) for packing in ("masked", "plain"))
    for key in ("tokens", "targets", "loss_mask", "n_bytes"):
        np.testing.assert_array_equal(masked[key], plain[key])
    eod = ByteTokenizer.eod_id
    for row in range(len(records)):
        segment, position = 1, 0
        for column in range(T):
            if plain["segment_ids"][row, column] == 0:
                assert masked["segment_ids"][row, column] == 0
                assert row == len(records) - 1
                continue
            assert masked["segment_ids"][row, column] == segment
            assert masked["positions"][row, column] == position
            assert plain["segment_ids"][row, column] == 1
            assert plain["positions"][row, column] == column
            position += 1
            if masked["tokens"][row, column] == eod:
                assert masked["loss_mask"][row, column] == 0
                segment, position = segment + 1, 0
            else:
                assert masked["loss_mask"][row, column] == 1
    np.testing.assert_array_equal(plain["tokens"][:, 1:], plain["targets"][:, :-1])
    lengths = ByteTokenizer.token_lengths[plain["targets"]]
    np.testing.assert_array_equal(plain["n_bytes"], (lengths * plain["loss_mask"]).sum(1))


@pytest.mark.parametrize(("batch_size", "count"), [(1, 1), (8, 1), (8, 2), (8, 8), (1000, 2)])
def test_evaluation_covers_every_window_once(packed, batch_size, count):
    source = WindowSource(packed / "a")
    size = batch_size // count
    parts = [
        list(eval_batches(packed / "a", batch_size, first=i * size, count=size))
        for i in range(count)
    ]
    assert len({len(part) for part in parts}) == 1
    rows = {
        key: np.concatenate([part[step][key] for step in range(len(parts[0])) for part in parts])
        for key in parts[0][0]
    }
    want = make_batch([source[i] for i in range(len(source))], T, "plain")
    for key, value in rows.items():
        np.testing.assert_array_equal(value[: len(source)], want[key])
        if key in ("loss_mask", "segment_ids", "n_bytes"):
            assert not value[len(source) :].any()
    assert rows["tokens"].shape[0] == -(-len(source) // batch_size) * batch_size
    assert rows["loss_mask"].sum() == source.manifest.target_tokens
    assert rows["n_bytes"].sum() == source.manifest.target_bytes


def test_fingerprint_depends_on_the_data_but_not_on_its_path(packed, tmp_path):
    cfg = config(packed)
    found = data_fingerprint(cfg)
    moved = tmp_path / "moved"
    moved.mkdir()
    for letter in LETTERS:
        (moved / letter).symlink_to(packed / letter)
    assert data_fingerprint(config(moved)) == found
    assert data_fingerprint(config(packed, weights=(50.0, 30.0, 20.0))) == found
    check_fingerprint(found, config(moved))
    for other, message in [
        (config(packed, seed=1), "seed is 0, not 1"),
        (config(packed, packing="masked"), "packing is 'plain', not 'masked'"),
        (config(packed, global_batch=8), "global_batch is 24, not 8"),
        (config(packed, weights=(1.0, 1.0, 1.0)), "proportions is"),
        (config(packed, weights=(5.0, 3.0)), "sources is"),
    ]:
        with pytest.raises(UserError, match=message):
            check_fingerprint(found, other)


def test_fingerprint_depends_on_the_order_of_windows(packed, monkeypatch):
    """Simulates a version of Grain that shuffles differently."""
    cfg = config(packed)
    found = data_fingerprint(cfg)
    monkeypatch.setattr(mixture, "_source_seed", lambda seed, index: index)
    with pytest.raises(UserError, match="order is"):
        check_fingerprint(found, cfg)


def test_the_order_of_windows_is_unchanged(packed):
    """Earlier runs can be resumed only while this holds; recorded with grain 0.2.18."""
    assert data_fingerprint(config(packed))["order"] == "ba3182032fda210f"


def test_the_reader_thread_has_bounded_memory_and_ends(packed):
    reader = Batches(config(packed))
    asked = []
    original = reader.rows
    reader.rows = lambda step, *rest: asked.append(step) or original(step, *rest)
    before = threading.active_count()
    prefetch = reader.iterate(7, prefetch=3)
    deadline = time.time() + 10
    while len(asked) < 4 and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert asked == [7, 8, 9, 10]  # three in the queue and one that was taken
    assert next(prefetch)[0] == 7
    prefetch.close()
    prefetch.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(prefetch)


def copy(packed, tmp_path, letter="a"):
    target = tmp_path / letter
    target.mkdir()
    for path in (packed / letter).iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_flipped_bit_is_reported_when_read(packed, tmp_path):
    """Size and record count are unchanged, so only reading the record detects it."""
    folder = copy(packed, tmp_path)
    shard = sorted(folder.glob("*.array_record"))[1]
    data = bytearray(shard.read_bytes())
    # inside the first chunk of records: head and tail of the file are its structure
    data[200] ^= 0xFF
    shard.write_bytes(data)
    cfg = DataConfig(str(folder), seq_len=T, global_batch=4)
    reader = Batches(cfg)
    with pytest.raises(UserError, match=rf"Record \d+ of .*{shard.name} is damaged"):
        list(eval_batches(folder, 4))
    with reader.iterate(0) as prefetch, pytest.raises(UserError, match="is damaged"):
        for _ in prefetch:
            pass
    with pytest.raises(UserError, match="is damaged"):
        next(prefetch)


def test_sources_are_parsed_from_one_string():
    want = (DataSource("/d/web", 0.7), DataSource("b=2/code", 3.0), DataSource("math", 1.0))
    assert parse_sources("/d/web=0.7, b=2/code=3,math") == want
    assert DataConfig("", T, 4).sources == ""  # a recipe may leave it to the command line
    with pytest.raises(UserError, match=r"data.sources is empty"):
        Batches(DataConfig("", T, 4))
    for bad in ("a=0", "a=-1", "a=nan", "a=inf", "a=much", "=1", "a=1,", "a=", "a=1,,b"):
        with pytest.raises(UserError, match="with a positive weight"):
            DataConfig(bad, T, 4)
    with pytest.raises(UserError, match="lists a twice"):
        DataConfig("a=1,b/../a=2", T, 4)


def test_bad_sources_are_refused_before_training(packed, tmp_path):
    def batches(path, seq_len=T, sha256=None):
        return Batches(DataConfig(str(path), seq_len, 4), sha256)

    with pytest.raises(UserError, match="none does not exist"):
        batches(tmp_path / "none")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"has no manifest.json"):
        batches(tmp_path / "bare")
    with pytest.raises(UserError, match="packed with seq_len 16, the config has 32"):
        batches(packed / "a", seq_len=32)
    with pytest.raises(UserError, match=r"tokenizer bytes0+\.\.\., the one in use is other0"):
        batches(packed / "a", sha256="other".ljust(64, "0"))
    batches(packed / "a", sha256="bytes".ljust(64, "0"))
    with pytest.raises(UserError, match=r"did you mean 'masked'\?"):
        config(packed, packing="maskd")
    with pytest.raises(UserError, match="global_batch is 0"):
        config(packed, global_batch=0)
    folder = copy(packed, tmp_path)
    shards = sorted(folder.glob("*.array_record"))
    whole = shards[0].read_bytes()
    shards[0].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"has \d+ bytes, but its manifest says \d+"):
        batches(folder)
    shards[0].write_bytes(bytes(len(whole)))
    with pytest.raises(UserError, match="is damaged"):
        batches(folder)
    shards[0].unlink()
    with pytest.raises(UserError, match="is missing"):
        batches(folder)
    # one bad source among good ones is not ignored
    with pytest.raises(UserError, match="is missing"):
        open_sources(DataConfig(f"{packed}/b=1,{folder}=1", T, 4))


def test_an_empty_source_is_refused(packed, tmp_path):
    folder = copy(packed, tmp_path)
    text = (folder / "manifest.json").read_text()
    windows = WindowSource(folder).manifest.windows
    head = text[: text.index('"shards"')].replace(f'"windows": {windows}', '"windows": 0')
    (folder / "manifest.json").write_text(head + '"shards": []}')
    with pytest.raises(UserError, match="has no windows"):
        Batches(DataConfig(str(folder), T, 4))


def test_an_evaluation_batch_size_below_one_is_refused(packed):
    with pytest.raises(UserError, match="batch size is 0"):
        eval_batches(packed / "a", 0)
