"""The reward `segments`."""
