"""Attention kernels for TPUs, written in Pallas and lowered by Mosaic."""
