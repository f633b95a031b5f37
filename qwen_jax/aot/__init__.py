"""What a training step will need and cost on a pod, found on a CPU host by compiling it.

topology: TPU slices by name, chips and their limits; nodes: those of GPUs; compile: the real train
step compiled for one; hlo: the compiler's text, parsed; work, collectives: what each operation
computes and moves; timeline: predicted seconds; report: one JSON object of it all; search: the
batch that fits best.
"""
