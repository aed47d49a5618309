"""The config of the reward `siglip`; importing this module does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from longalign.rewards import TowerRewardConfig


class SiglipConfig(TowerRewardConfig):
    """The cosine similarity of SigLIP's image and text embeddings (Zhai et al. 2023, arXiv 2303.15343)."""

    target: ClassVar[str] = "longalign_siglip.reward:SiglipReward"

    name: Literal["siglip"] = "siglip"
    checkpoint: str = "google/siglip-so400m-patch14-384"
    """Hub id, or local folder in transformers layout, of a ``SiglipModel`` with its tokenizer."""
    revision: str | None = None
    """branch, tag or commit of the Hub repository."""
    aspect: Literal["crop", "pad", "squash"] = "squash"
