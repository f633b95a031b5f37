"""Pallas kernels for NVIDIA Hopper GPUs (Mosaic GPU): attention, paged decode, quantised matmul."""
