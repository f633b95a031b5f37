"""Measuring models: held-out text and benchmarks, beside honest baselines."""
