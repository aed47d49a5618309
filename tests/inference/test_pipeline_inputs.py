"""`condition` for the pipelines of diffusers: what they take, and tiny ones that run with it.

``tests/test_docs.py`` writes the table of all pipelines in docs/pipelines.md from `rows`.
"""

import inspect

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from longalign import condition
from longalign.encoders.base import Conditioning, Encoder
from longalign.inference.inputs import prompt_inputs

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
NO_TEXT = {"text_encoder": None, "tokenizer": None}
NO_TEXTS = {**NO_TEXT, "text_encoder_2": None, "tokenizer_2": None}


class Random(Encoder):
    """States of a random width; the first half of each prompt's states is real if masked."""

    def __init__(self, dim, pooled=None, masked=True):
        super().__init__()
        self.dim, self.pooled, self.masked = dim, pooled, masked

    def encode(self, prompts):
        count = len(prompts)
        mask = torch.arange(6) < torch.arange(2, 2 + count)[:, None] if self.masked else None
        pooled = None if self.pooled is None else torch.randn(count, self.pooled)
        return Conditioning(torch.randn(count, 6, self.dim), mask, pooled)


def kl(factor=2):
    blocks = factor.bit_length()
    return AutoencoderKL(
        norm_num_groups=4, block_out_channels=(4,) * blocks, down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
    )  # fmt: skip


def flow(**settings):
    return FlowMatchEulerDiscreteScheduler(**settings)


def tiny_flux():
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=12, pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4), **HEADS,
    )  # fmt: skip
    return diffusers.FluxPipeline(flow(), kl(), transformer=transformer, **NO_TEXTS)


def tiny_flux2(name):
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=12, axes_dims_rope=(2, 2, 2, 2), **HEADS,
        guidance_embeds=name == "Flux2Pipeline",
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        norm_num_groups=4, block_out_channels=(4, 4), latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return getattr(diffusers, name)(flow(), vae, None, None, transformer)


def tiny_chroma():
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=12, axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8, approximator_hidden_dim=8, approximator_layers=1, **HEADS,
    )  # fmt: skip
    return diffusers.ChromaPipeline(flow(), kl(), transformer=transformer, **NO_TEXT)


def tiny_pixart(name):
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=1, in_channels=4, out_channels=8, caption_channels=12, cross_attention_dim=16, **HEADS
    )
    scheduler = diffusers.DDIMScheduler()
    return getattr(diffusers, name)(vae=kl(), transformer=transformer, scheduler=scheduler, **NO_TEXT)


def tiny_hunyuan():
    transformer = diffusers.HunyuanDiT2DModel(
        hidden_size=16, num_layers=2, cross_attention_dim=12, cross_attention_dim_t5=24, pooled_projection_dim=16,
        text_len=8, text_len_t5=9, sample_size=8, in_channels=4, patch_size=2, **HEADS,
    )  # fmt: skip
    return diffusers.HunyuanDiTPipeline(
        vae=kl(8), transformer=transformer, scheduler=diffusers.DDPMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False, **NO_TEXTS,
    )  # fmt: skip


def tiny_sana():
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_cross_attention_heads=2, cross_attention_head_dim=8,
        cross_attention_dim=16, caption_channels=12, sample_size=8, **HEADS,
    )  # fmt: skip
    return diffusers.SanaPipeline(vae=None, transformer=transformer, scheduler=flow(), **NO_TEXT)


def tiny_qwen():
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=64, out_channels=16, num_layers=1, joint_attention_dim=12, axes_dims_rope=(2, 2, 4), **HEADS
    )
    return diffusers.QwenImagePipeline(flow(), vae=None, transformer=transformer, **NO_TEXT)


def tiny_lumina():
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8, hidden_size=16, num_layers=1, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1,
        multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32), cap_feat_dim=12, in_channels=4,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(transformer, flow(), kl(), **NO_TEXT)


def tiny_z_image():
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
        axes_dims=[4, 2, 2], axes_lens=[64, 32, 32],
    )  # fmt: skip
    return diffusers.ZImagePipeline(flow(), kl(), transformer=transformer, **NO_TEXT)


