"""Loading and saving with two processes, as two hosts of a pod: each reads its own bytes."""

import jax
import numpy as np
import torch
from safetensors.torch import load_file

from qwen_jax import parallel
from qwen_jax.interop import read_config, save_hf
from qwen_jax.interop.folder import list_tensors
from qwen_jax.interop.load import load_from_files
from qwen_jax.interop.mapping import leaf_mappings
from qwen_jax.interop.safetensors_io import TensorFiles
from qwen_jax.model import abstract_params
from tests import multiprocess
from tests.interop.folders import V1, random_tensors, write


def _load_and_save(folder: str, out: str) -> dict:
    cfg = read_config(folder)
    mesh = parallel.make_mesh(parallel.MeshConfig(fsdp=4, tensor=2))
    with TensorFiles(list_tensors(folder)) as files:
        params = load_from_files(files, cfg, abstract_params(cfg, mesh))
        read = files.bytes_read
    save_hf(out, params, cfg, dtype="bfloat16", max_shard_bytes=30_000)
    digest = float(sum(abs(x).astype("float32").sum() for x in jax.tree.leaves(params)))
    return {"read": read, "digest": digest}


def test_each_process_reads_its_half_and_the_export_is_bit_exact(tmp_path):
    tensors = random_tensors(V1, "bfloat16")
    write(tmp_path / "in", V1, tensors, shards=2)
    results = multiprocess.run(
        _load_and_save,
        processes=2,
        devices=4,
        folder=str(tmp_path / "in"),
        out=str(tmp_path / "out"),
    )
    # Norms are replicated, so both processes read them. Biases are sharded over `tensor` only, and
    # each process has both parts. Everything else is split between the processes.
    both = [s for s in leaf_mappings(V1) if "scale" in s.path or s.path[-1].endswith("_bias")]
    shared = 2 * sum(int(np.prod(s.shape)) for s in both)
    total = sum(t.nbytes for t in tensors.values())
    assert [r["read"] for r in results] == [shared + (total - shared) // 2] * 2
    assert results[0]["digest"] == results[1]["digest"]
    saved = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        saved |= load_file(file)
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(saved[name].view(torch.int16), tensor.view(torch.int16)), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
