"""The conformance checks pass for the parts of this library, and name what a broken part does."""

import pytest
import torch

from longalign.backbones.config import LoraConfig
from longalign.backbones.stable_diffusion.sd import SDBackbone
from longalign.data.scenes.pairs import ScenePairs
from longalign.registry import REGISTRIES, gradient_steps, rewards
from longalign.testing import (
    check_backbone,
    check_data,
    check_encoder,
    check_gradient_steps,
    check_reward,
    check_segmenter,
    check_trainer,
)
from longalign.testing.tiny import tiny_clip, tiny_clip_text, tiny_hpsv2, tiny_sd, tiny_t5


@pytest.mark.parametrize("name", ["clip", "pickscore", "denscore"])
def test_check_reward_clip_family(tmp_path, name):
    check_reward({"name": name, "checkpoint": str(tiny_clip(tmp_path))})


def test_check_reward_hpsv2_sum_edited(tmp_path):
    inner = {"name": "clip", "checkpoint": str(tiny_clip(tmp_path / "clip"))}
    check_reward({"name": "hpsv2", "checkpoint": str(tiny_hpsv2(tmp_path / "hpsv2"))})
    check_reward({"name": "reweighted", "inner": inner, "omega": 0.3, "direction": "batch"}, depends_on_batch=True)
    check_reward({"name": "edited", "inner": inner, "edit": {"name": "pairs", "positive": "good", "negative": "bad"}})
    check_reward({"name": "sum", "terms": [{"reward": inner, "weight": 0.5}]})


def test_check_encoder_clip_and_t5(tmp_path):
    clip, t5 = str(tiny_clip_text(tmp_path / "clip")), str(tiny_t5(tmp_path / "t5"))
    check_encoder({"name": "clip-segment", "checkpoint": clip})
    check_encoder({"name": "clip-segment", "checkpoint": clip, "pad": "none"})
    check_encoder({"name": "clip-truncate", "checkpoint": clip})
    adapter = {"in_dim": 16, "int_dim": 8, "out_dim": 12}
    check_encoder({"name": "t5", "checkpoint": t5, "adapter": adapter})


@pytest.mark.parametrize("name", sorted(set(REGISTRIES["segmenters"].names()) - {"manual", "longalign"}))
def test_check_segmenter(name):
    check_segmenter(name)


@pytest.mark.parametrize("name", gradient_steps.names())
def test_check_gradient_steps(name):
    check_gradient_steps(name)


@pytest.mark.parametrize("name", ["scenes", "scene-pairs"])
def test_check_data_scenes(name):
    check_data({"name": name, "size": 4})


def test_check_data_names_failures(monkeypatch):
    load = ScenePairs.__getitem__
    monkeypatch.setattr(ScenePairs, "__getitem__", lambda data, i: {**load(data, i), "preference": torch.tensor(2.0)})
    with pytest.raises(AssertionError, match=r"'preference' of item 0: expected a tensor \(\) in \[0, 1\], got"):
        check_data({"name": "scene-pairs", "size": 4})


def test_check_backbone_names_weights_without_gradient(tmp_path, monkeypatch):
    monkeypatch.setattr(SDBackbone, "call", lambda self, denoiser, latents, *_: denoiser.conv_in(latents))
    with pytest.raises(AssertionError, match=r"'unused_modules': time_embedding\.linear_1\.weight, "):
        check_backbone({"name": "sd", "checkpoint": str(tiny_sd(tmp_path))}, lora=LoraConfig(rank=2, dropout=0.0))


def test_check_trainer_align(tmp_path):
    sd = str(tiny_sd(tmp_path))
    check_trainer(
        {
            "backbone": {"name": "sd", "checkpoint": sd},
            "encoder": {"name": "clip-segment", "checkpoint": sd},
            "trainer": {"name": "align", "lora": {"rank": 2}},
            "data": {"name": "scenes", "size": 4},
            "loop": {"batch_size": 2, "workers": 0},
        }
    )


def test_check_reward_names_failures():
    state = iter(range(100))
    rewards.register("uneven", lambda images, prompts: images.mean((1, 2, 3)).detach() + next(state))
    try:
        with pytest.raises(AssertionError, match=r"(?s)'uneven'.*scores_repeat.*gradient_is_finite") as caught:
            check_reward("uneven")
        assert "a_batch_equals_singles" in str(caught.value) and "invalid_input" not in str(caught.value)
    finally:
        rewards.unregister("uneven")


def test_check_segmenter_names_lost_text():
    REGISTRIES["segmenters"].register("lossy", lambda prompt, count: [prompt[:5]])
    try:
        with pytest.raises(AssertionError, match="nothing_is_lost"):
            check_segmenter("lossy")
    finally:
        REGISTRIES["segmenters"].unregister("lossy")


def test_check_reward_accepts_function():
    rewards.register("bright", lambda images, prompts: images.mean((1, 2, 3)) + 0 * torch.ones(len(prompts)))
    try:
        check_reward("bright")
    finally:
        rewards.unregister("bright")
