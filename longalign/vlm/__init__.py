"""Vision-language models that choose an answer to a question about images, run locally or at an HTTP endpoint."""
