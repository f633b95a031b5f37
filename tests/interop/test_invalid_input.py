"""Damaged, incomplete or unsupported folders are rejected before any tensor data is read."""

import json
import os
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qwen_jax.errors import UserError
from qwen_jax.interop import load, load_params, logits, read_config
from qwen_jax.interop.folder import list_tensors
from qwen_jax.interop.safetensors_io import TensorFiles, read_header
from qwen_jax.model import abstract_params
from tests.interop.folders import V1, V2, V3, random_tensors, write


@pytest.fixture(autouse=True)
def _fail_on_data_read(monkeypatch):
    def fail(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(TensorFiles, "tensor", fail)


def refused(folder, cfg, *words):
    """Checks that loading the folder raises a one-line UserError that contains all words."""
    with pytest.raises(UserError) as error:
        load_params(folder, cfg, abstract_params(cfg))
    for word in words:
        assert word in str(error.value), str(error.value)
    assert "\n" not in str(error.value)


def test_missing_folder_config_or_weights_is_rejected(tmp_path):
    with pytest.raises(UserError, match="gone does not exist"):
        read_config(tmp_path / "gone")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file"):
        read_config(tmp_path / "file")
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        read_config(tmp_path)
    for text in ("{", "[]", ""):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json is not"):
            read_config(tmp_path)
    refused(tmp_path, V2, "neither model.safetensors nor")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-2.bin"])
def test_pickles_are_not_opened(tmp_path, name):
    write(tmp_path, V2, random_tensors(V2))
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    refused(tmp_path, V2, "pickled", name, "save_pretrained")


def test_missing_tensors_are_counted_and_named(tmp_path):
    tensors = random_tensors(V1)
    for name in [n for n in tensors if ".h.1." in n]:
        del tensors[name]
    write(tmp_path, V1, tensors)
    refused(tmp_path, V1, "lacks 8 of the 27", "transformer.h.1.ln_1.weight", "…")


def test_missing_untied_head_error_mentions_tie_word_embeddings(tmp_path):
    tensors = random_tensors(V2)
    del tensors["lm_head.weight"]
    write(tmp_path, V2, tensors)
    refused(tmp_path, V2, "lm_head.weight", "tie_word_embeddings")


@pytest.mark.parametrize(
    ("cfg", "name", "shape"),
    [
        (V2, "model.layers.7.mlp.up_proj.weight", (48, 32)),
        (V2, "model.layers.0.self_attn.o_proj.bias", (32,)),
        (V1, "transformer.h.0.mlp.w1.bias", (48,)),
        (V3, "lm_head.weight", (63, 32)),  # Tied, but not the embedding's shape.
    ],
)
def test_unknown_tensors_are_rejected_by_name(tmp_path, cfg, name, shape):
    write(tmp_path, cfg, random_tensors(cfg) | {name: torch.zeros(shape)})
    refused(tmp_path, cfg, "contains 1 tensors", name)


def test_wrong_shape_error_gives_found_and_expected_shapes(tmp_path):
    tensors = random_tensors(V2)
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(48, 32)  # Transposed.
    write(tmp_path, V2, tensors)
    refused(tmp_path, V2, "model.layers.1.mlp.down_proj.weight", "[48, 32]", "[32, 48]")


def test_quantised_tensors_without_a_config_are_rejected(tmp_path):
    tensors = random_tensors(V2)
    tensors["model.layers.0.mlp.up_proj.qweight"] = torch.zeros(4, 4, dtype=torch.int32)
    write(tmp_path, V2, tensors)
    refused(tmp_path, V2, "quantised", "qweight")
    tensors = random_tensors(V2)
    tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)
    write(tmp_path, V2, tensors)
    refused(tmp_path, V2, "model.norm.weight", "I8", "BF16")


@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.02, 0.5, 0.9999])
def test_truncated_files_are_rejected(tmp_path, keep):
    write(tmp_path, V2, random_tensors(V2), shards=2)
    file = tmp_path / "model-00002-of-00002.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    refused(tmp_path, V2, file.name, "download it again")


def edit_header(file, change):
    """Rewrites the JSON header of a safetensors file with `change` applied."""
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    if text is None:
        text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda h: b"{",
        lambda h: b"[]",
        lambda h: b"\xff\xfe",
        lambda h: b'{"a": 1}',
        lambda h: b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
                  b' "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        lambda h: h["model.norm.weight"].update(shape=[33]),
        lambda h: h["model.norm.weight"].update(shape=[-32]),
        lambda h: h["model.norm.weight"].update(shape=[True]),
        lambda h: h["model.norm.weight"].update(shape="32"),
        lambda h: h["model.norm.weight"].update(data_offsets=[0]),
        lambda h: h["model.norm.weight"].update(data_offsets=[4, 0]),
        lambda h: h["model.norm.weight"].pop("dtype") and None,
        lambda h: h["model.norm.weight"].update(
            data_offsets=[x + 2**40 for x in h["model.norm.weight"]["data_offsets"]]),
        lambda h: h.pop("model.norm.weight") and None,  # Leaves a hole in the data.
    ],
)  # fmt: skip
def test_corrupt_headers_are_rejected(tmp_path, change):
    write(tmp_path, V2, random_tensors(V2))
    edit_header(tmp_path / "model.safetensors", change)
    refused(tmp_path, V2, "model.safetensors", "download it again")


