"""The trainer `align`: fine-tuning with the diffusion loss on long captions."""