RUN = {
    "FluxPipeline": (tiny_flux, [Random(12, 10, masked=False)]),
    "Flux2Pipeline": (lambda: tiny_flux2("Flux2Pipeline"), [Random(12, masked=False)]),
    "Flux2KleinPipeline": (lambda: tiny_flux2("Flux2KleinPipeline"), [Random(12, masked=False)]),
    "ChromaPipeline": (tiny_chroma, [Random(12)]),
    "PixArtAlphaPipeline": (lambda: tiny_pixart("PixArtAlphaPipeline"), [Random(12)]),
    "PixArtSigmaPipeline": (lambda: tiny_pixart("PixArtSigmaPipeline"), [Random(12, masked=False)]),
    "HunyuanDiTPipeline": (tiny_hunyuan, [Random(12), Random(24)]),
    "SanaPipeline": (tiny_sana, [Random(12)]),
    "QwenImagePipeline": (tiny_qwen, [Random(12)]),
    "Lumina2Pipeline": (tiny_lumina, [Random(12)]),
    "ZImagePipeline": (tiny_z_image, [Random(12)]),
}
"""Pipelines that run in these tests, as builder and encoders of the right widths."""
ALSO_RUN = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline")
"""Pipelines that tests/inference/test_diffusers_pipeline.py runs."""


@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning")  # inside diffusers' Chroma
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", RUN)
def test_pipelines_run_with_conditioning(name, dtype):
    build, encoders = RUN[name]
    torch.manual_seed(0)
    pipe = build().to(dtype)
    pipe.set_progress_bar_config(disable=True)
    arguments = condition(pipe, ["A fox.", "A wall."], encoder=encoders)
    sizes = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "latent"}
    if "use_resolution_binning" in inspect.signature(pipe.__call__).parameters:
        sizes["use_resolution_binning"] = False
    latents = pipe(**arguments, **sizes)[0]
    assert len(latents) == 2 and all(bool(latent.isfinite().all()) for latent in latents)


def test_condition_takes_widths_from_what_feeds_the_denoiser():
    pipe = tiny_pixart("PixArtAlphaPipeline")
    with pytest.raises(ValueError, match="width 12 in 'prompt_embeds', got 16"):
        condition(pipe, "A fox.", encoder=Random(16))  # the width of cross-attention
    with pytest.raises(ValueError, match="pooled embedding of width 10, got 11"):
        condition(tiny_flux(), "A fox.", encoder=Random(12, 11))
    mask = condition(pipe, "A fox.", encoder=Random(12, masked=False))["prompt_attention_mask"]
    assert mask.shape == (1, 6) and bool(mask.all())


def test_condition_of_several_sequences_pads_to_the_only_length():
    pipe, encoders = tiny_hunyuan(), [Random(12), Random(24)]
    out = condition(pipe, "A fox.", encoder=encoders)
    assert out["prompt_embeds"].shape == (1, 8, 12) and out["negative_prompt_embeds_2"].shape == (1, 9, 24)
    assert out["prompt_attention_mask"].tolist() == [[1, 1, 0, 0, 0, 0, 0, 0]]
    expected = r"'prompt_embeds' of width 12, 'prompt_embeds_2' of width 24: 2 .* got 1 encoder"
    with pytest.raises(ValueError, match=expected):
        condition(pipe, "A fox.", encoder=encoders[0])
    pipe.transformer.register_to_config(text_len=5)
    with pytest.raises(ValueError, match=r"5 .*'prompt_embeds', got 6"):
        condition(pipe, "A fox.", encoder=encoders)


def test_condition_gives_lists_without_padding():
    out = condition(tiny_z_image(), ["A fox.", "A wall."], encoder=Random(12))
    assert [row.shape for row in out["prompt_embeds"]] == [(2, 12), (3, 12)]
    assert [row.shape for row in out["negative_prompt_embeds"]] == [(4, 12), (5, 12)]


def test_condition_names_what_no_encoder_gives():
    pipe = object.__new__(diffusers.HiDreamImagePipeline)
    object.__setattr__(pipe, "unet", torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="HiDreamImagePipeline takes states of every layer of Llama 3"):
        condition(pipe, "A fox.", encoder=Random(12))
    assert prompt_inputs(diffusers.KandinskyV22CombinedPipeline).sequences == ()
