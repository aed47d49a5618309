"""Single-file checkpoints with the original weight names, converted here from tiny models in diffusers layout."""

import re
import shutil

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from longalign.backbones.stable_diffusion.config import SDConfig, SDXLConfig
from longalign.runtime import Runtime
from longalign.testing.tiny import tiny_sd, tiny_sdxl

CPU = Runtime()
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
ENDS = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_norm_out": "out.0",
    "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip


def original_unet(unet):
    """The UNet's weights under the names of the latent-diffusion code, which numbers all blocks consecutively."""
    per_block, state = unet.config.layers_per_block + 1, {}
    has_attention = [block.startswith("CrossAttn") for block in unet.config.up_block_types]
    for key, value in unet.state_dict().items():
        name = next((new + key.removeprefix(old) for old, new in ENDS.items() if key.startswith(f"{old}.")), key)
        match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key)
        if match:
            direction, block, kind, layer, rest = match.groups()
            group, offset = ("input_blocks", 1) if direction == "down" else ("output_blocks", 0)
            index = offset + int(block) * per_block + (per_block - 1 if kind.endswith("samplers") else int(layer))
            part = {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}.get(kind)
            if kind == "upsamplers":
                part = f"{2 if has_attention[int(block)] else 1}.conv"
            rest = rest.removeprefix("conv.") if kind.endswith("samplers") else rest
            name = f"{group}.{index}.{part}.{rest}"
        if ".resnets." in key:
            name = re.sub(r"\b(" + "|".join(RESNET) + r")\b", lambda m: RESNET[m[1]], name)
        state[f"model.diffusion_model.{name}"] = value.contiguous()
    return state


def original_vae(vae):
    """The autoencoder's weights under their original names; the decoder's blocks are numbered in reverse."""
    blocks, state = len(vae.config.block_out_channels), {}
    for key, value in vae.state_dict().items():
        name = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            name = re.sub(r"to_([qkv])\b", r"\1", name).replace("to_out.0", "proj_out")
            value = value[..., None, None] if value.ndim == 2 else value
        state[f"first_stage_model.{name}"] = value.contiguous()
    return state


@pytest.fixture(params=[("sd", SDConfig, tiny_sd), ("sdxl", SDXLConfig, tiny_sdxl)], ids=["sd", "sdxl"])
def single(request, tmp_path):
    """A backbone loaded from a folder, and a config of the same model as a single file with a folder of configs."""
    _, kind, make = request.param
    folder = make(tmp_path / "model")
    backbone = kind(checkpoint=str(folder)).build(CPU)
    save_file({**original_unet(backbone.denoiser), **original_vae(backbone.vae)}, tmp_path / "model.safetensors")
    for part in ("unet", "vae", "scheduler"):
        shutil.copytree(folder / part, tmp_path / "layout" / part, ignore=shutil.ignore_patterns("*.safetensors"))
    return backbone, kind(checkpoint=str(tmp_path / "model.safetensors"), layout=str(tmp_path / "layout"))


def test_single_file_loads_weights_of_folder(single):
    expected, config = single
    backbone = config.build(CPU)
    for part in ("denoiser", "vae"):
        weights = getattr(expected, part).state_dict()
        loaded = getattr(backbone, part).state_dict()
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[key], value) for key, value in weights.items())
    assert backbone.prediction == expected.prediction and torch.equal(
        backbone.noise_levels.noise, expected.noise_levels.noise
    )
    half = config.model_copy(update={"dtype": "float16"}).build(CPU)
    assert half.denoiser.dtype == torch.float16 and half.vae.dtype == torch.float32


def test_single_file_rejects_missing_or_mismatched_weights(single, tmp_path):
    _, config = single
    state = load_file(config.checkpoint)
    state.popitem()
    incomplete = tmp_path / "incomplete.safetensors"
    save_file(state, incomplete)
    with pytest.raises(ValueError, match=r"incomplete\.safetensors .*'.*/layout/.*config\.json'; set layout"):
        config.model_copy(update={"checkpoint": str(incomplete)}).build(CPU)
    with pytest.raises(FileNotFoundError, match=r"owner/name/x\.safetensors"):
        config.model_copy(update={"checkpoint": "owner/name/x.safetensors"}).build(CPU)
    v2_key = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({v2_key: torch.zeros(1, 1024)}, incomplete)
    with pytest.raises(ValueError, match=r"'v2'.*prediction type.*layout"):
        config.model_copy(update={"checkpoint": str(incomplete), "layout": None}).build(CPU)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"checkpoint": "x.ckpt"}, r"\.ckpt.*pickle"),
        ({"checkpoint": "x", "layout": "y"}, r"'layout' .*\.safetensors"),
        ({"checkpoint": "x.safetensors", "variant": "fp16"}, "'checkpoint' .*'variant'"),
        (
            {"checkpoint": "x.safetensors", "subfolder": "x", "revision": "y"},
            "'checkpoint' .*'subfolder' and 'revision'",
        ),
    ],
)
def test_sd_config_rejects_keys_without_effect(keys, message):
    with pytest.raises(ValidationError, match=message):
        SDConfig(**keys)
