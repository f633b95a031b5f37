"""Small Hugging Face folders for tests, written with the public safetensors package."""

import json

import jax
import numpy as np
import torch
from safetensors.torch import save_file

from qwen_jax import parallel
from qwen_jax.interop import config_to_hf
from qwen_jax.interop.mapping import hf_tensors
from qwen_jax.model import ModelConfig

TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

V1 = ModelConfig(
    family="qwen", vocab_size=64, d_model=32, n_layers=3, n_heads=4, n_kv_heads=4, head_dim=8,
    d_ff=48, max_length=64, trained_length=16, dynamic_ntk=True, logn=True,
)  # fmt: skip
V2 = ModelConfig(
    family="qwen2", vocab_size=64, d_model=32, n_layers=2, n_heads=8, n_kv_heads=2, head_dim=8,
    d_ff=48, max_length=64, trained_length=64,
)  # fmt: skip
V3 = ModelConfig(
    family="qwen3", vocab_size=64, d_model=32, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=8,
    d_ff=48, max_length=64, trained_length=64, qkv_bias=False, qk_norm=True, tie_embeddings=True,
)  # fmt: skip
ALL = {"v1": V1, "v2": V2, "v3": V3}


def random_tensors(cfg, dtype="float32", seed=0):
    """Returns all HF tensors of `cfg`, random; `dtype` may be a function of the tensor name."""
    rng = np.random.default_rng(seed)
    dtype_of = dtype if callable(dtype) else lambda name: dtype
    return {
        name: torch.from_numpy(rng.standard_normal(t.shape, np.float32)).to(TORCH[dtype_of(name)])
        for name, t in hf_tensors(cfg).items()
    }


def write(folder, cfg, tensors, shards=1):
    """Writes a model folder: tensors, config.json, and with several shards an index; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_to_hf(cfg)))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def toy_mesh(data=1, fsdp=4, tensor=2):
    """Returns a mesh of the first data · fsdp · tensor devices."""
    devices = jax.devices()[: data * fsdp * tensor]
    return parallel.make_mesh(parallel.MeshConfig(data, fsdp, 1, tensor), devices)
