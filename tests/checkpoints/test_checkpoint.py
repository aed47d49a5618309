"""Checkpoints: contents, round trips, and export to diffusers."""

import json
import re
from pathlib import Path

import pytest
import torch
import worlds
from safetensors.torch import load_file, save_file

from longalign.backbones.config import LoraConfig
from longalign.checkpoints import checkpoint, diffusers_files
from longalign.compose import build_from_config
from longalign.config.run import load_config
from longalign.errors import ConfigError
from longalign.files.paths import read_metadata
from longalign.inference.sampling import load_model, sample
from longalign.registry import backbones, encoders
from longalign.runtime import Runtime
from longalign.testing.tiny import tiny_backbone, tiny_sd

LORA = LoraConfig(rank=2, dropout=0.0)


@pytest.fixture
def world():
    worlds.register()
    yield worlds
    worlds.unregister()


def move(module, std=0.3):
    with torch.no_grad():
        for i, p in enumerate(p for p in module.parameters() if p.requires_grad):
            p.add_(std * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))


def predict(backbone, encoder):
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        return backbone.eval().predict(latents, torch.tensor([10, 900]), encoder.eval().encode(["ab", "c"]))


def trained(config):
    """A composition with large random changes of the trainable weights."""
    composition = build_from_config(config)
    composition.trainer.trainable()
    move(composition.backbone.denoiser)
    move(composition.encoder)
    return composition


def saved(composition, folder, step=7):
    return checkpoint.save(folder, composition.config, composition.backbone, composition.encoder, step)


@pytest.mark.parametrize("lora", [{"rank": 2}, None])
def test_checkpoint_round_trip_predictions(world, tmp_path, lora):
    config = world.align_config(tmp_path)
    config["trainer"]["lora"] = lora
    composition = trained(config)
    before = predict(composition.backbone, composition.encoder)
    path = saved(composition, tmp_path / "checkpoint-000007")
    assert path == tmp_path / "checkpoint-000007" / "longalign.safetensors"
    assert [p.name for p in path.parent.iterdir()] == ["longalign.safetensors"]

    backbone, encoder = backbones.build("tiny-backbone"), encoders.build("toy-encoder")
    checkpoint.load_into(path, backbone, encoder)
    assert torch.equal(predict(backbone, encoder), before)

    read, backbone, encoder = checkpoint.load_for_sampling(tmp_path, Runtime())
    assert read == composition.config
    assert torch.allclose(predict(backbone, encoder), before, atol=1e-5)
    assert not any(p.requires_grad for m in (backbone, encoder) for p in m.parameters()) and not backbone.training


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float32), ("bfloat16", torch.bfloat16)])
def test_load_model_dtype(world, tmp_path, dtype, expected):
    composition = trained(world.align_config(tmp_path))
    saved(composition, tmp_path / "checkpoint-000001")
    for source in (tmp_path, composition.config):
        config, backbone, encoder = load_model(source, dtype)
        assert config == composition.config and backbone.denoiser.dtype == expected
        images = sample(backbone, encoder, ["a"], seeds=[0], num_steps=2, guidance=1)
        assert images.dtype == torch.float32 and images.isfinite().all()


def test_load_for_sampling_builds_no_trainer_or_reward(world, tmp_path, monkeypatch):
    path = saved(trained(world.reward_config(tmp_path)), tmp_path / "checkpoint-000001")

    def fail(*args, **kwargs):
        raise AssertionError("built")

    monkeypatch.setattr("longalign.trainers.reward.trainer.RewardTrainer.from_config", fail)
    monkeypatch.setattr("longalign.rewards.base.as_reward", fail)
    config, _, _ = checkpoint.load_for_sampling(path)
    assert config.trainer is not None and config.trainer.name == "reward"


