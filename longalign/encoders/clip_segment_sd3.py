"""Segment-level encoding for Stable Diffusion 3: two CLIPs side by side, then T5 (arXiv 2403.03206, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch.nn.functional import pad

from longalign.encoders.base import Conditioning, Encoder, PromptReport
from longalign.encoders.clip_segment_sdxl import ClipSegmentSDXLEncoder, load_clip_pair
from longalign.encoders.concat import join, merge_reports
from longalign.encoders.t5 import T5Encoder
from longalign.files import join_subfolder
from longalign.runtime import Runtime
from longalign.segment import Prompt

if TYPE_CHECKING:
    from longalign.encoders.configs import ClipSegmentSD3Config


class ClipSegmentSD3Encoder(Encoder):
    """The segments of a prompt through CLIP-L and OpenCLIP-bigG, filled up with zeros to the width of T5's states and
    followed by those: T5 reads the prompt as a whole. The pooled embedding is that of both CLIPs side by side.

    Args:
        clips: the two CLIPs, both with a projection.
        t5: T5's encoder, or None.
        zeros: without T5, how many states of zeros are in their place: 256 in diffusers' pipeline.
        width: of the states; 4096 in the published models.

    Raises:
        ValueError: if T5's states have another width, the CLIPs' are wider, or there are both T5 and zeros.
    """

    def __init__(
        self, clips: ClipSegmentSDXLEncoder, t5: T5Encoder | None = None, *, zeros: int = 0, width: int = 4096
    ):
        super().__init__()
        if clips.dim > width or (t5 is not None and t5.dim != width):
            conditioning = f"the two CLIPs' states are {clips.dim} wide" + (
                f", T5's {t5.dim}" if t5 is not None else ""
            )
            raise ValueError(
                f"expected states of T5 of width {width} and narrower ones of CLIP; {conditioning}; set width"
            )
        if t5 is not None and zeros:
            raise ValueError("zeros stand in the place of T5's states; give T5 or zeros, not both")
        self.clips, self.t5, self.zeros = clips, t5, zeros
        self.dim = width

    @classmethod
    def from_config(cls, config: ClipSegmentSD3Config, runtime: Runtime) -> ClipSegmentSD3Encoder:
        """Loads ``text_encoder``, ``text_encoder_2``, if it is wanted ``text_encoder_3`` (T5), and their tokenizers."""
        from transformers import CLIPTextModelWithProjection, T5EncoderModel

        from longalign.encoders.loading import load_text_model

        clips, t5 = load_clip_pair(config, runtime, CLIPTextModelWithProjection, empty="encode"), None
        if config.t5 == "encode":
            folder = join_subfolder(config.subfolder, "text_encoder_3")
            model, tokenizer = load_text_model(T5EncoderModel, config, folder, runtime)
            settings = {"overflow": config.overflow, "max_batch_tokens": config.max_batch_tokens}
            t5 = T5Encoder(model, tokenizer, max_tokens=config.t5_tokens, **settings)
            t5.setting = "t5_tokens"
        return cls(clips, t5, zeros=config.t5_tokens if config.t5 == "zeros" else 0, width=config.width)

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        conditioning = self.clips.encode(prompts)
        conditioning = replace(conditioning, states=pad(conditioning.states, (0, self.dim - self.clips.dim)))
        if self.t5 is not None:
            return join([conditioning, self.t5.encode(prompts)])
        blank = Conditioning(conditioning.states.new_zeros(len(conditioning.states), self.zeros, self.dim))
        return replace(join([conditioning, blank]), reports=conditioning.reports)

    def report(self, prompts: Sequence[Prompt]) -> list[PromptReport]:
        reports = self.clips.report(prompts)
        if self.t5 is None:
            return reports
        return [merge_reports(of_one) for of_one in zip(reports, self.t5.report(prompts), strict=True)]
