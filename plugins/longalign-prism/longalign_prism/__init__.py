"""Composition of predictions for the parts of a prompt, as an encoder of longalign."""
