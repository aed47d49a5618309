"""Long-text alignment of text-to-image diffusion models."""
