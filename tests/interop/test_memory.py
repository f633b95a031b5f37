"""Peak host memory of loading and saving, measured in a fresh process on Linux."""

import json
import subprocess
import sys

import pytest

from qwen_jax.interop.mapping import hf_tensors
from qwen_jax.model import ModelConfig
from tests.interop.folders import random_tensors, write

# 300 MB in bfloat16; one leaf of the FFN is 57 MB, the embedding 67 MB.
CFG = ModelConfig(
    family="qwen", vocab_size=65_536, d_model=512, n_layers=16, n_heads=8, n_kv_heads=8,
    head_dim=64, d_ff=3456, max_length=64, trained_length=64,
)  # fmt: skip

PROGRAM = """
import json, resource, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from qwen_jax import parallel
from qwen_jax.interop import load_params, read_config, save_hf
from qwen_jax.model import abstract_params

def anonymous():  # Bytes of this process that are not backed by a file.
    fields = dict(l.split(":", 1) for l in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) * 1024

import threading, time
peak, stop = [0], threading.Event()
def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

folder, out = sys.argv[1:]
cfg = read_config(folder)
mesh = parallel.make_mesh(parallel.MeshConfig(fsdp=4, tensor=2))
abstract = abstract_params(cfg, mesh)
abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16", sharding=x.sharding), abstract)
jax.block_until_ready([jax.device_put(np.zeros(8, np.float32), d) for d in jax.devices()])
result = {}
before = anonymous()
thread = threading.Thread(target=watch); thread.start()
params = load_params(folder, cfg, abstract)
result["load"] = peak[0] - before
result["loaded"] = anonymous() - before
result["bytes"] = sum(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards)
peak[0] = 0
base = anonymous()
save_hf(out, params, cfg, dtype="bfloat16", max_shard_bytes=100_000_000)
result["save"] = peak[0] - base
stop.set(); thread.join()
print(json.dumps(result))
"""


@pytest.mark.slow
def test_peak_host_memory_of_load_and_save_is_bounded(tmp_path):
    write(tmp_path / "in", CFG, random_tensors(CFG, "bfloat16"), shards=3)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr

    measured = json.loads(done.stdout.splitlines()[-1])
    total = 2 * sum(t.size for t in hf_tensors(CFG).values())
    assert measured["bytes"] >= total > 250e6
    leaf = 2 * CFG.vocab_size * CFG.d_model  # The largest one, 67 MB; a device's slice is 8 MB.
    # On CPU the device arrays are host memory too. The rest (one slice, thread stacks, memory
    # retained by the allocator) is less than one leaf.
    assert measured["load"] - measured["bytes"] < leaf, measured
    # Saving: one whole leaf or layer on the host, its cast, and the compiled programs.
    assert measured["save"] < 2 * leaf, measured
