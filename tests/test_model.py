"""`Model`: calls, seeds, argument names and devices."""

import json

import numpy as np
import pytest
import torch

from longalign import Model
from longalign.compose import build_from_config
from longalign.config.run import to_dict
from longalign.errors import ConfigError
from longalign.files.paths import checkpoint_file
from longalign.image_folder import remove_listed
from longalign.inference.sampling import generate, load_model
from longalign.runtime import Runtime, devices
from longalign.testing.tiny import tiny_sd

FAST = {"num_steps": 1, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sd = str(tiny_sd(tmp_path_factory.mktemp("model") / "sd"))
    run = {"backbone": {"name": "sd", "checkpoint": sd}, "encoder": {"name": "clip-segment", "checkpoint": sd}}
    composition = build_from_config(run)
    return Model(composition.config, composition.backbone, composition.encoder, "here/longalign.safetensors")


def images_equal(a, b):
    return len(a) == len(b) and all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in zip(a, b, strict=True))


def test_model_call_one_image_per_prompt_or_seed(model):
    images = model("A fox.", seeds=[0, 1, 2], **FAST)
    assert len(images) == 3
    assert images_equal(images, model(["A fox."] * 3, seeds=[0, 1, 2], **FAST))
    assert len(model(["A fox.", "A hen."], seeds=5, **FAST)) == 2


@pytest.mark.parametrize(
    ("prompts", "seeds", "counts"),
    [
        (["a", "b"], [0, 1, 2], "3 seeds and 2 prompts"),
        ([], 0, "0 seeds and 0 prompts"),
        ("a", [], "0 seeds and 0 prompts"),
    ],
)
def test_model_call_mismatched_prompts_and_seeds_raises(model, prompts, seeds, counts):
    with pytest.raises(ValueError, match=counts):
        model(prompts, seeds=seeds, **FAST)


def test_model_call_accepts_diffusers_argument_names(model):
    size = {"height": 32, "width": 32}
    images = model("A fox.", negative="grey", num_steps=2, guidance=3.0, **size)
    aliased = model(prompt="A fox.", negative_prompt="grey", num_inference_steps=2, guidance_scale=3.0, **size)
    assert images_equal(images, aliased)
    assert aliased.images is aliased and aliased.images[0] is aliased[0]
    assert not images_equal(images, model("A fox.", negative="grey", num_steps=2, guidance=9.0, **size))
    with pytest.raises(ValueError, match=r"\bnum_steps\b.*\bnum_inference_steps\b"):
        model("A fox.", num_steps=1, num_inference_steps=1)
    with pytest.raises(TypeError, match="generator"):
        model("A fox.", generator=torch.Generator())


def test_model_repr(model):
    text = repr(model)
    for part in ("here/longalign.safetensors", "backbone='sd'", "encoder='clip-segment'", "torch.float32", "cpu"):
        assert part in text


def test_runtime_detect_device(monkeypatch):
    assert Runtime.detect(device="cpu").device == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Runtime.detect("bf16") == Runtime("mps", "bfloat16")
    assert "mps" in devices()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Runtime.detect().device == "cuda"
    assert Runtime.detect(device="cpu").device == "cpu"
    for device in ("cuda:77", "nonsense"):
        with pytest.raises(ValueError, match=f"device.*'{device}'.*cpu"):
            Runtime.detect(device=device)


def test_load_model_float16_does_not_warn(model, tmp_path, capfd):
    sd = str(tiny_sd(tmp_path / "sd"))
    run = {"backbone": {"name": "sd", "checkpoint": sd}, "encoder": {"name": "clip-segment", "checkpoint": sd}}
    _, backbone, _ = load_model(run, dtype="float16")
    assert backbone.denoiser.dtype == torch.float16
    assert "float32" not in capfd.readouterr().err


def test_from_config_builds_untrained_model(model, tmp_path):
    untrained = Model.from_config(model.config, device="cpu")
    assert images_equal(untrained("A fox.", **FAST), model("A fox.", **FAST)) and "no checkpoint" in repr(untrained)
    assert not any(p.requires_grad for part in (untrained.backbone, untrained.encoder) for p in part.parameters())
    with pytest.raises(ValueError, match=r"config.*from_pretrained"):
        untrained.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"init_from: no checkpoint in nowhere"):
        Model.from_config({**to_dict(model.config), "init_from": "nowhere"})


def test_generate_replaces_images_only_with_overwrite(model, tmp_path):
    parts = (model.config, model.backbone, model.encoder)
    generate(parts, ["A fox.", "A hen."], tmp_path, **FAST)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"metadata\.jsonl.* 2 images"):
        generate(parts, ["A cat."], tmp_path, seeds=[7], **FAST)
    assert len(list(tmp_path.glob("*.png"))) == 2
    generate(parts, ["A cat."], tmp_path, seeds=[7], overwrite=True, **FAST)
    assert {path.name for path in tmp_path.iterdir()} == {"00000-7.png", "metadata.jsonl", "notes.txt"}


def test_remove_listed_keeps_files_outside_folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "mine.png").write_text("mine")
    index = tmp_path / "images" / "metadata.jsonl"
    index.write_text(
        json.dumps({"file_name": "../mine.png"}) + "\n" + json.dumps({"file_name": str(tmp_path / "mine.png")})
    )
    remove_listed(index)
    assert not index.exists() and (tmp_path / "mine.png").exists()


def test_checkpoint_file_rejects_exported_lora(tmp_path):
    for name in ("longalign.safetensors", "pytorch_lora_weights.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"expected .*longalign\.safetensors"):
        checkpoint_file(tmp_path / "pytorch_lora_weights.safetensors")
