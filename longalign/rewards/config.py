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

        The scores of a reward that wraps others, such as ``sum``, have gradient if the scores of all of those have.
        """
        return self.differentiable


class TowerRewardConfig(RewardConfig):
    """Base class of the configs of `TowerReward`: rewards with an image encoder and a text encoder, such as CLIP.

    These encoders are called towers. The score is the cosine similarity of their embeddings. The window is the maximum
    number of tokens of the text tower, without special tokens: 75 for CLIP. Plugins may inherit from this class.
    """

    embeds: ClassVar[bool] = True

    text: TextMode = "auto"
    """how prompts are encoded. ``"auto"`` encodes a prompt of at most one window of tokens in one pass. It splits a
    longer prompt into as few windows of whole sentences as possible and averages their unit embeddings. ``"whole"``
    encodes one window and truncates longer prompts with a warning, as for published scores. ``"segments"`` splits each
    prompt with ``segmenter`` and averages the unit embeddings of the segments.
    """
    segmenter: Part("segmenters") | None = None
    """how prompts are split with ``text: segments``; null: into sentences. Not allowed with other values of ``text``.
    """
    truncate_segments: bool = False
    """with ``text: segments``, whether a segment longer than the text tower's window is truncated with a warning, as in
    the LongAlign authors' code. false: such a segment is split into segments that fit.
    """
    aspect: Aspect = "crop"
    """how images of a different aspect ratio than the image tower's input, usually square, are resized: ``"crop"``
    scales the shorter side and keeps the centre, ``"pad"`` scales the longer side and adds black borders, ``"squash"``
    scales both sides and so changes the aspect ratio.
    """
    crop: int | float | None = None
    """side of a random square crop in training mode, before the image is resized; null: no crop. An int is in pixels
    (504 of 512 in the LongAlign authors' code). A float between 0 and 1 is the fraction of height and width that is
    kept.
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
    """number of images per pass of the image tower; fewer need less memory. null: all images at once."""

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
