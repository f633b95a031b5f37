"""Continuous-batching inference engine: scheduler, paged KV cache, compiled steps, sampling."""
