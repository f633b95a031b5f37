"""Ahead-of-time analysis: compiles a training step for a pod that is not attached, on a CPU host.

topology: TPU slices by name, chips and their limits; nodes: the same for GPU nodes; compile: the
real train step, compiled for one of them; hlo: parser of the compiler's text; work, collectives:
FLOPs and bytes of each operation; timeline: predicted seconds; report: all results as one JSON
object; search: the best batch and remat policy.
"""
