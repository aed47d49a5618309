"""Predictions from keys and values that were computed before equal those of ordinary calls."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from longalign.backbones.config import LoraConfig
from longalign.backbones.graphs import GraphedCall
from longalign.backbones.text_attention import ProjectedConditioning
from longalign.encoders.base import Conditioning
from longalign.testing.tiny import tiny_backbone

ROWS = torch.tensor([0, 1, 2, 2])


def backbone_with_lora(**lora):
    backbone = tiny_backbone()
    backbone.add_lora(LoraConfig(rank=2, **{"dropout": 0.0, **lora}), "x")
    for name, parameter in backbone.denoiser.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.3)
    return backbone.train()


def inputs(rows=4):
    return torch.randn(rows, 4, 4, 4), torch.full((rows,), 500)


def masked(length=5):
    mask = torch.arange(length) < torch.tensor([[2], [length], [3]])
    return Conditioning(torch.randn(3, length, 8), mask=mask)


def count_keys(unet):
    """Appends the number of rows of the states to the returned list whenever keys are computed from them."""
    counts = []
    for name, module in unet.named_modules():
        if name.endswith("attn2.to_k"):
            module.register_forward_hook(lambda module, args, out: counts.append(len(args[0])))
    return counts


@pytest.mark.parametrize("conditioning", [masked(), replace(masked(), mask=None)], ids=["mask", "no-mask"])
@torch.no_grad()
def test_projected_prediction_equals_plain(conditioning):
    backbone = backbone_with_lora()
    expected = backbone.predict(*(arguments := inputs()), conditioning[ROWS])
    counts = count_keys(backbone.denoiser)
    projected = backbone.project_text(conditioning)
    assert counts == [3] * 3  # of the distinct rows, in the tiny UNet's three transformer blocks
    got = backbone.predict(*arguments, projected[ROWS])
    assert len(counts) == 3
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    halved = projected.to(dtype=torch.float16)
    tensors = [halved.states, *(tensor for pair in halved.keys_values.values() for tensor in pair)]
    assert {tensor.dtype for tensor in tensors} == {torch.float16}


def gradients(backbone, conditioning, arguments, project):
    states = conditioning.states.clone().requires_grad_()
    conditioning = replace(conditioning, states=states)
    conditioning = project(conditioning)[ROWS]
    backbone.predict(*arguments, conditioning).square().sum().backward()
    out = [states.grad, *(p.grad for p in backbone.denoiser.parameters() if p.requires_grad)]
    backbone.zero_grad()
    return out


def test_projected_gradient_equals_plain():
    backbone, conditioning, arguments = backbone_with_lora(), masked(), inputs()
    expected = gradients(backbone, conditioning, arguments, lambda c: c)
    got = gradients(backbone, conditioning, arguments, backbone.project_text)
    assert all(g is not None for g in got)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    # keys and values without gradient are not used by calls with gradient
    got = gradients(backbone, conditioning, arguments, torch.no_grad()(backbone.project_text))
    torch.testing.assert_close(got[1:], expected[1:], rtol=1e-4, atol=1e-6)
    # with gradient checkpointing, they would be kept
    backbone.enable_gradient_checkpointing()
    assert backbone.project_text(conditioning) is conditioning


def test_projects_only_what_is_the_same_in_all_calls():
    class AtTimesteps(Conditioning):
        def at(self, timestep):
            return replace(self, states=self.states[..., :8] * timestep.view(-1, 1, 1))

    backbone, conditioning = backbone_with_lora(), masked()
    moving = AtTimesteps(conditioning.states.repeat(1, 1, 2))  # of its final width at a timestep only
    assert backbone.project_text(moving) is moving
    for placement in ("down", "up"):
        random = backbone_with_lora(dropout=0.1, dropout_placement=placement)
        assert random.project_text(conditioning) is conditioning
        assert isinstance(random.eval().project_text(conditioning), ProjectedConditioning)
    backbone.denoiser.set_attn_processor(AttnProcessor2_0())
    assert backbone.project_text(conditioning) is conditioning


@torch.no_grad()
def test_projected_prediction_under_autocast():
    """In training with mixed precision, only the wrapped denoiser's calls are under autocast."""
    backbone, conditioning, arguments = backbone_with_lora(), masked(), inputs()
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)

    def wrapped(*args, **kwargs):
        with autocast():
            return backbone.denoiser(*args, **kwargs)

    backbone.wrap_denoiser(wrapped, autocast)
    projected = backbone.project_text(conditioning)
    assert {k.dtype for kv in projected.keys_values.values() for k in kv} == {torch.bfloat16}
    expected = backbone.predict(*arguments, conditioning[ROWS])
    got = backbone.predict(*arguments, projected[ROWS])
    assert float((got - expected).float().norm() / expected.float().norm()) < 2e-2


@torch.no_grad()
def test_graphed_calls_use_their_own_keys_and_values():
    backbone = backbone_with_lora()

    def capture(call):
        output = call().clone()
        return lambda: output.copy_(call()), output

    graphed = GraphedCall(backbone.predict, lambda: backbone.denoiser.training, capture)
    for conditioning in (masked(), masked(), masked(7)):
        arguments, projected = inputs(), backbone.project_text(conditioning)[ROWS]
        for _ in range(2):
            expected = backbone.predict(*arguments, conditioning[ROWS])
            torch.testing.assert_close(graphed(*arguments, projected), expected, rtol=1e-5, atol=1e-6)
    assert len(graphed._graphs) == 2
