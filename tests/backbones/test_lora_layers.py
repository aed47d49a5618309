"""The fused forward pass of LoRA layers equals that of peft."""

import copy

import pytest
import torch
from peft.tuners.lora import Conv2d, Linear
from torch import nn
from torch.nn.functional import dropout

from longalign.backbones.config import LoraConfig
from longalign.backbones.lora import inject_lora, lora_layers
from longalign.backbones.lora_layers import FusedConv2d, FusedLinear
from longalign.testing.tiny import tiny_unet


def unets(**lora):
    """The same UNet with a LoRA twice: with fused layers, and with those of peft."""
    fused = tiny_unet()
    inject_lora(fused, LoraConfig(**{"rank": 2, "dropout": 0.0, "scale": 0.7, **lora}), "x")
    fused.double()
    for _, layer in lora_layers(fused, "x"):
        nn.init.normal_(layer.lora_B["x"].weight, std=0.3)
    plain = copy.deepcopy(fused)
    for _, layer in lora_layers(plain, "x"):
        layer.__class__ = {FusedLinear: Linear, FusedConv2d: Conv2d}[type(layer)]
    return fused, plain


def outputs(unet, grad, channels_last=False):
    """Output, and the gradients of the latents and the LoRA."""
    torch.manual_seed(0)
    unet.zero_grad()
    latents = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    if channels_last:
        unet, latents = unet.to(memory_format=torch.channels_last), latents.to(memory_format=torch.channels_last)
    latents.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        out = unet(latents, torch.tensor([3, 700]), torch.randn(2, 3, 8, dtype=torch.float64))[0]
    if not grad:
        return [out]
    out.square().sum().backward()
    return [out, latents.grad, *(p.grad for p in unet.parameters() if p.requires_grad)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_fused_forward_equals_peft(grad, channels_last):
    fused, plain = unets()
    assert {type(layer) for _, layer in lora_layers(fused, "x")} == {FusedLinear, FusedConv2d}
    for got, expected in zip(*(outputs(unet, grad, channels_last) for unet in (fused, plain)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("placement", ["down", "up"])
def test_fused_forward_dropout(placement):
    fused, plain = unets(dropout=0.5, dropout_placement=placement)
    if placement == "up":  # which peft does not have
        for _, layer in lora_layers(plain, "x"):
            layer.lora_B["x"].register_forward_hook(lambda module, _, out: dropout(out, 0.5, module.training))
    for train in (True, False):
        (got,), (expected,) = (outputs(unet.train(train), grad=False) for unet in (fused, plain))
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_fused_forward_under_autocast():
    fused, plain = (unet.float() for unet in unets())
    latents, states = torch.randn(2, 4, 4, 4), torch.randn(2, 3, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, expected = (unet(latents, torch.tensor([3, 700]), states)[0] for unet in (fused, plain))
    assert got.dtype == expected.dtype
    assert float((got - expected).float().norm() / expected.float().norm()) < 2e-2


def test_fused_forward_half_precision_base():
    """Without autocast, the LoRA is cast to the dtype of the base weights."""
    fused, _ = unets()
    for parameter in fused.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else torch.bfloat16)
    out = fused(torch.randn(2, 4, 4, 4).bfloat16(), torch.tensor([3, 700]), torch.randn(2, 3, 8).bfloat16())[0]
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
