"""Ablations: trains variants of a config (cells) with several training seeds, and compares their metrics."""
