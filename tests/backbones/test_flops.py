"""Counted operations of the published models; the expected numbers are from the same counter on their full networks."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from longalign.backbones.flops import FlopCount
from longalign.backbones.stable_diffusion.sd import SDBackbone
from longalign.encoders.base import Conditioning


@pytest.fixture(scope="module")
def count():
    """Stable Diffusion 1.5 on meta tensors."""
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8), AutoencoderKL()
    backbone = SDBackbone(unet, vae, torch.linspace(0.99, 0.01, 1000), "epsilon")
    return FlopCount(backbone.denoiser, backbone.call, trains_weights=False)


@pytest.mark.parametrize(
    ("tokens", "backward", "teraflop"), [(77, False, 0.803), (480, False, 0.837), (480, True, 1.779)]
)
def test_flops_of_stable_diffusion(count, tokens, backward, teraflop):
    latents = torch.empty(3, 4, 64, 64, device="meta")
    flops = count.of_call(latents, Conditioning(torch.empty(3, tokens, 768, device="meta")), backward)
    assert flops / 3e12 == pytest.approx(teraflop, rel=2e-3)
