"""The encoder `ella` of longalign (ELLA, arXiv 2403.05135)."""
