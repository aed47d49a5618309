"""The config of the reward `siglip`; importing this module does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from longalign.rewards import TowerRewardConfig
from pydantic import Field


class SiglipConfig(TowerRewardConfig):
    """Cosine similarity of image and text embeddings of SigLIP (arXiv 2303.15343) or SigLIP 2 (arXiv 2502.14786)."""

    target: ClassVar[str] = "longalign_siglip.reward:SiglipReward"

    name: Literal["siglip"] = "siglip"
    checkpoint: str = "google/siglip-so400m-patch14-384"
    """Hub id, or local folder in transformers layout, of a ``SiglipModel`` or ``Siglip2Model`` with its tokenizer."""
    revision: str | None = None
    """branch, tag or commit of the Hub repository; null: its default branch."""
    aspect: Literal["crop", "pad", "squash"] = "squash"
    max_num_patches: int | None = Field(None, ge=1)
    """maximum number of patches of an image, for NaFlex checkpoints of SigLIP 2, which accept any aspect ratio. null:
    that of the checkpoint, usually 256. Not allowed for other checkpoints.
    """
