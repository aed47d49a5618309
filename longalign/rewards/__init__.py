"""Rewards: models and functions that score an image against its prompt, with gradient with respect to the image.

Public names are loaded on first use, so importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longalign.lazy import lazy_exports

if TYPE_CHECKING:
    from longalign.rewards.base import EmbeddingReward as EmbeddingReward
    from longalign.rewards.base import Reward as Reward
    from longalign.rewards.base import Scores as Scores
    from longalign.rewards.base import check_pairs as check_pairs
    from longalign.rewards.clip.config import ClipConfig as ClipConfig
    from longalign.rewards.clip.config import DenscoreConfig as DenscoreConfig
    from longalign.rewards.clip.config import PickScoreConfig as PickScoreConfig
    from longalign.rewards.clip.reward import ClipReward as ClipReward
    from longalign.rewards.config import RewardConfig as RewardConfig
    from longalign.rewards.config import TowerRewardConfig as TowerRewardConfig
    from longalign.rewards.edited.config import EditedConfig as EditedConfig
    from longalign.rewards.edited.config import ReweightedConfig as ReweightedConfig
    from longalign.rewards.edited.reward import EditedReward as EditedReward
    from longalign.rewards.guard import NonFiniteReward as NonFiniteReward
    from longalign.rewards.hpsv2.config import Hpsv2Config as Hpsv2Config
    from longalign.rewards.hpsv2.reward import Hpsv2Reward as Hpsv2Reward
    from longalign.rewards.hpsv3.config import Hpsv3Config as Hpsv3Config
    from longalign.rewards.hpsv3.reward import Hpsv3Reward as Hpsv3Reward
    from longalign.rewards.imagereward.config import ImageRewardConfig as ImageRewardConfig
    from longalign.rewards.imagereward.reward import ImageRewardReward as ImageRewardReward
    from longalign.rewards.pretrained import check_tokenizer as check_tokenizer
    from longalign.rewards.pretrained import image_processor_config as image_processor_config
    from longalign.rewards.pretrained import image_statistics as image_statistics
    from longalign.rewards.pretrained import projected_features as projected_features
    from longalign.rewards.segments.config import SegmentsConfig as SegmentsConfig
    from longalign.rewards.segments.reward import SegmentsReward as SegmentsReward
    from longalign.rewards.sum.config import SumConfig as SumConfig
    from longalign.rewards.sum.reward import SumReward as SumReward
    from longalign.rewards.towers import ImageInput as ImageInput
    from longalign.rewards.towers import TowerReward as TowerReward
    from longalign.rewards.towers import Towers as Towers
    from longalign.rewards.vqascore.config import VqaScoreConfig as VqaScoreConfig
    from longalign.rewards.vqascore.reward import VqaScoreReward as VqaScoreReward

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "ClipConfig": "clip.config",
        "ClipReward": "clip.reward",
        "DenscoreConfig": "clip.config",
        "EditedConfig": "edited.config",
        "EditedReward": "edited.reward",
        "EmbeddingReward": "base",
        "Hpsv2Config": "hpsv2.config",
        "Hpsv2Reward": "hpsv2.reward",
        "Hpsv3Config": "hpsv3.config",
        "Hpsv3Reward": "hpsv3.reward",
        "ImageInput": "towers",
        "ImageRewardConfig": "imagereward.config",
        "ImageRewardReward": "imagereward.reward",
        "NonFiniteReward": "guard",
        "PickScoreConfig": "clip.config",
        "Reward": "base",
        "RewardConfig": "config",
        "ReweightedConfig": "edited.config",
        "Scores": "base",
        "SegmentsConfig": "segments.config",
        "SegmentsReward": "segments.reward",
        "SumConfig": "sum.config",
        "SumReward": "sum.reward",
        "TowerReward": "towers",
        "TowerRewardConfig": "config",
        "Towers": "towers",
        "VqaScoreConfig": "vqascore.config",
        "VqaScoreReward": "vqascore.reward",
        "check_pairs": "base",
        "check_tokenizer": "pretrained",
        "image_processor_config": "pretrained",
        "image_statistics": "pretrained",
        "projected_features": "pretrained",
    },
)
