"""Loading and saving weights: bit-exact on any mesh, reading each byte once."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qwen_jax.errors import UserError
from qwen_jax.interop import load_params, read_config, save_hf, tree_from_hf, tree_to_hf
from qwen_jax.interop import save as save_module
from qwen_jax.interop.folder import list_tensors
from qwen_jax.interop.load import distinct_slices, load_from_files
from qwen_jax.interop.mapping import hf_tensors, leaf_mappings
from qwen_jax.interop.safetensors_io import TensorFiles
from qwen_jax.model import abstract_params, count_params
from qwen_jax.model.presets import preset
from tests.interop.folders import ALL, V1, V2, V3, random_tensors, toy_mesh, write


def cast(abstract, dtype):
    """Returns the abstract tree with another dtype."""

    def leaf(x):
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    return jax.tree.map(leaf, abstract)  # fmt: skip


def as_numpy(tensor):
    return tensor.to(torch.float32).numpy()


@pytest.mark.parametrize("name", ALL)
def test_leaf_mappings_cover_exactly_the_parameters(name):
    for tied in (True, False):
        cfg = dataclasses.replace(ALL[name], tie_embeddings=tied)
        declared = {
            tuple(k.key for k in path): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(cfg))
        }
        assert {s.path: s.shape for s in leaf_mappings(cfg)} == declared
        assert sum(t.size for t in hf_tensors(cfg).values()) == count_params(cfg)


@pytest.mark.parametrize(
    ("size", "tensors", "nbytes"),
    [
        # Total sizes in the official safetensors indices of Qwen-7B and -72B; the others follow
        # from the released shapes.
        ("qwen-1.8b", 195, 3_673_657_344),
        ("qwen-7b", 259, 15_442_649_088),
        ("qwen-14b", 323, 28_334_581_760),
        ("qwen-72b", 643, 144_575_840_256),
    ],
)
def test_tensor_counts_and_bytes_match_released_models(size, tensors, nbytes):
    found = hf_tensors(preset(size))
    assert (len(found), 2 * sum(t.size for t in found.values())) == (tensors, nbytes)


def test_layer_selection_on_device_matches_the_host():
    """The jitted selection used on accelerators gives the same bits as numpy on the host."""
    x = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32)
    for dtype in save_module.DTYPES.values():
        for layer in (0, 2):
            cut = save_module._select_layer_jit(
                jax.numpy.asarray(x), layer, whole=False, dtype=dtype
            )
            np.testing.assert_array_equal(np.asarray(cut), x[layer].astype(dtype))
        whole = save_module._select_layer_jit(jax.numpy.asarray(x), 0, whole=True, dtype=dtype)
        np.testing.assert_array_equal(np.asarray(whole), x.astype(dtype))


def test_native_einsums_match_torch_linears():
    """Native einsums of q, k, v, o and the SwiGLU equal x @ W.T of the stored matrices."""
    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal(t.shape) for n, t in hf_tensors(V1).items()}
    layers = tree_from_hf(tensors, V1)["layers"]
    x = rng.standard_normal((5, V1.d_model))
    pre = "transformer.h.2."
    qkv = x @ tensors[pre + "attn.c_attn.weight"].T + tensors[pre + "attn.c_attn.bias"]
    for i, leaf in enumerate("qkv"):
        ours = (
            np.einsum("TD,DNH->TNH", x, layers["attn"][leaf][2]) + layers["attn"][f"{leaf}_bias"][2]
        )
        np.testing.assert_allclose(ours.reshape(5, -1), np.split(qkv, 3, axis=-1)[i], atol=1e-12)
    heads = rng.standard_normal((5, V1.n_heads, V1.head_dim))
    np.testing.assert_allclose(
        np.einsum("TNH,NHD->TD", heads, layers["attn"]["o"][2]),
        heads.reshape(5, -1) @ tensors[pre + "attn.c_proj.weight"].T, atol=1e-12,
    )  # fmt: skip
    # The released MLP is c_proj(w1(x)·SiLU(w2(x))): the gate is w2.
    np.testing.assert_array_equal(layers["mlp"]["gate"][2], tensors[pre + "mlp.w2.weight"].T)
    np.testing.assert_array_equal(layers["mlp"]["up"][2], tensors[pre + "mlp.w1.weight"].T)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("native", ["float32", "bfloat16"])
def test_round_trip_is_bit_exact_on_a_mesh(tmp_path, name, native):
    cfg = ALL[name]
    tensors = random_tensors(cfg, "bfloat16")
    write(tmp_path / "in", cfg, tensors, shards=3)
    assert read_config(tmp_path / "in") == cfg
    params = load_params(tmp_path / "in", cfg, cast(abstract_params(cfg, toy_mesh()), native))
    save_hf(tmp_path / "out", params, cfg, dtype="bfloat16", max_shard_bytes=20_000)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    found = {}
    for file in files:
        part = load_file(tmp_path / "out" / file)
        size = sum(t.nbytes for t in part.values())
        assert size <= 20_000 or len(part) == 1
        found |= part
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(found[key].view(torch.int16), tensor.view(torch.int16)), key
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    assert read_config(tmp_path / "out") == cfg


def test_save_reproduces_a_single_file_byte_for_byte(tmp_path, qwen1_small):
    cfg = read_config(qwen1_small)
    params = load_params(qwen1_small, cfg, abstract_params(cfg))
    save_hf(tmp_path / "out", params, cfg, dtype="float32")
    ours = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert ours == (qwen1_small / "model.safetensors").read_bytes()
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("mesh", [(1, 4, 2), (1, 8, 1), (2, 2, 2), (1, 1, 2), (4, 1, 1)])
def test_every_mesh_loads_the_same_values_reading_each_byte_once(tmp_path, mesh):
    """The bytes read are exactly the union of the devices' slices, replicated or not."""
    cfg = V2
    dtypes = {"model.norm.weight": "float32", "lm_head.weight": "float16"}
    tensors = random_tensors(cfg, lambda name: dtypes.get(name, "bfloat16"))
    write(tmp_path, cfg, tensors, shards=2)
    abstract = abstract_params(cfg, toy_mesh(*mesh))
    with TensorFiles(list_tensors(tmp_path)) as files:
        params = load_from_files(files, cfg, abstract)
        assert files.bytes_read == sum(t.nbytes for t in tensors.values())
    for leaf, want in zip(jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding == want.sharding and leaf.dtype == np.float32
    back = tree_to_hf(params, cfg)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], as_numpy(tensor), err_msg=name)


