"""Tensor maths without state: diffusion, rollouts, preference decomposition, image operations."""
