"""The reward `siglip` of longalign (SigLIP, arXiv 2303.15343; SigLIP 2, arXiv 2502.14786)."""
