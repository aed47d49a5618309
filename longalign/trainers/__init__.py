"""The trainers `align`, `lcm`, `reward`, `lcm-reward` and `denscore`, and their base classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from longalign.lazy import lazy_exports

if TYPE_CHECKING:
    from longalign.trainers.align.config import AlignConfig as AlignConfig
    from longalign.trainers.align.trainer import AlignTrainer as AlignTrainer
    from longalign.trainers.base import Trainer as Trainer
    from longalign.trainers.config import TrainerConfig as TrainerConfig
    from longalign.trainers.denscore.config import DenscoreTrainerConfig as DenscoreTrainerConfig
    from longalign.trainers.denscore.trainer import DenscoreTrainer as DenscoreTrainer
    from longalign.trainers.diffusion import DiffusionTrainer as DiffusionTrainer
    from longalign.trainers.diffusion import batch_latents as batch_latents
    from longalign.trainers.diffusion import noise_loss as noise_loss
    from longalign.trainers.diffusion import train_denoiser as train_denoiser
    from longalign.trainers.lcm.config import LCMConfig as LCMConfig
    from longalign.trainers.lcm.trainer import LCMTrainer as LCMTrainer
    from longalign.trainers.prediction import make_predictions as make_predictions
    from longalign.trainers.reward.config import LCMRewardConfig as LCMRewardConfig
    from longalign.trainers.reward.config import RewardConfig as RewardConfig
    from longalign.trainers.reward.trainer import RewardTrainer as RewardTrainer
    from longalign.trainers.rewards import RewardList as RewardList

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "AlignConfig": "align.config",
        "AlignTrainer": "align.trainer",
        "DenscoreTrainer": "denscore.trainer",
        "DenscoreTrainerConfig": "denscore.config",
        "DiffusionTrainer": "diffusion",
        "LCMConfig": "lcm.config",
        "LCMRewardConfig": "reward.config",
        "LCMTrainer": "lcm.trainer",
        "RewardConfig": "reward.config",
        "RewardList": "rewards",
        "RewardTrainer": "reward.trainer",
        "Trainer": "base",
        "TrainerConfig": "config",
        "batch_latents": "diffusion",
        "make_predictions": "prediction",
        "noise_loss": "diffusion",
        "train_denoiser": "diffusion",
    },
)
