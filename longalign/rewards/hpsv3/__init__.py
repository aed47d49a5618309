"""The reward `hpsv3`."""
