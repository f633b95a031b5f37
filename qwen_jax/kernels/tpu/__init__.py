"""Kernels for TPU (Pallas, Mosaic)."""
