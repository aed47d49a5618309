"""Rewards that change the text embedding of an inner reward: `edited`, and its special case `reweighted`."""
