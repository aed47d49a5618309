"""Checks of an installation and of the published checkpoints. Importing this package does not import torch."""
