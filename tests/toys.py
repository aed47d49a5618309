"""Rewards and images whose scores can be worked out by hand."""

from typing import ClassVar

import torch

from longalign.rewards.base import EmbeddingReward, Reward, Scores


class Compass(EmbeddingReward):
    """Text features are unit vectors by name; image features are the normalized channel means."""

    texts: ClassVar = {
        "east": (0.8, 0.6, 0.0),
        "west": (0.8, -0.6, 0.0),
        "up": (0.8, 0.0, 0.6),
        "down": (0.8, 0.0, -0.6),
    }

    def image_features(self, images):
        return torch.nn.functional.normalize(images.mean((2, 3)), dim=-1)

    def text_features(self, prompts):
        return torch.tensor([self.texts[p] for p in prompts])


class TableReward(EmbeddingReward):
    """Text embeddings from a table, or letter counts for other texts; image embeddings are normalised mean colours."""

    dim = 3

    def __init__(self, table: dict[str, list[float]]):
        super().__init__()
        self.table = table

    def image_features(self, images):
        return torch.nn.functional.normalize(images.mean((2, 3)), dim=-1)

    def text_features(self, prompts):
        letters = [[float(p.count(c)) + 0.1 for c in "aeo"] for p in prompts]
        return torch.tensor([self.table.get(p, row) for p, row in zip(prompts, letters, strict=True)])


class Brightness(Reward):
    def score_components(self, images, prompts):
        mean = images.mean((1, 2, 3))
        return Scores(mean, {"red": images[:, 0].mean((1, 2))})


def colours(*rgb):
    return torch.tensor(rgb, dtype=torch.float32)[:, :, None, None].expand(-1, -1, 4, 4)
