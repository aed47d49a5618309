"""Latents and hidden states of text models that are computed once and read in every epoch."""
