"""How a trainer is run: processes, steps, logs, checkpoints, resuming."""
