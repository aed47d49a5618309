"""The reward `sum`."""
