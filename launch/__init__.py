"""Programs with absl flags, one per job: each parses its flags and calls one library stage."""
