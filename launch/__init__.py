"""One program per job: it parses a config, calls one stage, and nothing else."""
