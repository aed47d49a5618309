"""Configs of the CLIP rewards. Does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from longalign.errors import ConfigProblem
from longalign.files.paths import join_subfolder
from longalign.hub import availability_problem, checkpoint_problem
from longalign.rewards.config import TextMode, TowerRewardConfig

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class ClipLikeConfig(TowerRewardConfig):
    """Base class of the configs of rewards that use a transformers ``CLIPModel``."""

    target: ClassVar[str] = "longalign.rewards.clip.reward:ClipReward"
    trainable_towers: ClassVar[bool] = True
    default_processor: ClassVar[str] = CLIP_H

    checkpoint: str
    """Hub id, or local folder in transformers layout, with the weights of a ``CLIPModel``."""
    revision: str | None = None
    """branch, tag or commit of the Hub repository of ``checkpoint``; null: its main branch."""
    subfolder: str | None = None
    """subfolder of ``checkpoint`` with the weights; null: ``checkpoint`` itself."""
    variant: str | None = None
    """file variant of the weights, e.g. ``"fp16"`` for ``model.fp16.safetensors``; null: files without a variant."""
    processor: str | None = None
    """Hub id or local folder with the tokenizer, and with the mean and standard deviation by which images are
    normalized. null: ``checkpoint`` if it contains a tokenizer, otherwise CLIP-H, from which PickScore and Denscore
    were trained.
    """

    def check_files(self) -> list[ConfigProblem]:
        config = [join_subfolder(self.subfolder, "config.json")]
        problem = checkpoint_problem(self.checkpoint, config, self.revision)
        problems = [("checkpoint", problem)] if problem else []
        return problems + (
            [("processor", problem)] if self.processor and (problem := availability_problem(self.processor)) else []
        )


class ClipConfig(ClipLikeConfig):
    """Cosine similarity of CLIP's image and text embeddings. The default weights are CLIP-H."""

    name: Literal["clip"] = "clip"
    checkpoint: str = CLIP_H


class PickScoreConfig(ClipLikeConfig):
    """PickScore (Kirstain et al. 2023, arXiv 2305.01569): CLIP-H fine-tuned on the preferences of Pick-a-Pic."""

    name: Literal["pickscore"] = "pickscore"
    checkpoint: str = "yuvalkirstain/PickScore_v1"


class DenscoreConfig(ClipLikeConfig):
    """Denscore (LongAlign, paper 3.2): CLIP-H fine-tuned on preferences for long prompts.

    By default, each sentence of a prompt is encoded separately, and the score is the mean of the sentences' scores.
    """

    name: Literal["denscore"] = "denscore"
    checkpoint: str = "luping-liu/Denscore"
    text: TextMode = "segments"
