"""Packed windows to global batches: the batch of a step is a pure function of the step."""
