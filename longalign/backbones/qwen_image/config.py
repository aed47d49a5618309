"""Config of the backbone `qwen-image`. Does not import torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from longalign.backbones.config import ImageSizeConfig


class QwenImageConfig(ImageSizeConfig):
    """Qwen-Image, or any model with the same layout: a transformer trained with flow matching.

    Its encoder is ``llm`` with the model's checkpoint, the model's prompt template and ``prefix: none``. As in
    diffusers' pipeline, the guided prediction of each image token is scaled to the norm of the conditional prediction.
    By default, a LoRA is on all attention layers. Layers of the last block that only change the text, which is not used
    after it, are not trained.
    """

    target: ClassVar[str] = "longalign.backbones.qwen_image.backbone:QwenImageBackbone"
    has_pooled: ClassVar[bool | None] = False
    uncapturable: ClassVar[str] = "copies a number from the CPU in each call with a mask"

    name: Literal["qwen-image"] = "qwen-image"
    checkpoint: str
    """Hub id, e.g. ``Qwen/Qwen-Image``, or local folder in diffusers layout."""

    def widths(self) -> tuple[int | None, int | None]:
        return self.number_of("joint_attention_dim"), None
