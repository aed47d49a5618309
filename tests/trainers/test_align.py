"""Noise-prediction fine-tuning: loss, trainable parameters, caption dropout."""

import pytest
import torch
from worlds import LORA, Squares, ToyEncoder

from longalign.backbones.base import Backbone
from longalign.errors import ConfigError
from longalign.functional.diffusion import sample_timesteps, training_target
from longalign.loop.batches import collate
from longalign.registry import trainers
from longalign.runtime import Runtime
from longalign.testing.tiny import tiny_backbone
from longalign.trainers.align.config import AlignConfig
from longalign.trainers.align.trainer import AlignTrainer

BATCH = collate([Squares()[i] for i in (1, 7)])


def build(lora=LORA, encoder=None, **keys):
    torch.manual_seed(0)
    config = AlignConfig(lora=lora, **keys)
    parts = {"backbone": tiny_backbone(), "encoder": encoder or ToyEncoder()}
    return AlignTrainer.from_config(config, Runtime(), **parts).train()


def graded(module):
    return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


@pytest.mark.parametrize("train_adapter", [True, False])
def test_step_gradient_reaches_only_lora_and_adapter(train_adapter):
    trainer = build(train_adapter=train_adapter)
    losses = trainer.step(BATCH, torch.Tensor.backward)
    assert set(losses) == {"noise_loss"} and losses["noise_loss"] > 0 and not losses["noise_loss"].requires_grad
    assert all(".lora_B." in name for name in graded(trainer.backbone)) and graded(trainer.backbone)
    assert graded(trainer.encoder) == ({"adapter.0.weight", "adapter.0.bias"} if train_adapter else set())
    assert set(trainer.encoder.adapter_parameters()) == {"adapter.0.weight", "adapter.0.bias"}
    expected = [p for p in trainer.parameters() if p.requires_grad]
    assert len(trainer.trainable()) == len(expected) and all(p.requires_grad for p in trainer.trainable())


def test_full_finetune_gradient_reaches_all_denoiser_weights():
    trainer = build(lora=None)
    trainer.step(BATCH, torch.Tensor.backward)
    assert graded(trainer.backbone) == {f"denoiser.{n}" for n, _ in trainer.backbone.denoiser.named_parameters()}
    assert trainer.backbone.full_finetune


def test_train_keeps_frozen_modules_in_eval_mode():
    trainer = build()
    assert trainer.training and trainer.encoder.adapter[1].training
    assert not trainer.encoder.frozen[1].training and not trainer.backbone.vae.training
    dropouts = [m.lora_dropout["align"] for m in trainer.backbone.denoiser.modules() if hasattr(m, "lora_A")]
    assert all(d.training for d in dropouts)
    trainer.eval()
    assert not any(m.training for m in trainer.modules())
    frozen = build(train_adapter=False)
    assert not frozen.encoder.adapter[1].training


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_loss_is_zero_for_perfect_prediction(prediction):
    class PerfectTrainer(AlignTrainer):
        def loss(self, batch):
            backbone = self.backbone
            encoded = backbone.encode_images(batch["image"])
            backbone.encode_images = lambda images: encoded

            def predict(noisy, timesteps, conditioning):
                signal, sigma = backbone.noise_levels.at(timesteps, noisy)
                noise = (noisy - signal * encoded) / sigma
                return training_target(prediction, backbone.noise_levels, encoded, noise, timesteps)

            backbone.predict = predict
            return super().loss(batch)

    backbone = tiny_backbone(prediction)
    config = AlignConfig(lora=LORA, caption_dropout=0)
    trainer = PerfectTrainer.from_config(config, Runtime(), backbone=backbone, encoder=ToyEncoder())
    assert trainer.loss(BATCH)["noise_loss"] < 1e-3


@pytest.mark.parametrize(
    ("prediction", "setting", "expected"),
    [("epsilon", None, "uniform"), ("flow", None, "logit-normal"), ("flow", "uniform", "uniform")],
)
def test_timesteps_default_is_logit_normal_for_flows(monkeypatch, prediction, setting, expected):
    densities = []

    def recorded(density, *args):
        densities.append(density)
        return sample_timesteps(density, *args)

    monkeypatch.setattr("longalign.trainers.diffusion.sample_timesteps", recorded)
    config = AlignConfig(lora=LORA, timesteps=setting)
    parts = {"backbone": tiny_backbone(prediction), "encoder": ToyEncoder()}
    AlignTrainer.from_config(config, Runtime(), **parts).loss(BATCH)
    assert densities == [expected]


@pytest.mark.parametrize(("caption_dropout", "expected"), [(0.0, ["1", "7"]), (1.0, ["", ""])])
def test_caption_dropout_encodes_empty_prompt(caption_dropout, expected):
    encoded = []

    class RecordingEncoder(ToyEncoder):
        def encode(self, prompts):
            encoded.append(list(prompts))
            return super().encode(prompts)

    build(encoder=RecordingEncoder(), caption_dropout=caption_dropout).loss(BATCH)
    assert encoded == [expected]


def test_loss_rejects_batch_without_images():
    with pytest.raises(ValueError, match=r"'align'.*images"):
        build().loss({"prompt": ["a"]})


def test_align_rejects_rewards(world):
    config = world.align_config("x")
    from longalign.config.run import load_config

    with pytest.raises(ConfigError, match="rewards: 'align'"):
        load_config({**config, "rewards": ["red"]})
    with pytest.raises(ValueError, match=r"'align' uses no rewards, got \["):
        trainers.build("align", backbone=tiny_backbone(), encoder=ToyEncoder(), rewards=[world.red])


def test_registry_builds_align_by_name():
    trainer = trainers.build({"name": "align", "lora": {"rank": 3}}, backbone=tiny_backbone(), encoder=ToyEncoder())
    assert isinstance(trainer, AlignTrainer) and isinstance(trainer.backbone, Backbone)
    assert trainer.backbone.lora_names == ["align"] and trainer.caption_dropout == 0.1
