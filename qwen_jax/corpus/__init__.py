"""Documents to fixed-length training windows: collect, read, pack.

Nothing here imports jax: packing runs on machines without an accelerator.
"""