def test_random_header_damage_raises_only_user_errors(tmp_path):
    """With a random byte of the header changed, 1000 times, reading works or raises UserError."""
    write(tmp_path, V3, random_tensors(V3))
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    rng = np.random.default_rng(0)
    refusals = 0
    for _ in range(1000):
        at = int(rng.integers(0, 8 + length))
        damaged = bytearray(data)
        damaged[at] ^= int(rng.integers(1, 256))
        file.write_bytes(damaged)
        try:
            read_header(file)
        except UserError:
            refusals += 1
    assert refusals > 200


def test_invalid_indices_are_rejected(tmp_path):
    write(tmp_path, V2, random_tensors(V2), shards=3)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    os.rename(tmp_path / "model-00002-of-00003.safetensors", tmp_path / "elsewhere")
    refused(
        tmp_path, V2, "lists 3 files, of which 1 do not exist", "model-00002-of-00003.safetensors"
    )
    os.rename(tmp_path / "elsewhere", tmp_path / "model-00002-of-00003.safetensors")
    for bad in ({}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 3}}):
        index.write_text(json.dumps(bad))
        refused(tmp_path, V2, "weight_map")
    for name in ("../outside.safetensors", "/etc/passwd", "..", ""):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        refused(tmp_path, V2, "not a file of this folder")
    listed = dict(good["weight_map"], **{"not.there": "model-00001-of-00003.safetensors"})
    index.write_text(json.dumps({"weight_map": listed}))
    refused(tmp_path, V2, "lists 1 tensors", "not.there")
    index.write_text("{")
    refused(tmp_path, V2, "not readable JSON")


def test_tensors_missing_from_the_index_are_checked(tmp_path):
    extra = {"value_head.weight": torch.zeros(1, 32)}
    write(tmp_path, V2, random_tensors(V2) | extra, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["value_head.weight"]
    index.write_text(json.dumps(content))
    refused(tmp_path, V2, "value_head.weight")


def test_duplicate_tensor_is_taken_from_the_indexed_shard(tmp_path):
    tensors = random_tensors(V2)
    write(tmp_path, V2, tensors, shards=2)
    infos = list_tensors(tmp_path)
    stale = {**tensors, "model.norm.weight": torch.full((32,), 7.0)}
    first = tmp_path / "model-00001-of-00002.safetensors"
    listed = {n: stale[n] for n, i in infos.items() if i.file == first}
    save_file(listed | {"model.norm.weight": stale["model.norm.weight"]}, first)
    where = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert list_tensors(tmp_path)["model.norm.weight"].file.name == where["model.norm.weight"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "no array whose name starts with 'ids_' (found: nothing)"),
        ({"tokens": np.zeros(3, int)}, "found: tokens"),
        ({"ids_a": np.zeros(3)}, "float64"),
        ({"ids_a": np.array(["x"])}, "integers"),
        ({"ids_a": np.zeros((1, 2, 3), int)}, "[1, 2, 3]"),
        ({"ids_a": np.array(3)}, "[]"),
        ({"ids_a": np.zeros((2, 0), int)}, "[2, 0]"),
        ({"ids_a": np.array([0, -1])}, "id -1"),
        ({"ids_a": np.array([0, 64])}, "id 64; ids of this model are 0 to 63"),
        ({"ids_a": np.zeros(65, int)}, "65 tokens; the longest sequence of this model is 64"),
        ({"ids_a": np.array([{}], object)}, "not a readable .npz"),
    ],
)
def test_invalid_ids_are_rejected_before_weights_are_read(tmp_path, arrays, message):
    write(tmp_path, V2, random_tensors(V2))
    np.savez(tmp_path / "ids.npz", **arrays)
    with pytest.raises(UserError) as error:
        logits.write_logits(tmp_path, tmp_path / "ids.npz", tmp_path / "out.npz")
    assert message in str(error.value)
    assert not (tmp_path / "out.npz").exists()


def test_ids_files_that_are_not_npz_are_rejected(tmp_path):
    write(tmp_path, V2, random_tensors(V2))
    np.save(tmp_path / "ids.npy", np.zeros(3, int))
    (tmp_path / "text").write_text("1 2 3")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("ids.npy", "text", "empty", "gone.npz"):
        with pytest.raises(UserError, match=name):
            logits.read_ids(tmp_path / name, V2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "low"}, "highest"),
        ({"dtype": "int8"}, "int8"),
        ({"tensor": 0}, "tensor=0"),
        ({"tensor": 3}, "kv heads 2"),
        ({"tensor": 16}, "kv heads 2"),
    ],
)
def test_write_logits_rejects_invalid_options(tmp_path, options, message):
    write(tmp_path, V2, random_tensors(V2))
    np.savez(tmp_path / "ids.npz", ids_a=np.zeros(3, int))
    with pytest.raises(UserError, match=message):
        logits.write_logits(tmp_path, tmp_path / "ids.npz", tmp_path / "out.npz", **options)


def test_float64_weights_are_cast_to_float32(tmp_path, monkeypatch):
    monkeypatch.undo()
    tensors = {n: t.to(torch.float64) for n, t in random_tensors(V2).items()}
    write(tmp_path, V2, tensors)
    params = load.load_params(tmp_path, V2, abstract_params(V2))
    want = tensors["model.norm.weight"].to(torch.float32).numpy()
    np.testing.assert_array_equal(params["final_norm"]["scale"], want)
