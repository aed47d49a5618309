"""Text models in one file with the names of the original code, written here from tiny models in diffusers layout."""

import re
import shutil

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny import tiny_clip_text, tiny_sdxl

from longalign.encoders.configs import ClipSegmentConfig, ClipSegmentSDXLConfig, ClipTruncateConfig
from longalign.runtime import Runtime

CPU = Runtime()
PROMPTS = ["A red fox sleeps on a wall. The sky is green.", "", "A wall."]
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight", "final_layer_norm": "ln_final",
    "embeddings.position_embedding.weight": "positional_embedding", "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn": "attn", "fc1": "c_fc", "fc2": "c_proj",
}  # fmt: skip


def weights(folder, part="text_encoder"):
    """A text model's weights by transformers' names, as files have them: ``text_model`` in front."""
    state = load_file(folder / part / "model.safetensors")
    plain = {name.removeprefix("text_model."): value for name, value in state.items()}
    return {name if name.startswith("text_proj") else f"text_model.{name}": value for name, value in plain.items()}


def open_clip(state):
    """The same by OpenCLIP's names: queries, keys and values in one matrix, the projection from the right."""
    out = {}
    for name, value in state.items():
        new = name.removeprefix("text_model.")
        for theirs, ours in OPEN_CLIP.items():
            new = new.replace(theirs, ours)
        if name == "text_projection.weight":
            out["text_projection"] = value.T.contiguous()
        elif found := re.fullmatch(r"(.*attn\.)q_proj\.(\w+)", new):
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            out[f"{found[1]}in_proj_{found[2]}"] = torch.cat(parts)
        elif not re.search(r"attn\.[kv]_proj", new):
            out[new] = value
    return out


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def bare(folder, to):
    """Nothing but a checkpoint's configs and tokenizers."""
    return shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors", "unet", "vae"))


OTHERS = {"model.diffusion_model.out.0.weight": torch.ones(3), "first_stage_model.quant_conv.bias": torch.ones(3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip_text(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def layout(folder):
    return str(bare(folder, folder.parent / f"{folder.name}-layout"))


@pytest.mark.parametrize("kind", [ClipSegmentConfig, ClipTruncateConfig], ids=["segment", "truncate"])
@pytest.mark.parametrize("family", ["sd15", "sd21"])
def test_states_are_those_of_the_folder(folder, layout, tmp_path, kind, family):
    state = weights(folder)
    if family == "sd15":
        more = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        held = prefixed("cond_stage_model.transformer.", {**state, **more})
    else:
        # OpenCLIP's last layer is not used by Stable Diffusion 2, and diffusers leaves it out
        unused = {
            name.replace("layers.1", "layers.2"): 2 * value for name, value in state.items() if "layers.1" in name
        }
        more = {"text_projection": torch.ones(16, 16), "logit_scale": torch.ones(())}
        held = prefixed("cond_stage_model.model.", {**open_clip({**state, **unused}), **more})
    file = tmp_path / "model.safetensors"
    save_file({**held, **OTHERS}, file)
    single = kind(checkpoint=str(file), layout=layout).build(CPU)
    conditioning, expected = single.encode(PROMPTS), kind(checkpoint=str(folder)).build(CPU).encode(PROMPTS)
    assert torch.equal(conditioning.states, expected.states) and conditioning.reports == expected.reports
    assert not any(p.requires_grad for p in single.parameters())


def test_both_clips_of_sdxl(tmp_path):
    folder = tiny_sdxl(tmp_path / "sdxl")
    first = prefixed("conditioner.embedders.0.transformer.", weights(folder))
    second = prefixed("conditioner.embedders.1.model.", open_clip(weights(folder, "text_encoder_2")))
    file = tmp_path / "model.safetensors"
    save_file({**first, **second, **OTHERS}, file)
    config = ClipSegmentSDXLConfig(checkpoint=str(file), layout=str(bare(folder, tmp_path / "layout")))
    conditioning = config.build(CPU).encode(PROMPTS)
    expected = ClipSegmentSDXLConfig(checkpoint=str(folder)).build(CPU).encode(PROMPTS)
    assert torch.equal(conditioning.states, expected.states) and torch.equal(conditioning.pooled, expected.pooled)
    alone = ClipTruncateConfig(checkpoint=str(file), layout=config.layout).build(CPU)
    assert torch.equal(
        alone.encode(PROMPTS).states, ClipTruncateConfig(checkpoint=str(folder)).build(CPU).encode(PROMPTS).states
    )


def test_files_that_do_not_fit_are_named(folder, layout, tmp_path):
    file = tmp_path / "model.safetensors"

    def build(state=None, **keys):
        if state is not None:
            save_file({**state, **OTHERS}, file)
        ClipSegmentConfig(checkpoint=str(file), **keys).build(CPU)

    with pytest.raises(FileNotFoundError, match=r"no file .*; a single file must be on this machine"):
        build()
    with pytest.raises(ValueError, match=r"holds no text model for 'text_encoder'; expected cond_stage_model"):
        build({}, layout=layout)
    held = prefixed("cond_stage_model.transformer.", weights(folder))
    short = {name: value for name, value in held.items() if "layers.1" not in name}
    with pytest.raises(ValueError, match=r"does not describe it; set layout .*16 weights are missing, e.g. '.*layers"):
        build(short, layout=layout)
    wide = {**held, next(n for n in held if n.endswith("final_layer_norm.weight")): torch.ones(5)}
    with pytest.raises(ValueError, match=r"text_encoder/config.json' does not describe it; set layout to a hub id"):
        build(wide, layout=layout)
    with pytest.raises(ValueError, match=r"stable-diffusion-v1-5/text_encoder/config.json' does not describe it"):
        build(held)  # there is no connection to the hub
    shutil.copytree(f"{layout}/text_encoder", tmp_path / "half" / "text_encoder")
    with pytest.raises(ValueError, match=r"a single file has no tokenizer; set layout .* with the tokenizer beside it"):
        build(held, layout=str(tmp_path / "half"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"checkpoint": "x.ckpt"}, "a .ckpt file is a pickle"),
        ({"checkpoint": "x", "layout": "y"}, "'layout' describes a single .safetensors file"),
        (
            {"checkpoint": "x.safetensors", "revision": "main"},
            "'checkpoint' is one file, and 'revision' would choose",
        ),
        ({"checkpoint": "x.safetensors", "variant": "fp16"}, "'checkpoint' is one file, and 'variant' would choose"),
    ],
)
@pytest.mark.parametrize("kind", [ClipSegmentConfig, ClipTruncateConfig, ClipSegmentSDXLConfig])
def test_keys_that_do_nothing_are_refused(kind, keys, message):
    with pytest.raises(ValidationError, match=message):
        kind(**keys)


def test_a_file_has_no_subfolders_for_two_clips():
    with pytest.raises(ValidationError, match="'checkpoint' is one file, and 'subfolder' would choose"):
        ClipSegmentSDXLConfig(checkpoint="x.safetensors", subfolder="models")
