"""Base classes of reward configs. Does not import torch."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from longalign.registry import Part, PartConfig

Aspect = Literal["crop", "pad", "squash"]
TextMode = Literal["auto", "whole", "segments"]


class RewardConfig(PartConfig):
    """Base class of reward configs. Its class variables are checked before anything is loaded."""

    #: whether the reward is a `longalign.rewards.base.EmbeddingReward`; only those can be edited or reweighted
    embeds: ClassVar[bool] = False
    #: whether the scores have gradient with respect to the images
    differentiable: ClassVar[bool] = True
    #: whether the trainer `denscore` can train the reward: a `TowerReward` whose towers implement all hooks of `Towers`
    trainable_towers: ClassVar[bool] = False

    def is_differentiable(self) -> bool:
        """Whether the scores have gradient with respect to the images.

        For a composite reward, this depends on the inner rewards.
        """
        return self.differentiable


class TowerRewardConfig(RewardConfig):
    """Base class of the configs of rewards with an image and a text tower. Plugins may inherit from this class."""

    embeds: ClassVar[bool] = True

    text: TextMode = "auto"
    """how prompts are encoded. ``"auto"`` encodes a prompt that fits the text tower's window in one pass. It splits a
    longer prompt into as few windows of whole sentences as possible and averages their unit embeddings. ``"whole"``
    encodes one window and truncates longer prompts with a warning, as for published scores. ``"segments"`` averages the
    unit embeddings of all segments.
    """
    segmenter: Part("segmenters") | None = None
    """how prompts are split with ``text: segments``; null: into sentences."""
    truncate_segments: bool = False
    """whether a segment longer than the text tower's window is truncated with a warning, as in the LongAlign authors'
    code. false: it is split into segments that fit.
    """
    aspect: Aspect = "crop"
    """how non-square images are resized: ``"crop"`` keeps the centre, ``"pad"`` adds black borders, ``"squash"``
    changes the aspect ratio.
    """
    crop: int | float | None = None
    """side of a random crop in training mode, applied before the resize; null: no crop. An int is in pixels (504 of 512
    in the paper), a float is a fraction of each side.
    """
    crop_position: Literal["image", "batch"] = "image"
    """whether each image is cropped at its own random position, or all images of a ``"batch"`` at the same position, as
    in the LongAlign authors' code.
    """
    interpolation: Literal["bicubic", "bilinear"] | None = None
    """how images are resized, with antialiasing; null: as the checkpoint's processor does, which is ``"bicubic"`` for
    CLIP. The LongAlign authors' code uses ``"bilinear"``.
    """
    micro_batch: int | None = Field(default=None, ge=1)
    """number of images per pass of the image tower; null: all at once."""

    @model_validator(mode="before")
    @classmethod
    def _default_segmenter(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("segmenter") is None:
            text = values.get("text", cls.model_fields["text"].default)
            return {**values, "segmenter": "sentence" if text == "segments" else None}
        return values

    @model_validator(mode="after")
    def _check_effects(self) -> TowerRewardConfig:
        if self.text != "segments" and self.segmenter is not None:
            raise ValueError(
                f"a segmenter has no effect with `text: {self.text}`; set `text: segments` or remove `segmenter`"
            )
        if self.text != "segments" and self.truncate_segments:
            raise ValueError(
                f"truncate_segments has no effect with `text: {self.text}`; set `text: segments`, or remove it"
            )
        if self.crop is None and self.crop_position == "batch":
            raise ValueError("`crop_position: batch` has no effect without a crop; set `crop`, or remove it")
        return self

    @field_validator("crop")
    @classmethod
    def _check_crop(cls, crop: int | float | None) -> int | float | None:
        if isinstance(crop, float) and not 0 < crop < 1:
            raise ValueError(f"expected a crop fraction between 0 and 1, got {crop}; for pixels, use an int")
        if isinstance(crop, int) and crop < 1:
            raise ValueError(f"expected a crop of at least 1 pixel, got {crop}; for no crop, use null")
        return crop
