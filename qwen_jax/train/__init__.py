"""Pretraining: pure step functions, losses, optimizer, and the loop with its checkpoints."""
