"""Rewards with an edited text embedding: `edited`, and `reweighted`, which scales the text-irrelevant part."""
