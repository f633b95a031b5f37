"""Text to ids and back: tiktoken BPE, control tokens, vocabulary training."""

from qwen_jax.tokenizer.tokenizer import IncrementalDecoder, Tokenizer, load_tokenizer

__all__ = ["IncrementalDecoder", "Tokenizer", "load_tokenizer"]
