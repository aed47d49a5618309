"""Builds the embedding rewards of metrics that need embeddings of images or texts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from longalign import registry
from longalign.functional.preference import common_direction
from longalign.registry import PartConfig
from longalign.rewards.base import EmbeddingReward
from longalign.runtime import Runtime


def build_embedding_reward(config: PartConfig, runtime: Runtime) -> EmbeddingReward:
    """Builds the reward of a reward config and sets it to eval mode.

    Raises:
        ValueError: if the reward is not an `EmbeddingReward`, i.e. its score is no dot product of embeddings.
    """
    reward = registry.rewards.construct(config, runtime)
    if not isinstance(reward, EmbeddingReward):
        raise ValueError(
            f"the reward '{config.name}' has no embeddings; use a reward whose score is a dot product of "
            "embeddings (an EmbeddingReward), such as clip"
        )
    return reward.eval()


def text_direction(text: Tensor, prompts: Sequence[str]) -> Tensor:
    """Returns the normalized mean ``(d,)`` of the text embeddings of prompts; a repeated prompt counts once.

    Args:
        text: ``(n, d)`` text embeddings.
        prompts: the n prompts.
    """
    first = {prompt: i for i, prompt in reversed(list(enumerate(prompts)))}
    return common_direction(text[list(first.values())])
