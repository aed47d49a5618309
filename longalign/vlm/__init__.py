"""Vision-language models that choose an answer to a question about images: local, or behind an HTTP endpoint."""
