"""The trainer `align`: noise-prediction fine-tuning on long captions."""
