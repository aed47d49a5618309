"""The reward `reweighted`, and common directions of text embeddings."""
