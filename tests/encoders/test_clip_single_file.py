"""Text models in single-file checkpoints, created from tiny models in diffusers layout."""

import re
import shutil

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from longalign.encoders.clip.config import ClipSegmentConfig, ClipSegmentSDXLConfig, ClipTruncateConfig
from longalign.runtime import Runtime
from longalign.testing.tiny import tiny_clip_text, tiny_sdxl

CPU = Runtime()
PROMPTS = ["A red fox sleeps on a wall. The sky is green.", "", "A wall."]
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight", "final_layer_norm": "ln_final",
    "embeddings.position_embedding.weight": "positional_embedding", "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn": "attn", "fc1": "c_fc", "fc2": "c_proj",
}  # fmt: skip


def weights(folder, part="text_encoder"):
    """A text model's weights under transformers' names, with the prefix ``text_model``."""
    state = load_file(folder / part / "model.safetensors")
    plain = {name.removeprefix("text_model."): value for name, value in state.items()}
    return {name if name.startswith("text_proj") else f"text_model.{name}": value for name, value in plain.items()}


def open_clip(state):
    """Renames to OpenCLIP: queries, keys and values in one matrix, the projection transposed."""
    out = {}
    for name, value in state.items():
        new = name.removeprefix("text_model.")
        for theirs, ours in OPEN_CLIP.items():
            new = new.replace(theirs, ours)
        if name == "text_projection.weight":
            out["text_projection"] = value.T.contiguous()
        elif match := re.fullmatch(r"(.*attn\.)q_proj\.(\w+)", new):
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            out[f"{match[1]}in_proj_{match[2]}"] = torch.cat(parts)
        elif not re.search(r"attn\.[kv]_proj", new):
            out[new] = value
    return out


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def copy_without_weights(folder, target):
    """Copies a checkpoint's configs and tokenizers."""
    return shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors", "unet", "vae"))


OTHER_WEIGHTS = {
    "model.diffusion_model.out.0.weight": torch.ones(3),
    "first_stage_model.quant_conv.bias": torch.ones(3),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip_text(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def layout(folder):
    return str(copy_without_weights(folder, folder.parent / f"{folder.name}-layout"))


@pytest.mark.parametrize("kind", [ClipSegmentConfig, ClipTruncateConfig], ids=["segment", "truncate"])
@pytest.mark.parametrize("family", ["sd15", "sd21"])
def test_clip_single_file_states_match_folder(folder, layout, tmp_path, kind, family):
    state = weights(folder)
    if family == "sd15":
        extra = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        checkpoint = prefixed("cond_stage_model.transformer.", {**state, **extra})
    else:
        # Stable Diffusion 2 does not use OpenCLIP's last layer, and diffusers omits it
        unused = {
            name.replace("layers.1", "layers.2"): 2 * value for name, value in state.items() if "layers.1" in name
        }
        extra = {"text_projection": torch.ones(16, 16), "logit_scale": torch.ones(())}
        checkpoint = prefixed("cond_stage_model.model.", {**open_clip({**state, **unused}), **extra})
    file = tmp_path / "model.safetensors"
    save_file({**checkpoint, **OTHER_WEIGHTS}, file)
    single = kind(checkpoint=str(file), layout=layout).build(CPU)
    conditioning, expected = single.encode(PROMPTS), kind(checkpoint=str(folder)).build(CPU).encode(PROMPTS)
    assert torch.equal(conditioning.states, expected.states) and conditioning.reports == expected.reports
    assert not any(p.requires_grad for p in single.parameters())


def test_clip_single_file_loads_both_clips_of_sdxl(tmp_path):
    folder = tiny_sdxl(tmp_path / "sdxl")
    first = prefixed("conditioner.embedders.0.transformer.", weights(folder))
    second = prefixed("conditioner.embedders.1.model.", open_clip(weights(folder, "text_encoder_2")))
    file = tmp_path / "model.safetensors"
    save_file({**first, **second, **OTHER_WEIGHTS}, file)
    config = ClipSegmentSDXLConfig(checkpoint=str(file), layout=str(copy_without_weights(folder, tmp_path / "layout")))
    conditioning = config.build(CPU).encode(PROMPTS)
    expected = ClipSegmentSDXLConfig(checkpoint=str(folder)).build(CPU).encode(PROMPTS)
    assert torch.equal(conditioning.states, expected.states) and torch.equal(conditioning.pooled, expected.pooled)
    single_clip = ClipTruncateConfig(checkpoint=str(file), layout=config.layout).build(CPU)
    assert torch.equal(
        single_clip.encode(PROMPTS).states, ClipTruncateConfig(checkpoint=str(folder)).build(CPU).encode(PROMPTS).states
    )


def test_clip_single_file_rejects_wrong_files(folder, layout, tmp_path):
    file = tmp_path / "model.safetensors"

    def build(state=None, **keys):
        if state is not None:
            save_file({**state, **OTHER_WEIGHTS}, file)
        ClipSegmentConfig(checkpoint=str(file), **keys).build(CPU)

    with pytest.raises(FileNotFoundError, match=rf"file {file}"):
        build()
    with pytest.raises(ValueError, match=rf"'text_encoder' .*{file}.* cond_stage_model"):
        build({}, layout=layout)
    checkpoint = prefixed("cond_stage_model.transformer.", weights(folder))
    short = {name: value for name, value in checkpoint.items() if "layers.1" not in name}
    with pytest.raises(ValueError, match=rf"{file}; .*'layout' .*16 weights .*'.*layers"):
        build(short, layout=layout)
    wide = {**checkpoint, next(n for n in checkpoint if n.endswith("final_layer_norm.weight")): torch.ones(5)}
    with pytest.raises(ValueError, match=rf"'{layout}/text_encoder/config\.json' .*{file}; .*'layout' "):
        build(wide, layout=layout)
    with pytest.raises(ValueError, match=r"'stable-diffusion-v1-5/stable-diffusion-v1-5/text_encoder/config\.json'"):
        build(checkpoint)  # without a connection to the Hub
    shutil.copytree(f"{layout}/text_encoder", tmp_path / "half" / "text_encoder")
    with pytest.raises(ValueError, match=r"no tokenizer, .*half'.*; set 'layout' "):
        build(checkpoint, layout=str(tmp_path / "half"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"checkpoint": "x.ckpt"}, r"\.ckpt.*\.safetensors"),
        ({"checkpoint": "x", "layout": "y"}, r"'layout' .*\.safetensors"),
        ({"checkpoint": "x.safetensors", "revision": "main"}, "'checkpoint' .*'revision'"),
        ({"checkpoint": "x.safetensors", "variant": "fp16"}, "'checkpoint' .*'variant'"),
    ],
)
@pytest.mark.parametrize("kind", [ClipSegmentConfig, ClipTruncateConfig, ClipSegmentSDXLConfig])
def test_clip_configs_reject_unused_keys(kind, keys, message):
    with pytest.raises(ValidationError, match=message):
        kind(**keys)


def test_sdxl_config_rejects_subfolder_of_single_file():
    with pytest.raises(ValidationError, match=r"'checkpoint' .*'subfolder'"):
        ClipSegmentSDXLConfig(checkpoint="x.safetensors", subfolder="models")
