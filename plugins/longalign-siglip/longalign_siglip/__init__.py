"""SigLIP as a reward of longalign."""
