"""Reads, checks, changes and describes the config of a run. Importing this package does not import torch."""
