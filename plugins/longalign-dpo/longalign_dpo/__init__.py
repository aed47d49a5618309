"""The trainer `dpo` of longalign: direct preference optimization on pairs of images."""
