"""Latents and text states that are computed once and read in every epoch."""
