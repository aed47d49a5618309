"""The fused forward pass of LoRA layers equals that of peft."""

import copy

import pytest
import torch
from peft.tuners.lora import Conv2d, Linear
from torch import nn
from torch.nn.functional import dropout

from longalign.backbones.config import LoraConfig
from longalign.backbones.graphs import GraphedCall
from longalign.backbones.lora import inject_lora, lora_layers, temporarily_merged
from longalign.backbones.lora_layers import FusedConv2d, FusedLinear
from longalign.encoders.base import Conditioning
from longalign.testing.tiny import tiny_backbone, tiny_unet


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


@pytest.mark.parametrize("channels_last", [False, True])
def test_merged_call_equals_separate_and_restores_weights(channels_last):
    unet, _ = unets()
    before = {key: (parameter, parameter.detach().clone()) for key, parameter in unet.named_parameters()}
    expected = outputs(unet, False, channels_last)
    with temporarily_merged(unet, "x", None):
        torch.testing.assert_close(outputs(unet, False, channels_last), expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(RuntimeError), temporarily_merged(unet, "x", None):
        raise RuntimeError
    assert not any(layer.merged_weight is not None for _, layer in lora_layers(unet, "x"))
    assert all(p is before[key][0] and torch.equal(p, before[key][1]) for key, p in unet.named_parameters())


@pytest.mark.parametrize("placement", ["down", "up"])
def test_merged_weights_are_not_used_with_gradient_or_dropout(placement):
    unet, _ = unets(dropout=0.5, dropout_placement=placement)
    for train, grad in ((True, False), (True, True), (False, True)):
        expected = outputs(unet.train(train), grad)
        with temporarily_merged(unet, "x", None):
            got = outputs(unet, grad)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.fixture
def backbone():
    backbone = tiny_backbone()
    for i, parameter in enumerate(backbone.add_lora(LoraConfig(rank=2, dropout=0.0), "x")):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
    return backbone.train()


ARGUMENTS = torch.randn(2, 4, 4, 4), torch.full((2,), 500), Conditioning(torch.randn(2, 3, 8))


@torch.no_grad()
def test_reference_prediction_while_lora_is_merged(backbone):
    expected = backbone.predict_reference(*ARGUMENTS)
    with backbone.merged_lora():
        assert torch.equal(backbone.predict_reference(*ARGUMENTS), expected)
        assert not torch.allclose(backbone.predict(*ARGUMENTS), expected, atol=1e-3)


@torch.no_grad()
def test_merged_weights_have_dtype_of_autocast(backbone):
    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    def wrapped(*args, **kwargs):
        with autocast():
            return backbone.denoiser(*args, **kwargs)

    backbone.wrap_denoiser(wrapped, autocast)
    expected = backbone.predict(*ARGUMENTS)
    with backbone.merged_lora():
        assert {layer.merged_weight.dtype for _, layer in lora_layers(backbone.denoiser, "x")} == {torch.bfloat16}
        got = backbone.predict(*ARGUMENTS)
    assert float((got - expected).norm() / expected.norm()) < 2e-2


@torch.no_grad()
def test_merged_weights_in_half_precision_keep_small_updates(backbone):
    """Of updates of a thousandth of the weights, rounding to nearest bfloat16 would discard most."""
    layers = [layer for _, layer in lora_layers(backbone.denoiser, "x")]
    for layer in layers:
        base = layer.get_base_layer().weight
        base.data = base.data.bfloat16()
        layer.scaling["x"] *= float(1e-3 * base.float().norm() / layer.get_delta_weight("x").norm())
    updates = torch.cat([layer.get_delta_weight("x").flatten() for layer in layers])
    kept = []
    for _ in range(2):
        with backbone.merged_lora():
            difference = torch.cat([(m.merged_weight.float() - m.get_base_layer().weight).flatten() for m in layers])
            kept.append(float((difference * updates).sum() / updates.square().sum()))
    assert kept[0] == kept[1] == pytest.approx(1, abs=0.2)


@torch.no_grad()
def test_graphs_use_newly_merged_weights(backbone):
    """A graph keeps the addresses of the weights."""

    def capture(call):
        weights = [layer.merged_weight for _, layer in lora_layers(backbone.denoiser, "x")]
        captured.append([None if w is None else w.data_ptr() for w in weights])
        return lambda: output.copy_(call()), (output := call().clone())

    captured = []
    backbone._merge_buffers = {}
    graphed = GraphedCall(backbone.predict, lambda: backbone._is_merged, capture)
    for _ in range(2):
        expected = backbone.predict(*ARGUMENTS)
        with backbone.merged_lora():
            torch.testing.assert_close(graphed(*ARGUMENTS), expected)
            addresses = [layer.merged_weight.data_ptr() for _, layer in lora_layers(backbone.denoiser, "x")]
        torch.testing.assert_close(graphed(*ARGUMENTS), expected)
        assert captured == [addresses, [None] * len(addresses)]
        for _, layer in lora_layers(backbone.denoiser, "x"):
            layer.lora_B["x"].weight.mul_(1.5)