def test_checkpoint_metadata(world, tmp_path):
    metadata = read_metadata(saved(trained(world.reward_config(tmp_path)), tmp_path / "c"))
    assert load_config(json.loads(metadata["config"])) == load_config(world.reward_config(tmp_path))
    assert metadata["step"] == "7" and metadata["format"] == "1"
    assert {"python", "torch", "diffusers", "longalign"} <= set(json.loads(metadata["versions"]))
    owners = json.loads(metadata["providers"])
    assert owners["backbone"] == "this process" and owners["trainer"].startswith("longalign ")
    assert owners["trainer.gradient_steps"].startswith("longalign ") and owners["rewards.0"] == "this process"
    assert json.loads(metadata["loras"]) == [{"name": "reward", "config": {**LORA.model_dump(), "dropout": 0.1}}]


def test_reward_stage_checkpoint_keeps_align_lora(world, tmp_path):
    align = trained(world.align_config(tmp_path / "align"))
    with_align = predict(align.backbone, align.encoder)
    start = saved(align, tmp_path / "align" / "checkpoint-000001").parent

    reward = build_from_config({**world.reward_config(tmp_path / "reward"), "init_from": str(start)})
    reward.trainer.train()
    assert torch.allclose(predict(reward.backbone, reward.encoder), with_align, atol=1e-5)
    assert reward.backbone.lora_names == ["align", "reward"]
    assert not any(p.requires_grad for p in reward.encoder.parameters())
    assert all(".reward." in n for n, p in reward.backbone.denoiser.named_parameters() if p.requires_grad)

    move(reward.backbone.denoiser)
    with_both = predict(reward.backbone, reward.encoder)
    path = saved(reward, tmp_path / "reward" / "checkpoint-000001")
    tensors = load_file(path)
    assert {k.split(".")[1] for k in tensors if k.startswith("lora.")} == {"0", "1"}
    assert {k for k in tensors if k.startswith("encoder.")} == {"encoder.adapter.0.weight", "encoder.adapter.0.bias"}

    for p in start.iterdir():
        p.unlink()  # the reward checkpoint is self-contained
    _, backbone, encoder = checkpoint.load_for_sampling(path, Runtime())
    assert torch.allclose(predict(backbone, encoder), with_both, atol=1e-5)


def test_export_lora_loads_in_diffusers(tmp_path):
    from diffusers import StableDiffusionPipeline

    folder = tiny_sd(tmp_path / "sd")
    backbone = backbones.build({"name": "sd", "checkpoint": str(folder)})
    for name, rank, scale in (("align", 2, 1.0), ("reward", 3, 0.5)):
        backbone.add_lora(LoraConfig(rank=rank, scale=scale), name)
        move(backbone.denoiser)
    encoder = worlds.ToyEncoder(with_adapter=False)
    config = load_config({"backbone": {"name": "sd", "checkpoint": str(folder)}, "encoder": "clip-segment"})
    checkpoint.save(tmp_path / "run", config, backbone, encoder, 1)
    path = diffusers_files.export_lora(tmp_path / "run", tmp_path / "exported")
    assert path.name == "pytorch_lora_weights.safetensors"
    assert next(v for k, v in load_file(path).items() if k.endswith("lora_A.weight")).shape[0] == 5

    latents, states = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 16)
    plain = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    before = plain.unet(latents, 500, states).sample
    plain.load_lora_weights(tmp_path / "exported", weight_name="pytorch_lora_weights.safetensors")
    output = plain.unet(latents, 500, states).sample
    expected = backbone.eval().denoiser(latents, 500, states).sample
    assert not torch.allclose(output, before, atol=1e-2)
    assert torch.allclose(output, expected, atol=1e-4)


def test_export_lora_without_lora_raises(world, tmp_path):
    config = world.align_config(tmp_path)
    config["trainer"]["lora"] = None
    saved(trained(config), tmp_path / "full")
    with pytest.raises(ValueError, match=r"/full .*all weights.*LoRA"):
        diffusers_files.export_lora(tmp_path / "full", tmp_path)
    composition = build_from_config(config)
    saved(composition, tmp_path / "none")
    with pytest.raises(ValueError, match=r"/none .*no LoRA"):
        diffusers_files.export_lora(tmp_path / "none", tmp_path)


