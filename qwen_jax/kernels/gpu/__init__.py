"""Kernels for Hopper GPUs (Pallas, Mosaic GPU)."""
