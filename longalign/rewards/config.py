"""Base classes of reward configs. Does not import torch."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from longalign.registry import Part, PartConfig

Aspect = Literal["crop", "pad", "squash"]
TextMode = Literal["auto", "whole", "segments"]


class RewardConfig(PartConfig):
    """Base class of reward configs.

    Its class variables declare properties of the reward, so that a reward that does not suit a run is rejected before
    any file is loaded.
    """

    #: whether the reward is a `longalign.rewards.base.EmbeddingReward`; only those can be edited or reweighted
    embeds: ClassVar[bool] = False
    #: whether the scores have gradient with respect to the images
    differentiable: ClassVar[bool] = True
    #: whether the trainer `denscore` can train the reward: a `TowerReward` whose towers implement all hooks of `Towers`
    trainable_towers: ClassVar[bool] = False

    def is_differentiable(self) -> bool:
        """Returns whether the scores have gradient with respect to the images.

        For a reward that contains other rewards, such as ``sum``: whether the scores of all of these have gradient.
        """
        return self.differentiable


class TowerRewardConfig(RewardConfig):
    """Base class of the configs of `TowerReward`: rewards with an image encoder and a text encoder, such as CLIP.

    These encoders are called towers. The score is the cosine similarity of their embeddings. The window is the maximum
    number of tokens of the text tower, without special tokens: 75 for CLIP. Plugins may inherit from this class.
    """

    embeds: ClassVar[bool] = True

    text: TextMode = "auto"
    """how prompts are encoded. A window is the maximum number of tokens of the text encoder, without special tokens: 75
    for CLIP. ``"auto"`` encodes a prompt of at most one window in one pass; a longer prompt is split into as few
    windows of whole sentences as possible, whose unit embeddings are averaged. ``"whole"`` encodes the first window of
    each prompt, as for published scores, with a warning about longer prompts. ``"segments"`` splits each prompt with
    ``segmenter`` and averages the unit embeddings of the segments.
    """
    segmenter: Part("segmenters") | None = None
    """with ``text: segments``, how prompts are split; null: into sentences. Otherwise it must be null."""
    truncate_segments: bool = False
    """with ``text: segments``, whether a segment of more tokens than the text encoder reads (75 for CLIP) is truncated
    with a warning, as in the LongAlign authors' code. false: such a segment is split into segments that fit.
    """
    aspect: Aspect = "crop"
    """how images are resized whose aspect ratio is not that of the image encoder's input, which is usually square:
    ``"crop"`` scales the shorter side and keeps the centre, ``"pad"`` scales the longer side and adds black borders,
    ``"squash"`` scales both sides and so changes the aspect ratio.
    """
    crop: int | float | None = None
    """size of a random crop in training mode, before the image is resized; null: no crop. An int is the side of a
    square in pixels (504 of 512 in the LongAlign authors' code). A float between 0 and 1 is the fraction of the height
    and of the width that is kept.
    """
    crop_position: Literal["image", "batch"] = "image"
    """``"image"`` crops each image at its own random position. ``"batch"`` crops all images of a batch at the same
    random position, as in the LongAlign authors' code; it requires ``crop``.
    """
    interpolation: Literal["bicubic", "bilinear"] | None = None
    """how images are resized, with antialiasing; null: as for the published model, which is ``"bicubic"`` for CLIP
    and models fine-tuned from it. The LongAlign authors' code uses ``"bilinear"``.
    """
    micro_batch: int | None = Field(default=None, ge=1)
    """number of images per pass of the image encoder; fewer need less memory. null: all images at once."""

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
                f"truncate_segments has no effect with `text: {self.text}`; set `text: segments`, or "
                "remove truncate_segments"
            )
        if self.crop is None and self.crop_position == "batch":
            raise ValueError(
                "`crop_position: batch` has no effect without a crop; set `crop`, or remove `crop_position`"
            )
        return self

    @field_validator("crop")
    @classmethod
    def _check_crop(cls, crop: int | float | None) -> int | float | None:
        if isinstance(crop, float) and not 0 < crop < 1:
            raise ValueError(
                f"expected a crop fraction between 0 and 1, got {crop}; for a crop in pixels, use an integer"
            )
        if isinstance(crop, int) and crop < 1:
            raise ValueError(f"expected a crop of at least 1 pixel, got {crop}; for no crop, use null")
        return crop
