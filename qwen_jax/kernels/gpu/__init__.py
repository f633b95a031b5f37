"""Flash attention for Hopper GPUs in Pallas (Mosaic GPU): `flash.KERNEL`."""
