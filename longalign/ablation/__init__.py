"""Ablations: trains and measures the cells of a grid over several training seeds."""
