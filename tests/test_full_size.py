"""Full-size models, built without weights, have the published number of parameters."""

import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from longalign.rewards.hpsv2.weights import build_model


def clip_config(width, layers, heads, **overrides):
    """Config of a CLIP text or vision model."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, **overrides}


def unet21():
    return UNet2DConditionModel(
        sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True,
        upcast_attention=True,
    )  # fmt: skip


def vae():
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def t5_large():
    return T5EncoderModel(
        T5Config(d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16, is_encoder_decoder=False)
    )


def clip_h():
    towers = {"text_config": clip_config(1024, 24, 16), "vision_config": clip_config(1280, 32, 16, patch_size=14)}
    return CLIPModel(CLIPConfig(**towers, projection_dim=1024))


def hpsv2():
    settings = open_clip.get_model_config("ViT-H-14")
    state = open_clip.model.CLIP(**settings).state_dict()
    published = {
        "logit_scale": (), "positional_embedding": (77, 1024), "text_projection": (1024, 1024),
        "token_embedding.weight": (49408, 1024), "transformer.resblocks.23.mlp.c_fc.weight": (4096, 1024),
        "ln_final.bias": (1024,), "visual.class_embedding": (1280,), "visual.positional_embedding": (257, 1280),
        "visual.conv1.weight": (1280, 3, 14, 14), "visual.ln_pre.weight": (1280,), "visual.proj": (1280, 1024),
        "visual.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
    }  # fmt: skip
    assert {name: tuple(state[name].shape) for name in published} == published
    return build_model(settings, state, "here")


@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (unet21, 865_910_724),
        (vae, 83_653_863),
        (lambda: CLIPTextModel(CLIPTextConfig(**clip_config(768, 12, 12))), 123_060_480),
        (lambda: CLIPTextModel(CLIPTextConfig(**clip_config(1024, 23, 16))), 340_387_840),
        (
            lambda: CLIPTextModelWithProjection(CLIPTextConfig(**clip_config(1280, 32, 20), projection_dim=1280)),
            694_659_840,
        ),
        (t5_large, 334_939_648),
        (clip_h, 986_109_441),
        (hpsv2, 986_109_441),
    ],
    ids=["unet-2.1", "vae", "clip-l", "clip-h-text-2.1", "clip-bigg", "t5-large", "clip-h", "hpsv2"],
)
def test_full_size_parameter_count(build, parameters):
    with torch.device("meta"):
        model = build()
    assert sum(p.numel() for p in model.parameters()) == parameters
