"""Layouts of published checkpoints: variants, subfolders, files and names."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from pydantic import ValidationError
from safetensors.torch import save_file
from transformers import CLIPModel

from longalign.backbones.stable_diffusion.config import SDConfig
from longalign.encoders.clip.config import LongClipConfig
from longalign.inference import pipelines
from longalign.registry import backbones, encoders, rewards
from longalign.runtime import Runtime
from longalign.testing.tiny import tiny_clip, tiny_clip_text, tiny_hpsv2, tiny_sd, tiny_sd3, weights_of

CPU = Runtime()
PROMPTS = ["A red fox sleeps on a wall! The sky is green.", "", "A wall."]


# Variants and subfolders


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return tiny_sd(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return tiny_sd3(tmp_path_factory.mktemp("sd3"))


def save_fp16(folder, out):
    """Saves a pipeline in half precision, with files of the variant ``fp16`` only."""
    DiffusionPipeline.from_pretrained(folder).to(torch.float16).save_pretrained(out, variant="fp16")
    names = [file.name for file in out.rglob("*.safetensors")]
    assert names and all(name.endswith(".fp16.safetensors") for name in names)
    return out


def check_rounded(module, expected):
    """Asserts that the weights are those expected, rounded to half precision, as float32."""
    state, rounded = expected.state_dict(), module.state_dict()
    assert rounded.keys() == state.keys()
    for name, value in state.items():
        assert rounded[name].dtype == torch.float32
        assert torch.equal(rounded[name], value.half().float()), name


def test_sd_variant_fp16(sd, tmp_path):
    half = str(save_fp16(sd, tmp_path))
    source = {"checkpoint": half, "variant": "fp16"}
    backbone, expected = (backbones.build({"name": "sd", **c}) for c in (source, {"checkpoint": str(sd)}))
    check_rounded(backbone.denoiser, expected.denoiser)
    check_rounded(backbone.vae, expected.vae)
    for name in ("clip-segment", "clip-truncate"):
        encoder, plain = (encoders.build({"name": name, **c}) for c in (source, {"checkpoint": str(sd)}))
        check_rounded(encoder.text_model, plain.text_model)
        assert encoder.encode(PROMPTS).states.std() > 0.1
    check_rounded(pipelines.load_pipeline(half, CPU, variant="fp16").unet, expected.denoiser)
    with pytest.raises(ValueError, match=r"unet/, vae/, scheduler/ .* 'subfolder'.*'variant'"):
        backbones.build({"name": "sd", "checkpoint": half})
    with pytest.raises(ValueError, match=r"no CLIPTextModel in .*'variant' .*model\.fp16\.safetensors"):
        encoders.build({"name": "clip-segment", "checkpoint": half})
    with pytest.raises(ValueError, match=rf"'{half}'.*'variant'"):
        pipelines.load_pipeline(half, CPU)
    with pytest.raises(ValueError, match="variant 'ema'"):
        pipelines.load_pipeline(half, CPU, variant="ema")
    with pytest.raises(ValueError, match=rf"revision.*'{half}'"):
        pipelines.load_pipeline(half, CPU, revision="main")


def test_sd3_variant_fp16(sd3, tmp_path):
    source = {"checkpoint": str(save_fp16(sd3, tmp_path)), "variant": "fp16"}
    sizes = {"name": "clip-segment-sd3", "width": 32, "max_tokens": 40, "t5_tokens": 60}
    # the folder's default weights are in half precision too
    states, expected = (encoders.build({**sizes, **c}).encode(PROMPTS) for c in (source, {"checkpoint": str(sd3)}))
    assert torch.equal(states.states, expected.states) and torch.equal(states.pooled, expected.pooled)
    t5 = encoders.build({"name": "t5", "subfolder": "text_encoder_3", "max_tokens": 60, **source})
    torch.testing.assert_close(t5.encode(PROMPTS).states, expected.states[:, 40:])
    backbone, plain = (backbones.build({"name": "sd3", **c}) for c in (source, {"checkpoint": str(sd3)}))
    check_rounded(backbone.denoiser, plain.denoiser)


def test_clip_variant_fp16(tmp_path):
    clip, long = tiny_clip(tmp_path / "clip"), tiny_clip_text(tmp_path / "long", "transformers", positions=248)
    for registry, name, folder in ((rewards, "pickscore", clip), (encoders, "longclip", long)):
        plain = registry.build({"name": name, "checkpoint": str(folder)})
        CLIPModel.from_pretrained(folder).half().save_pretrained(folder, variant="fp16")
        (folder / "model.safetensors").unlink()
        (folder / "longclip-L.pt").write_text("an original file, to be ignored")
        check_rounded(registry.build({"name": name, "checkpoint": str(folder), "variant": "fp16"}), plain)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"checkpoint": "x.pt", "variant": "fp16"}, r"'variant'.*'x\.pt'"),
        ({"checkpoint": "x.pt", "filename": "y.pt", "revision": "main"}, r"'filename' and 'revision'.*'x\.pt'"),
        ({"filename": "y.pt", "subfolder": "text_encoder"}, r"'subfolder'.*'y\.pt'"),
    ],
)
def test_longclip_config_conflicting_keys_raise(keys, message):
    with pytest.raises(ValidationError, match=message):
        LongClipConfig(**keys)


def test_subfolder_of_checkpoint(sd, sd3, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    for name, folder in (("sd", sd), ("sd3", sd3)):
        (tmp_path / "models" / name).symlink_to(folder)
    source = {"checkpoint": str(tmp_path), "subfolder": "models/sd"}
    expected = backbones.build({"name": "sd", "checkpoint": str(sd)}).state_dict()
    loaded = backbones.build({"name": "sd", **source}).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    sizes = {"name": "clip-segment-sd3", "width": 32, "max_tokens": 40, "t5_tokens": 60}
    conditioning = encoders.build({**sizes, "checkpoint": str(tmp_path), "subfolder": "models/sd3"}).encode(PROMPTS)
    assert torch.equal(conditioning.states, encoders.build({**sizes, "checkpoint": str(sd3)}).encode(PROMPTS).states)
    with pytest.raises(ValueError, match=r"models/none/unet/, models/none/vae/, models/none/scheduler/"):
        backbones.build({"name": "sd", **source, "subfolder": "models/none"})
    calls = []

    def download(*args, **kwargs):
        calls.append((args, kwargs))
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for checkpoint in (str(tmp_path), "owner/name"):
        config = SDConfig(checkpoint=checkpoint, subfolder="models/sd", revision="v1")
        assert type(pipelines.base_pipeline(config, torch.float32, {})).__name__ == "StableDiffusionPipeline"
    assert calls == [(("owner/name",), {"revision": "v1", "allow_patterns": "models/sd/*"})]


# Published folder layouts

#: config keys of Stable Diffusion 1.5
COMMON = {
    "_class_name", "_diffusers_version", "act_fn", "block_out_channels", "down_block_types", "in_channels",
    "layers_per_block", "norm_num_groups", "out_channels", "sample_size", "up_block_types",
}  # fmt: skip
VAE = COMMON | {"latent_channels"}
UNET = COMMON | {
    "attention_head_dim", "center_input_sample", "cross_attention_dim", "downsample_padding", "flip_sin_to_cos",
    "freq_shift", "mid_block_scale_factor", "norm_eps",
}  # fmt: skip
SCHEDULER = {
    "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "trained_betas": None, "clip_sample": False,
}  # fmt: skip
ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def rewrite(file, keys=None, **new_values):
    """Rewrites a JSON file with some of its keys and new values."""
    values = json.loads(file.read_text())
    file.write_text(
        json.dumps({**{k: v for k, v in values.items() if keys is None or k in keys}, **new_values}, indent=2)
    )


def publish_tokenizer(folder, pad):
    """Writes the four files of Stable Diffusion's tokenizer. In 2.1, two of them disagree on the padding token."""

    def token(content):
        return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

    start, end = token("<|startoftext|>"), token("<|endoftext|>")
    special = {"bos_token": start, "eos_token": end, "unk_token": end}
    settings = {
        "add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77,
        "name_or_path": "openai/clip-vit-large-patch14", "pad_token": "<|endoftext|>",
        "special_tokens_map_file": "./special_tokens_map.json", "tokenizer_class": "CLIPTokenizer",
        **{name: {"__type": "AddedToken", **value} for name, value in special.items()},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": pad}))
    (folder / "tokenizer.json").unlink()
    files = ["merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"]
    assert sorted(file.name for file in folder.iterdir()) == files


def publish_text_model(folder, act):
    """Rewrites weights with their original names and position ids, and a config with outdated special tokens."""
    state = weights_of(folder / "model.safetensors")
    renamed = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in state.items()}
    position_ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file({**renamed, **position_ids}, folder / "model.safetensors", {"format": "pt"})
    special_ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    rewrite(
        folder / "config.json", hidden_act=act, transformers_version="4.22.0.dev0", torch_dtype="float32", **special_ids
    )


