"""The config of the encoder `prism`; importing this module does not import torch."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from longalign.encoders import ClipTruncateConfig, EncoderConfig
from longalign.registry import Part
from longalign.segmenters import PackedConfig


class PrismConfig(EncoderConfig):
    """Predicts once for each part of a prompt and averages the predictions, as PRISM does (arXiv 2604.18258).

    The parts are pieces of the text, e.g. groups of sentences.
    """

    target: ClassVar[str] = "longalign_prism.encoder:PrismEncoder"

    name: Literal["prism"] = "prism"
    inner: Part("encoders") = ClipTruncateConfig()
    """the encoder that encodes each part as a prompt of its own. If it has a trainable adapter, this receives gradient
    through the average.
    """
    segmenter: Part("segmenters") = PackedConfig(n=75)
    """splits a prompt into its parts. Its maximum length is in tokens of the encoder ``inner``. The denoiser predicts
    once for each part, so more parts need more time.
    """

    def gives_pooled(self) -> bool | None:
        return self.inner.gives_pooled()

    def widths(self) -> tuple[int | None, int | None]:
        return self.inner.widths()

    def check_run(self, run: Any) -> list[tuple[str, str]]:
        if run.cache is None or not run.cache.prompts:
            return []
        return [("cache.prompts", "the parts of the prompts of 'prism' cannot be cached; set it to false")]
