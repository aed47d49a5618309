"""Compiled denoisers predict and train as uncompiled ones."""

import shutil

import pytest
import torch
from torch import nn

from longalign.backbones.config import LoraConfig
from longalign.encoders.base import Conditioning
from longalign.loop.optimization import compiler
from longalign.testing.tiny import tiny_backbone

pytestmark = pytest.mark.reliability

COMPILERS = [
    "eager",
    pytest.param(
        "regional", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
    ),
]


@pytest.mark.parametrize("setting", COMPILERS)
@pytest.mark.filterwarnings("ignore")
def test_compiled_calls_equal_uncompiled(setting):
    backbone = tiny_backbone()
    for parameter in backbone.add_lora(LoraConfig(rank=2, dropout=0.0), "x"):
        nn.init.normal_(parameter, std=0.3)
    conditioning = Conditioning(torch.randn(3, 5, 8))
    latents, timesteps, rows = torch.randn(4, 4, 4, 4), torch.full((4,), 500), torch.tensor([0, 1, 2, 2])

    def results():
        with torch.no_grad(), backbone.merged_lora():
            sampled = backbone.predict(latents, timesteps, backbone.project_text(conditioning)[rows])
        backbone.predict(latents, timesteps, conditioning[rows]).square().sum().backward()
        gradients = [p.grad for p in backbone.denoiser.parameters() if p.requires_grad]
        backbone.zero_grad()
        return [sampled, *gradients]

    expected = results()
    if setting == "regional":
        backbone.compile_blocks(compiler(setting))
    else:
        backbone.wrap_denoiser(compiler(setting)(backbone.denoiser))
    for _ in range(2):
        torch.testing.assert_close(results(), expected, rtol=1e-3, atol=1e-5)