def test_process_reads_only_slices_of_its_own_devices(tmp_path):
    """With half of a mesh's devices, as on one of two hosts, half of the sharded bytes are read."""
    cfg = V3
    tensors = random_tensors(cfg)
    write(tmp_path, cfg, tensors)
    mesh = toy_mesh(1, 4, 2)
    abstract = abstract_params(cfg, mesh)
    mine = set(mesh.devices[:, :2].flat)

    class HalfOfTheDevices:
        def __init__(self, sharding):
            self._sharding = sharding

        def addressable_devices_indices_map(self, shape):
            full = self._sharding.devices_indices_map(shape)
            return {d: index for d, index in full.items() if d in mine}

    wanted = 0
    for slot in leaf_mappings(cfg):
        leaf = abstract
        for key in slot.path:
            leaf = leaf[key]
        for bounds in distinct_slices(HalfOfTheDevices(leaf.sharding), slot.shape):
            wanted += 4 * int(np.prod([stop - start for start, stop in bounds]))
    norms = 4 * sum(np.prod(s.shape) for s in leaf_mappings(cfg) if "scale" in s.path)
    total = sum(t.nbytes for t in tensors.values())
    assert wanted == norms + (total - norms) // 2


def test_irregular_shardings_load_the_right_slices(tmp_path):
    """Splits inside heads, of layers and of strided columns read the right bytes."""
    cfg = V1
    tensors = random_tensors(cfg, lambda n: "float16" if "mlp" in n else "bfloat16")
    write(tmp_path, cfg, tensors, shards=2)
    whole = tree_from_hf({n: as_numpy(t) for n, t in tensors.items()}, cfg)
    mesh = jax.make_mesh((2, 4), ("a", "b"))
    rng = np.random.default_rng(1)

    def shard(leaf):
        axes = [None] * leaf.ndim
        for axis, size in (("a", 2), ("b", 4)):
            free = [i for i, n in enumerate(leaf.shape) if axes[i] is None and n % size == 0]
            if free:
                axes[int(rng.choice(free))] = axis
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, jax.P(*axes))
        )

    params = load_params(tmp_path, cfg, jax.tree.map(shard, abstract_params(cfg)))
    jax.tree.map(np.testing.assert_array_equal, params, whole)


