"""Byte-level BPE tokenizer of Qwen (on tiktoken), its control tokens, and vocabulary training."""

from qwen_jax.tokenizer.tokenizer import IncrementalDecoder, Tokenizer, load_tokenizer

__all__ = ["IncrementalDecoder", "Tokenizer", "load_tokenizer"]