def publish_vae(folder):
    """Rewrites attention with its original names, and a config without the scaling factor."""
    state = weights_of(folder / "diffusion_pytorch_model.safetensors")
    for new, old in ATTENTION.items():
        state = {name.replace(f".attentions.0.{new}.", f".attentions.0.{old}."): v for name, v in state.items()}
    assert sum(".query." in name for name in state) == 4
    save_file(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    rewrite(folder / "config.json", VAE, _diffusers_version="0.6.0")


def test_stable_diffusion_15_published_layout(tmp_path):
    plain, folder = tiny_sd(tmp_path / "plain"), tiny_sd(tmp_path / "published")

    def build_parts(folder):
        source = {"checkpoint": str(folder)}
        clips = [encoders.build({"name": name, **source}) for name in ("clip-segment", "clip-truncate")]
        return backbones.build({"name": "sd", **source}), *clips

    expected, *clips = build_parts(plain)
    publish_tokenizer(folder / "tokenizer", "<|endoftext|>")
    publish_text_model(folder / "text_encoder", "quick_gelu")
    publish_vae(folder / "vae")
    rewrite(folder / "unet" / "config.json", UNET, _diffusers_version="0.6.0")
    rewrite(folder / "scheduler" / "scheduler_config.json", (), _class_name="PNDMScheduler", **SCHEDULER)
    backbone, *others = build_parts(folder)
    weights, loaded = expected.state_dict(), backbone.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    assert backbone.prediction == "epsilon" and backbone.vae.config.scaling_factor == 0.18215
    assert torch.equal(backbone.noise_levels.noise, expected.noise_levels.noise)
    for clip, other in zip(clips, others, strict=True):
        assert other.tokens.tokenizer.is_fast
        assert torch.equal(clip.encode(PROMPTS).states, other.encode(PROMPTS).states)


@pytest.mark.filterwarnings("ignore:The configuration file of the unet:FutureWarning")  # small sample_size
def test_stable_diffusion_21_published_layout(tmp_path):
    folder = tiny_sd(tmp_path)
    config = UNet2DConditionModel.from_pretrained(folder / "unet").config
    changes = {"use_linear_projection": True, "upcast_attention": True, "attention_head_dim": [2, 4]}
    UNet2DConditionModel.from_config({**config, **changes}).save_pretrained(folder / "unet")
    unused = {"dual_cross_attention": False, "num_class_embeds": None, "only_cross_attention": False}
    rewrite(folder / "unet" / "config.json", UNET | changes.keys(), _diffusers_version="0.8.0", **unused)
    publish_tokenizer(folder / "tokenizer", "!")
    publish_text_model(folder / "text_encoder", "gelu")
    publish_vae(folder / "vae")
    scheduler = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    rewrite(folder / "scheduler" / "scheduler_config.json", (), **SCHEDULER, **scheduler)
    backbone = backbones.build({"name": "sd", "checkpoint": str(folder)})
    assert backbone.prediction == "v_prediction" and backbone.noise_levels.signal[0] ** 2 == pytest.approx(1 - 0.00085)
    encoder = encoders.build({"name": "clip-truncate", "checkpoint": str(folder)})
    assert encoder.tokens.tokenizer.is_fast and encoder.tokens.tokenizer.pad_token_id == 0
    conditioning = encoder.encode(PROMPTS)
    pipe = pipelines.load_pipeline(str(folder), CPU)
    torch.testing.assert_close(conditioning.states, pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0])
    assert backbone.predict(torch.randn(3, 4, 8, 8), torch.tensor([1, 500, 999]), conditioning).std() > 0.01
    segments = encoders.build({"name": "clip-segment", "checkpoint": str(folder), "max_tokens": 40}).encode(PROMPTS)
    row = encoder.tokens.tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert row[0, 2:].tolist() == [0] * 75
    torch.testing.assert_close(segments.states[1, 1], conditioning.states[1, -60:].mean(0))


