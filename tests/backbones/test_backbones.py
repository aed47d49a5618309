"""What all backbones have in common, on tiny random checkpoints of each family."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from longalign.backbones.config import LoraConfig
from longalign.backbones.flux.backbone import FluxBackbone
from longalign.backbones.flux2.backbone import Flux2Backbone
from longalign.backbones.stable_diffusion.sd3 import SD3Backbone
from longalign.encoders.base import Conditioning
from longalign.registry import backbones
from longalign.runtime import Runtime
from longalign.testing import tiny, tiny_llm
from longalign.testing.backbones import check_backbone

FAMILIES = {
    "sd": (tiny.tiny_sd, {}),
    "sdxl": (tiny.tiny_sdxl, {}),
    "sd3": (tiny.tiny_sd3, {}),
    "sd3 3.5": (partial(tiny.tiny_sd3, qk_norm="rms_norm", dual_attention_layers=(0,)), {}),
    "flux": (tiny.tiny_flux, {"image_size": 32}),
    "flux2": (partial(tiny_llm.tiny_flux2, mistral=True), {"image_size": 32}),
    "pixart": (partial(tiny.tiny_pixart, size_conditions=True), {}),
    "sana": (tiny_llm.tiny_sana, {}),
    "qwen-image": (tiny_llm.tiny_qwen_image, {"image_size": 32}),
    "z-image": (tiny_llm.tiny_z_image, {"image_size": 32}),
}


def config_of(family, folder):
    write, settings = FAMILIES[family]
    return {"name": family.split()[0], "checkpoint": str(write(folder)), **settings}


@pytest.mark.parametrize("family", FAMILIES)
def test_backbone_conforms(family, tmp_path):
    check_backbone(config_of(family, tmp_path), lora=LoraConfig(rank=2, dropout=0.0))


class CopiesFromCpu(TorchFunctionMode):
    """Collects the functions that copy a tensor or a list from the CPU to the meta device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs, outputs = (
            {value.device.type for value in tree_leaves(values) if isinstance(value, torch.Tensor)}
            for values in ((args, kwargs), result)
        )
        from_cpu = "cpu" in inputs or (function in (torch.tensor, torch.as_tensor) and "meta" not in inputs)
        if from_cpu and "meta" in outputs:
            self.found.append(function)
        return result


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_call_copies_nothing_from_the_cpu(family, tmp_path):
    """A copy from the CPU waits for the GPU, and cannot be captured in a CUDA graph. Reading a meta tensor raises."""
    config = backbones.validate(config_of(family, tmp_path))
    if getattr(config, "uncapturable", ""):
        pytest.skip("CUDA graphs are rejected")
    backbone, (width, pooled) = backbones.construct(config, Runtime()).eval(), config.widths()
    backbone.denoiser.to("meta")
    latents = torch.empty(2, *backbone.latent_shape(), device="meta")
    conditioning = Conditioning(torch.empty(2, 7, width, device="meta"))
    if not isinstance(backbone, (SD3Backbone, FluxBackbone, Flux2Backbone)):  # these take no mask
        conditioning = replace(conditioning, mask=torch.ones(2, 7, dtype=torch.bool, device="meta"))
    if config.has_pooled:
        conditioning = replace(conditioning, pooled=torch.empty(2, pooled, device="meta"))
    timesteps = torch.full((2,), 10, device="meta")
    backbone.predict(latents, timesteps, conditioning)  # the first call may copy tables
    with CopiesFromCpu() as copies:
        backbone.predict(latents, timesteps, conditioning)
    assert not copies.found


def test_qwen_image_weights_without_effect_stay_frozen(tmp_path):
    backbone = backbones.build(config_of("qwen-image", tmp_path))
    unused = set(backbone.unused_weights())
    assert len(backbone.train_all()) == len(list(backbone.denoiser.parameters())) - len(unused)
    frozen = {name for name, parameter in backbone.denoiser.named_parameters() if not parameter.requires_grad}
    layers = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    assert {name.rpartition(".")[0] for name in frozen} == {f"transformer_blocks.1.{layer}" for layer in layers}
    before = backbone.predict(*inputs())
    with torch.no_grad():
        for parameter in backbone.unused_weights().values():
            parameter.add_(1)
    assert frozen == unused and torch.equal(backbone.predict(*inputs()), before)
    with pytest.raises(ValueError, match=r"cannot change the prediction.* got transformer_blocks\.1\.txt_mlp\.net\.2;"):
        backbone.add_lora(LoraConfig(targets=["1.txt_mlp.net.2"]), "x")


def inputs():
    torch.manual_seed(0)
    return torch.randn(1, 4, 8, 8), torch.tensor([500]), Conditioning(torch.randn(1, 5, 16))
