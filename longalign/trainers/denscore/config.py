"""Config of the trainer `denscore`. Does not import torch."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from longalign.errors import ConfigProblem
from longalign.trainers.config import TrainerConfig


class DenscoreTrainerConfig(TrainerConfig):
    """Trains the run's CLIP reward on preferences of pairs of images with long texts (LongAlign, section 3.2).

    The run has no backbone and no encoder. The reward's ``text`` setting determines how texts are encoded: segment by
    segment, as for Denscore, or whole, as for PickScore. The folder ``reward/`` of a checkpoint contains a transformers
    ``CLIPModel`` for the rewards `denscore`, `pickscore` and `clip`.
    """

    target: ClassVar[str] = "longalign.trainers.denscore.trainer:DenscoreTrainer"
    needs: ClassVar[tuple[str, ...]] = ()
    uses_rewards: ClassVar[bool] = True
    trains_rewards: ClassVar[bool] = True
    compares_pairs: ClassVar[bool] = True

    name: Literal["denscore"] = "denscore"
    train: Literal["all", "text", "vision", "projections"] = "all"
    """trainable parameters: ``"all"`` weights, the ``"text"`` or ``"vision"`` tower with its projection, or only the
    two ``"projections"``. The temperature is always trained.
    """
    preference_weight: float = Field(1.0, ge=0)
    """factor of PickScore's preference loss (arXiv 2305.01569, section 3); 0 disables the loss. It is the KL divergence
    from the annotated preference between the two images of a pair to the softmax of their scores. With ``text:
    segments``, the score of an image is the mean over the segments of the text.
    """
    contrastive_weight: float = Field(0.5, ge=0)
    """factor of a contrastive loss over segments, the sentences of a text: each segment must retrieve the image that it
    describes among all images of the batch. If the data has captions, the target of a caption's segments is its image.
    Otherwise the targets of a prompt's segments are both images of the pair, weighted by preference. 0 disables the
    loss.
    """

    @model_validator(mode="after")
    def _check_any_loss(self) -> DenscoreTrainerConfig:
        if not self.preference_weight and not self.contrastive_weight:
            raise ValueError("preference_weight and contrastive_weight are both 0, so there is no loss; increase one")
        return self

    def check_run(self, run: Any) -> list[ConfigProblem]:
        problems = []
        if len(run.rewards) != 1 or not run.rewards[0].trainable_towers:
            got = ", ".join(f"'{reward.name}'" for reward in run.rewards) or "none"
            problems.append(("rewards", f"'denscore' trains one reward: 'denscore', 'pickscore' or 'clip'; got {got}"))
        unused = {
            "monitor": "'denscore' generates no images; remove this key",
            "init_from": "'denscore' starts from its reward; set rewards.0.checkpoint to the folder instead",
        }
        return problems + [(key, message) for key, message in unused.items() if getattr(run, key) is not None]
