"""The backbones of the Stable Diffusion family: `sd`, `sdxl` and `sd3`."""
