"""Caches on disk: image latents and hidden states of text models, computed once and read in every epoch."""
