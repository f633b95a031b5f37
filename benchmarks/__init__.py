"""Benchmarks: re-runnable measurements, each against a named peer in the same run."""
