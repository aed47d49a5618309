"""The backbone `qwen-image`: Qwen-Image."""
