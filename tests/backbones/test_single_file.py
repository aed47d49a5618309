"""Checkpoints in one file with the names of the original code, written here from tiny models in diffusers layout."""

import re
import shutil

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny import tiny_sd, tiny_sdxl

from longalign.backbones.configs import SDConfig, SDXLConfig
from longalign.runtime import Runtime

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
    """The UNet's weights under the names of the latent-diffusion code: all blocks are numbered in one row."""
    per_block, state = unet.config.layers_per_block + 1, {}
    attends = [block.startswith("CrossAttn") for block in unet.config.up_block_types]
    for key, value in unet.state_dict().items():
        name = next((new + key.removeprefix(old) for old, new in ENDS.items() if key.startswith(f"{old}.")), key)
        found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key)
        if found:
            way, block, kind, layer, rest = found.groups()
            row, base = ("input_blocks", 1) if way == "down" else ("output_blocks", 0)
            at = base + int(block) * per_block + (per_block - 1 if kind.endswith("samplers") else int(layer))
            place = {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}.get(kind)
            if kind == "upsamplers":
                place = f"{2 if attends[int(block)] else 1}.conv"
            rest = rest.removeprefix("conv.") if kind.endswith("samplers") else rest
            name = f"{row}.{at}.{place}.{rest}"
        if ".resnets." in key:
            name = re.sub(r"\b(" + "|".join(RESNET) + r")\b", lambda m: RESNET[m[1]], name)
        state[f"model.diffusion_model.{name}"] = value.contiguous()
    return state


def original_vae(vae):
    """The autoencoder's weights under their first names: its decoder's blocks are counted from the other end."""
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
    """A model's config with a folder, and with a file and a folder of nothing but configs."""
    _, kind, make = request.param
    folder = make(tmp_path / "model")
    backbone = kind(checkpoint=str(folder)).build(CPU)
    save_file({**original_unet(backbone.denoiser), **original_vae(backbone.vae)}, tmp_path / "model.safetensors")
    for part in ("unet", "vae", "scheduler"):
        shutil.copytree(folder / part, tmp_path / "layout" / part, ignore=shutil.ignore_patterns("*.safetensors"))
    return backbone, kind(checkpoint=str(tmp_path / "model.safetensors"), layout=str(tmp_path / "layout"))


def test_the_weights_are_those_of_the_folder(single):
    expected, config = single
    backbone = config.build(CPU)
    for part in ("denoiser", "vae"):
        weights = getattr(expected, part).state_dict()
        found = getattr(backbone, part).state_dict()
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[key], value) for key, value in weights.items())
    assert backbone.prediction == expected.prediction and torch.equal(
        backbone.noise_levels.noise, expected.noise_levels.noise
    )
    half = config.model_copy(update={"dtype": "float16"}).build(CPU)
    assert half.denoiser.dtype == torch.float16 and half.vae.dtype == torch.float32


def test_files_that_do_not_fit_are_named(single, tmp_path):
    _, config = single
    state = load_file(config.checkpoint)
    state.popitem()
    cut = tmp_path / "cut.safetensors"
    save_file(state, cut)
    with pytest.raises(ValueError, match=r"does not hold a .* as '.*layout.*' describes it; set layout"):
        config.model_copy(update={"checkpoint": str(cut)}).build(CPU)
    with pytest.raises(FileNotFoundError, match="a single file must be on this machine"):
        config.model_copy(update={"checkpoint": "owner/name/x.safetensors"}).build(CPU)
    second = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({second: torch.zeros(1, 1024)}, cut)
    with pytest.raises(ValueError, match="taken for a model of the kind 'v2', whose kind of prediction"):
        config.model_copy(update={"checkpoint": str(cut), "layout": None}).build(CPU)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"checkpoint": "x.ckpt"}, "a .ckpt file is a pickle"),
        ({"checkpoint": "x", "layout": "y"}, "'layout' describes a single .safetensors file"),
        ({"checkpoint": "x.safetensors", "variant": "fp16"}, "'checkpoint' is one file, and 'variant' would choose"),
        (
            {"checkpoint": "x.safetensors", "subfolder": "x", "revision": "y"},
            "'subfolder' and 'revision' would choose",
        ),
    ],
)
def test_keys_that_do_nothing_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        SDConfig(**keys)
