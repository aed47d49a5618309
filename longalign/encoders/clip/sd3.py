"""Segment-level encoding for Stable Diffusion 3: two CLIPs and T5 (arXiv 2403.03206, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

from torch import nn
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from longalign.encoders.base import Conditioning, Encoder, PromptReport
from longalign.encoders.clip.config import ClipSegmentSD3Config
from longalign.encoders.clip.sdxl import ClipSegmentSDXLEncoder, load_clip_pair
from longalign.encoders.concat import join, merge_reports
from longalign.encoders.loading import load_text_model
from longalign.encoders.t5.config import T5Config
from longalign.encoders.t5.encoder import T5Encoder
from longalign.files.paths import join_subfolder
from longalign.runtime import Runtime
from longalign.segmenters import Prompt, Segmenter


class ClipSegmentSD3Encoder(Encoder):
    """Encodes segments with CLIP-L and OpenCLIP-bigG, and appends T5's states of the whole prompt.

    The states of both CLIPs are concatenated along the channel axis and padded with zeros to ``width``. T5's states are
    appended along the sequence axis. The pooled embeddings of both CLIPs are concatenated too.

    Args:
        clips: encoder with the two CLIPs, both with a projection.
        t5: encoder with T5; None to append ``num_zeros`` zero states instead.
        num_zeros: number of zero states per prompt, 256 in the diffusers pipeline without T5. Must be 0 with ``t5``.
        width: width of the returned states; 4096 in the published models.

    Raises:
        ValueError: if T5's width is not ``width``, if the CLIPs' states are wider than ``width``, or if
            ``num_zeros`` is not 0 although ``t5`` is given.
    """

    def __init__(self, clips: ClipSegmentSDXLEncoder, t5: T5Encoder | None, *, num_zeros: int, width: int):
        super().__init__()
        if clips.dim > width or (t5 is not None and t5.dim != width):
            widths = f"{clips.dim} from the two CLIPs" + (f" and {t5.dim} from T5" if t5 is not None else "")
            raise ValueError(
                f"expected states of width {width} from T5 and at most {width} from CLIP, got {widths}; set "
                "'width' to the denoiser's joint_attention_dim, and use a T5 of that width"
            )
        if t5 is not None and num_zeros:
            raise ValueError(f"expected either T5 or num_zeros, got both T5 and num_zeros={num_zeros}; pass only one")
        self.clips, self.t5, self.num_zeros = clips, t5, num_zeros
        self.dim = width

    @classmethod
    def from_config(cls, config: ClipSegmentSD3Config, runtime: Runtime) -> ClipSegmentSD3Encoder:
        """Loads ``text_encoder``, ``text_encoder_2`` and, if ``config.t5`` is ``"encode"``, ``text_encoder_3``.

        Also loads their tokenizers, and builds the segmenter.

        Raises:
            ValueError: if the checkpoint does not exist or is incomplete.
        """
        models, tokenizers = load_clip_pair(config, runtime, CLIPTextModelWithProjection, None)
        t5 = None
        if config.t5 == "encode":
            folder = join_subfolder(config.subfolder, "text_encoder_3")
            t5 = load_text_model(T5EncoderModel, config, folder, runtime)
        segmenter = config.segmenter.build(runtime)
        return cls.from_modules(config, models, tokenizers, segmenter, t5)

    @classmethod
    def from_modules(
        cls,
        config: ClipSegmentSD3Config,
        text_models: Sequence[nn.Module],
        tokenizers: Sequence[Any],
        segmenter: Segmenter,
        t5: tuple[nn.Module, Any] | None,
    ) -> Self:
        """Builds the encoder from loaded modules, with the settings of a config.

        Args:
            config: settings of the three encoders.
            text_models: two ``CLIPTextModelWithProjection``.
            tokenizers: the fast tokenizers of ``text_models``, which differ only in padding.
            segmenter: splits a prompt into segments.
            t5: a ``T5EncoderModel`` and its fast tokenizer if ``config.t5`` is ``"encode"``, otherwise None.
        """
        clips = ClipSegmentSDXLEncoder.from_modules(config, text_models, tokenizers, segmenter, empty="encode")
        num_zeros = config.t5_tokens if config.t5 == "zeros" else 0
        if t5 is None:
            return cls(clips, None, num_zeros=num_zeros, width=config.width)
        settings = T5Config(
            max_tokens=config.t5_tokens, overflow=config.overflow, max_batch_tokens=config.max_batch_tokens
        )
        t5_encoder = T5Encoder.from_modules(settings, *t5, None, length_key="t5_tokens")
        return cls(clips, t5_encoder, num_zeros=num_zeros, width=config.width)

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        conditioning = self.clips.encode(prompts)
        conditioning = replace(conditioning, states=pad(conditioning.states, (0, self.dim - self.clips.dim)))
        if self.t5 is not None:
            return join([conditioning, self.t5.encode(prompts)])
        zeros = Conditioning(conditioning.states.new_zeros(len(conditioning.states), self.num_zeros, self.dim))
        return replace(join([conditioning, zeros]), reports=conditioning.reports)

    def report(self, prompts: Sequence[Prompt]) -> list[PromptReport]:
        reports = self.clips.report(prompts)
        if self.t5 is None:
            return reports
        return [merge_reports(prompt_reports) for prompt_reports in zip(reports, self.t5.report(prompts), strict=True)]