def test_load_mismatched_checkpoint_raises(world, tmp_path):
    path = saved(trained(world.align_config(tmp_path)), tmp_path / "c")
    with pytest.raises(ValueError, match=r"encoder's adapter.*'adapter\.0\.\w+'"):
        checkpoint.load_into(path, tiny_backbone(), worlds.ToyEncoder(with_adapter=False))
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors.* None.* '1'"):
        checkpoint.load_weights(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoint.load_weights(tmp_path / "nowhere")


def test_save_failing_keeps_old_file(world, tmp_path, monkeypatch):
    composition = trained(world.align_config(tmp_path))
    path = saved(composition, tmp_path / "c")
    before = path.read_bytes()

    def fail(tensors, target, metadata):
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("longalign.files.weights.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        saved(composition, tmp_path / "c")
    assert path.read_bytes() == before


def rewritten(path, tensors=None, **metadata):
    """Rewrites a checkpoint with different tensors or metadata, without the checksum."""
    metadata_read = {key: value for key, value in read_metadata(path).items() if key != "checksum"}
    save_file(tensors or load_file(path), path, {**metadata_read, **metadata})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, key: {**t, key: t[key] * float("nan")}, "finite.* 'lora.0.*non-finite"),
        (lambda t, key: {**t, key: t[key].int()}, "finite.* 'lora.0.*torch.int32"),
        (
            lambda t, key: {**t, "lora.1.x": t[key].clone()},
            r" 1 tensors .*metadata.* 'lora\.1\.x'",
        ),
        (lambda t, key: {f"unet.{k}": v for k, v in t.items()}, r" \d+ tensors .*metadata.* 'unet\."),
        (lambda t, key: {k: v for k, v in t.items() if not k.startswith("lora.")}, "the LoRA 'align'.* no tensors"),
    ],
)
def test_load_weights_invalid_tensors_raise(world, tmp_path, change, message):
    path = saved(trained(world.align_config(tmp_path)), tmp_path / "c")
    tensors = load_file(path)
    rewritten(path, change(tensors, next(key for key in tensors if key.startswith("lora."))))
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.load_weights(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "loras", ["", "{}", "[]", "[1]", '[{"name": "a"}]', '[{"name": "a", "config": {"rank": "x"}}]', "5"]
)
def test_load_weights_invalid_lora_metadata_raises(world, tmp_path, loras):
    path = saved(trained(world.align_config(tmp_path)), tmp_path / "c")
    rewritten(path, loras=loras)
    with pytest.raises(ValueError, match=r"metadata 'loras'|\d+ tensors .*metadata") as caught:
        checkpoint.load_weights(path)
    assert str(path) in str(caught.value)


def test_load_for_sampling_without_training_plugins(world, tmp_path, caplog):
    path = saved(trained(world.reward_config(tmp_path)), tmp_path / "c")
    config = json.loads(read_metadata(path)["config"])
    config["rewards"], config["trainer"]["gradient_steps"] = [{"name": "missing", "key": 1}], {"name": "absent"}
    providers = {"rewards.0": "longalign-missing 1.2", "encoder": "this process"}
    rewritten(path, config=json.dumps(config), providers=json.dumps(providers))
    read, backbone, encoder = checkpoint.load_for_sampling(path, Runtime())
    assert read.rewards == () and read.trainer is None and read.backbone.name == "tiny-backbone"
    assert torch.isfinite(predict(backbone, encoder)).all()
    assert re.search(r"longalign-missing 1\.2.*rewards\.0", caplog.text) and str(path) in caplog.text

    config["encoder"] = {"name": "gone"}
    versions = {**json.loads(read_metadata(path)["versions"]), "longalign": "99.0"}
    providers["encoder"] = "longalign-gone 3"
    rewritten(path, config=json.dumps(config), providers=json.dumps(providers), versions=json.dumps(versions))
    with pytest.raises(ConfigError) as caught:
        checkpoint.load_for_sampling(path, Runtime())
    assert re.search(r"longalign-gone 3.*encoder", str(caught.value))
    assert "longalign 99.0" in str(caught.value)
