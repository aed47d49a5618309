"""The encoder `prism` of longalign, which composes predictions for the parts of a prompt (arXiv 2604.18258)."""
