"""LoRAs on denoisers of several families: targets, merging, files for diffusers."""

import diffusers
import pytest
import torch

from longalign.backbones.config import LoraConfig
from longalign.backbones.lora import (
    LoraWeights,
    concat_loras,
    inject_lora,
    lora_layers,
    lora_targets,
    merge_into_base,
    peft_settings,
    read_lora,
)
from longalign.testing.tiny import tiny_unet

HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
TEXT = {"encoder_hidden_states": torch.randn(1, 3, 16)}


def tiny_flux():
    return diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=16, pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4), **HEADS,
    )  # fmt: skip


def tiny_pixart():
    return diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=1, in_channels=4, out_channels=8, caption_channels=16, cross_attention_dim=16, **HEADS
    )


def tiny_hunyuan():
    return diffusers.HunyuanDiT2DModel(
        hidden_size=16, num_layers=2, cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=16,
        text_len=8, text_len_t5=8, sample_size=8, in_channels=4, patch_size=2, **HEADS,
    )  # fmt: skip


def run(model):
    """Output of one denoiser call."""
    torch.manual_seed(1)
    time = torch.tensor([500.0])
    with torch.no_grad():
        if isinstance(model, diffusers.FluxTransformer2DModel):
            ids = {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3)}
            return model(
                torch.randn(1, 4, 4), timestep=time, pooled_projections=torch.randn(1, 8), **ids, **TEXT
            ).sample
        extra = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        return model(torch.randn(1, 4, 8, 8), timestep=time, **TEXT, **extra).sample


def perturbed(model, config, name):
    """Adds a LoRA with random weights and returns it."""
    inject_lora(model, config, name)
    with torch.no_grad():
        for _, layer in lora_layers(model, name):
            layer.lora_B[name].weight.normal_(std=0.3)
    return LoraWeights(name, config, {k: v.clone() for k, v in read_lora(model, name).items()})


@pytest.mark.parametrize(("build", "default"), [(tiny_flux, 8 + 3), (tiny_pixart, 2 * 4), (tiny_hunyuan, 2 * 2 * 4)])
def test_lora_default_is_the_attention_of_any_family(build, default):
    model = build()
    parameters = inject_lora(model, LoraConfig(rank=2), "x")
    assert len(parameters) == 2 * default == 2 * len(lora_layers(model, "x"))
    assert sum(p.requires_grad for p in model.parameters()) == len(parameters)


def test_lora_targets_by_suffix_and_regular_expression():
    model = tiny_flux()
    assert lora_targets(model, ["attn.to_q", "proj_out"]) == [
        "transformer_blocks.0.attn.to_q",
        "single_transformer_blocks.0.proj_out",
        "single_transformer_blocks.0.attn.to_q",
        "proj_out",
    ]
    assert lora_targets(model, r"transformer_blocks.*to_[kv]") == [
        "transformer_blocks.0.attn.to_k",
        "transformer_blocks.0.attn.to_v",
    ]
    # exactly the selected layers, not also those with longer names
    inject_lora(model, LoraConfig(rank=2, targets="proj_out"), "x")
    assert [name for name, _ in lora_layers(model, "x")] == ["proj_out"]


def test_lora_without_targets_lists_the_layers():
    with pytest.raises(ValueError, match=r"'to_z'\. Its .* transformer_blocks\.\*\.attn1\.to_q, "):
        inject_lora(tiny_pixart(), LoraConfig(targets=["to_q", "to_z"]), "x")
    with pytest.raises(ValueError, match=r"Sequential.*lora.targets.* layers: 0\.1"):
        lora_targets(torch.nn.Sequential(torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(2, 2))))
    with pytest.raises(ValueError, match="regular expression"):
        LoraConfig(targets="(")


@pytest.mark.parametrize("build", [tiny_flux, tiny_pixart])
def test_loras_with_different_targets_stack_merge_and_load_in_diffusers(build):
    torch.manual_seed(0)
    model = build().eval()
    base = build().eval()
    base.load_state_dict(model.state_dict())
    configs = [LoraConfig(rank=2, dropout=0), LoraConfig(rank=3, scale=0.5, dropout=0, targets=["to_q", "ff.net.2"])]
    loras = []
    for i, config in enumerate(configs):
        loras.append(perturbed(model, config, str(i)))
        merge_into_base(model, str(i))
    expected = run(model)
    assert not torch.allclose(expected, run(base), atol=1e-2)
    joined = concat_loras(loras)
    if not hasattr(base, "load_lora_adapter"):  # diffusers loads no LoRA for this family
        return
    metadata = {f"transformer.{key}": value for key, value in peft_settings(joined).items()}
    base.load_lora_adapter({f"transformer.{k}": v for k, v in joined.items()}, prefix="transformer", metadata=metadata)
    torch.testing.assert_close(run(base), expected, atol=1e-5, rtol=1e-4)


def test_lora_default_of_a_unet_ignores_nothing_it_had():
    names = lora_targets(tiny_unet())
    assert any("resnets" in name for name in names) and any("ff.net.0.proj" in name for name in names)
