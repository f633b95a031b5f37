"""Corpus: reads documents and packs them into fixed-length training windows.

Nothing here imports JAX, so packing runs on machines without an accelerator.
"""

from qwen_jax.corpus.documents import Document, JsonLines, Subset, write_jsonl
from qwen_jax.corpus.packing import PackConfig, pack
from qwen_jax.corpus.records import Manifest, read_manifest

__all__ = [
    "Document",
    "JsonLines",
    "Manifest",
    "PackConfig",
    "Subset",
    "pack",
    "read_manifest",
    "write_jsonl",
]
