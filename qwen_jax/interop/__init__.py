"""Reads and writes Hugging Face model folders of Qwen v1, Qwen1.5, 2, 2.5 and dense Qwen3.

`read_config` and `load_params` load a downloaded folder directly into sharded arrays; `save_hf`
writes one. `mapping.leaf_mappings` is the table of which tensor stores which parameter.
"""

from qwen_jax.interop.hf_config import config_from_hf
from qwen_jax.interop.hf_config_write import config_to_hf
from qwen_jax.interop.load import load_params, read_config
from qwen_jax.interop.mapping import tree_from_hf, tree_to_hf
from qwen_jax.interop.save import save_hf

__all__ = [
    "config_from_hf",
    "config_to_hf",
    "load_params",
    "read_config",
    "save_hf",
    "tree_from_hf",
    "tree_to_hf",
]
