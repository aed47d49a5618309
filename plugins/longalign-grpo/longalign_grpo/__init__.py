"""The trainer `grpo` of longalign: policy gradient with groups of samples."""
