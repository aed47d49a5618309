"""Latents and text states that are computed once and read by every epoch."""