def test_loading_without_a_mesh_casts_to_bfloat16(tmp_path):
    write(tmp_path, V2, tensors := random_tensors(V2))
    params = load_params(tmp_path, V2, cast(abstract_params(V2), ml_dtypes.bfloat16))
    for name, ours in tree_to_hf(params, V2).items():
        want = tensors[name].to(torch.bfloat16)  # Both round to nearest, ties to even.
        np.testing.assert_array_equal(ours.astype(np.float32), as_numpy(want))


def test_tied_head_and_constant_buffers_are_ignored(tmp_path):
    tensors = random_tensors(V3)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write(tmp_path, V3, tensors)
    params = load_params(tmp_path, V3, abstract_params(V3))
    save_hf(tmp_path / "out", params, V3, dtype="float32")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == hf_tensors(V3).keys()


def test_numpy_parameters_and_extra_files_are_saved(tmp_path):
    tensors = random_tensors(V2)
    tree = tree_from_hf({n: t.numpy() for n, t in tensors.items()}, V2)
    (tmp_path / "qwen.tiktoken").write_text("QQ== 0\n")
    save_hf(
        tmp_path / "out", tree, V2, dtype="float32", tokenizer_files=[tmp_path / "qwen.tiktoken"],
        generation_config={"eos_token_id": 3}, config_extra={"eos_token_id": 3},
    )  # fmt: skip
    assert (tmp_path / "out" / "qwen.tiktoken").read_text() == "QQ== 0\n"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {
        "eos_token_id": 3
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 3
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(saved[n], t) for n, t in tensors.items())


def test_failed_save_leaves_no_files_and_leftovers_are_removed(tmp_path, monkeypatch):
    tree = tree_from_hf({n: t.numpy() for n, t in random_tensors(V2).items()}, V2)
    leftover = tmp_path / ".out.hf-export-partial"
    leftover.mkdir()
    (leftover / "model-00009-of-00009.safetensors").write_text("from an interrupted run")

    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save_module.os, "replace", no_space)
    with pytest.raises(OSError, match="No space"):
        save_hf(tmp_path / "out", tree, V2)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "out").mkdir()  # An empty folder is accepted.
    save_hf(tmp_path / "out", tree, V2)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_save_rejects_unsupported_input(tmp_path):
    tree = tree_from_hf({n: t.numpy() for n, t in random_tensors(V2).items()}, V2)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"int8.*bfloat16"):
        save_hf(out, tree, V2, dtype="int8")
    with pytest.raises(UserError, match=r"gone\.json"):
        save_hf(out, tree, V2, tokenizer_files=[tmp_path / "gone.json"])
    with pytest.raises(UserError, match="value_head/kernel has no Hugging Face name"):
        save_hf(out, tree | {"value_head": {"kernel": np.zeros((2, 1))}}, V2)
    with pytest.raises(UserError, match="head/kernel is missing"):
        save_hf(out, {k: v for k, v in tree.items() if k != "head"}, V2)
    with pytest.raises(UserError, match=r"embed/table has shape \[64, 32\].*\[65, 32\]"):
        save_hf(out, tree, dataclasses.replace(V2, vocab_size=65))
    big = tree | {"final_norm": {"scale": np.full(32, 1e6, np.float32)}}
    with pytest.raises(UserError, match=r"model\.norm\.weight.*float16"):
        save_hf(out, big, V2, dtype="float16")
    monkey = save_module.shutil.disk_usage(tmp_path)._replace(free=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save_module.shutil, "disk_usage", lambda path: monkey)
        with pytest.raises(UserError, match="GB free"):
            save_hf(out, tree, V2)
    assert list(tmp_path.iterdir()) == []
    out.mkdir()
    (out / "keep.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        save_hf(out, tree, V2)
    assert (out / "keep.txt").read_text() == "mine"