def test_hpsv2_half_precision_with_optimizer_state(tmp_path):
    file = tiny_hpsv2(tmp_path) / "HPS_v2.1_compressed.pt"
    state = torch.load(file, weights_only=True)["state_dict"]
    plain = rewards.build({"name": "hpsv2", "checkpoint": str(tmp_path)})
    moments = {"state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-6}]}
    training_state = {
        "epoch": 3,
        "name": "hps",
        "optimizer": moments,
        "scaler": {"scale": 65536.0, "_growth_tracker": 7},
    }
    torch.save({**training_state, "state_dict": {name: value.half() for name, value in state.items()}}, file)
    reward = rewards.build({"name": "hpsv2", "checkpoint": str(tmp_path)})
    check_rounded(reward, plain)


def test_checkpoint_ignores_other_files_of_repository(sd, tmp_path):
    folder, half = shutil.copytree(sd, tmp_path / "all"), save_fp16(sd, tmp_path / "half")
    for file in half.rglob("*.fp16.safetensors"):
        shutil.copy(file, folder / file.relative_to(half))
    (folder / "text_encoder" / "pytorch_model.bin").write_text("a pickle")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_text("a pickle")
    for source, variant in ((sd, None), (half, "fp16")):
        for registry, name in ((backbones, "sd"), (encoders, "clip-segment")):
            config = {"name": name, "variant": variant}
            loaded, expected = (registry.build({**config, "checkpoint": str(p)}).state_dict() for p in (folder, source))
            assert all(torch.equal(loaded[key], value) for key, value in expected.items())
