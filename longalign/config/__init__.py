"""Reads, checks, overrides and describes the config of a run. Does not import torch."""
