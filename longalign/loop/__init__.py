"""The training loop: processes, steps, logs, checkpoints, resuming."""
