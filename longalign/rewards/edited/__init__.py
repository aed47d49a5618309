"""Rewards with an edited text embedding: `edited`, and its short form `reweighted`."""
