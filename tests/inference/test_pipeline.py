"""Sampling with an ideal denoiser: each prompt is a number, and the denoiser predicts the image of that value."""

import json
import logging
import re
from contextlib import nullcontext

import pytest
import torch
from PIL import Image
from torch import nn

from longalign.config.solvers import SOLVERS
from longalign.encoders.base import Conditioning, Encoder, PromptReport
from longalign.functional.diffusion import NoiseLevels, guide, training_target
from longalign.inference.sampling import generate, sample
from longalign.inference.schedulers import make_scheduler


class NumberEncoder(Encoder):
    """Encodes "0.3 and more" as the state 0.3; text after the first word is truncated."""

    dim = 1

    def encode(self, prompts):
        values = [float((p.split() or ["0"])[0]) for p in prompts]
        return Conditioning(torch.tensor(values).reshape(-1, 1, 1), reports=tuple(self.report(prompts)))

    def report(self, prompts):
        return [PromptReport((p.split(" ")[0],), (1,), p.partition(" ")[2]) for p in prompts]


class IdealBackbone(nn.Module):
    """Predicts clean latents that equal the prompt's number everywhere; decoding is the identity."""

    resolution = 4
    device = torch.device("cpu")

    def __init__(self, prediction="epsilon", last=None):
        super().__init__()
        self.prediction = prediction
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        alphas_cumprod = (1 - betas).cumprod(0) * torch.linspace(
            1, 1 if last is None else last, 1000, dtype=torch.float64
        )
        flow = prediction == "flow"
        self.noise_levels = (
            NoiseLevels.from_flow(1000, 3.0) if flow else NoiseLevels.from_alphas_cumprod(alphas_cumprod)
        )
        self.calls = []

    def project_text(self, conditioning):
        return conditioning

    def levels_at(self, shape):
        return self.noise_levels

    def guide(self, conditional, unconditional, scale):
        return guide(conditional, unconditional, scale)

    def merged_lora(self):
        return nullcontext()

    def latent_shape(self, height=None, width=None):
        return 3, height or self.resolution, width or self.resolution

    def predict(self, latents, timesteps, conditioning):
        self.calls.append(len(latents))
        x0 = conditioning.states.expand(-1, 4, 4)[:, None].expand_as(latents)
        signal, noise = self.noise_levels.at(timesteps, latents)
        return training_target(self.prediction, self.noise_levels, x0, (latents - signal * x0) / noise, timesteps)

    def decode(self, latents):
        return latents.clamp(0, 1)


class NoisyBackbone(IdealBackbone):
    """Keeps some of the initial noise in the image, so that seeds differ."""

    def predict(self, latents, timesteps, conditioning):
        return 0.5 * super().predict(latents, timesteps, conditioning) + 0.1 * latents


def raise_(error):
    raise error


def sample_images(backbone, prompts, **settings):
    settings = {"seeds": list(range(len(prompts))), "num_steps": 5, "guidance": 1, **settings}
    return sample(backbone, NumberEncoder(), prompts, **settings)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_sample_all_solvers_reach_known_image(solver, prediction):
    if (prediction, solver) == ("flow", "dpm++"):
        with pytest.raises(ValueError, match=r"'dpm\+\+'.*flow.*unipc, ddim.* lcm"):
            sample_images(IdealBackbone(prediction), ["0.3"], solver=solver)
        return
    images = sample_images(IdealBackbone(prediction), ["0.3", "0.8"], solver=solver)
    assert images.shape == (2, 3, 4, 4) and images.dtype == torch.float32
    torch.testing.assert_close(images.mean((1, 2, 3)), torch.tensor([0.3, 0.8]), atol=2e-4, rtol=0)


@pytest.mark.parametrize("solver", ["ddim", "unipc"])
def test_sample_zero_terminal_snr(solver):
    images = sample_images(IdealBackbone("v_prediction", last=0.0), ["0.3"], solver=solver)
    torch.testing.assert_close(images.mean(), torch.tensor(0.3), atol=2e-3, rtol=0)


def test_sample_guidance_interval():
    """Noise levels of the five steps are 14.6, 5.1, 2.3, 1.2 and 0.6."""
    backbone, settings = NoisyBackbone(), {"negative": "0.5", "guidance": 3, "solver": "ddim"}
    images = sample_images(backbone, ["0.6"], **settings, guidance_interval=(1, 3))
    assert backbone.calls == [1, 1, 2, 2, 1]
    everywhere = sample_images(backbone, ["0.6"], **settings, guidance_interval=(0, 15))
    torch.testing.assert_close(everywhere, sample_images(backbone, ["0.6"], **settings))
    assert not torch.allclose(images, everywhere)
    with pytest.raises(ValueError, match=r"guidance_interval 20 to 30.*5 steps"):
        sample_images(backbone, ["0.6"], **settings, guidance_interval=(20, 30))
    with pytest.raises(ValueError, match="guidance_interval has no effect at guidance 1"):
        sample_images(backbone, ["0.6"], guidance_interval=(1, 3))


def test_sample_guidance_extrapolates_from_negative_prompt():
    backbone = IdealBackbone()
    # uncond + guidance (cond - uncond): 0.5 + 3 (0.6 - 0.5)
    images = sample_images(backbone, ["0.6"], negative="0.5", guidance=3)
    torch.testing.assert_close(images.mean(), torch.tensor(0.8), atol=1e-4, rtol=0)
    assert backbone.calls == [2] * 5
    images = sample_images(backbone, ["0.2"], guidance=2)
    torch.testing.assert_close(images.mean(), torch.tensor(0.4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_sample_depends_on_seed_not_batch(solver):
    prompts, seeds = ["0.3", "0.5", "0.7"], [11, 12, 11]
    batched = sample_images(NoisyBackbone(), prompts, seeds=seeds, solver=solver, batch_size=3)
    single = sample_images(NoisyBackbone(), prompts, seeds=seeds, solver=solver, batch_size=1)
    torch.testing.assert_close(batched, single)
    reversed_order = sample_images(NoisyBackbone(), prompts[::-1], seeds=seeds[::-1], solver=solver, batch_size=2)
    torch.testing.assert_close(batched, reversed_order.flip(0))
    two_seeds = sample_images(NoisyBackbone(), ["0.3", "0.3"], seeds=[1, 2], solver=solver)
    assert not torch.allclose(two_seeds[0], two_seeds[1])


def test_make_scheduler_timesteps_match_paper():
    levels = IdealBackbone().noise_levels
    assert make_scheduler("ddim", levels, "epsilon", 50).timesteps.tolist() == list(range(999, 0, -20))
    assert make_scheduler("lcm", levels, "epsilon", 4).timesteps.tolist() == [999, 749, 499, 249]
    torch.testing.assert_close(
        make_scheduler("ddim", levels, "epsilon", 5).alphas_cumprod.double(), levels.signal**2, rtol=1e-4, atol=0
    )
    # u = 1, 3/4, 2/4, 1/4 and s = 3 u / (1 + 2 u)
    for name in ("ddim", "lcm"):
        flow = make_scheduler(name, IdealBackbone("flow").noise_levels, "flow", 4)
        torch.testing.assert_close(flow.timesteps, torch.tensor([1000, 900, 750, 500.0]))


def test_sample_height_and_width():
    assert sample_images(IdealBackbone(), ["0.1"], height=4, width=4).shape[-2:] == (4, 4)
    backbone = IdealBackbone()
    backbone.latent_shape = lambda height, width: (3, height, width)
    backbone.predict = lambda latents, timesteps, conditioning: torch.zeros_like(latents)
    assert sample_images(backbone, ["0.1"], height=2, width=6).shape == (1, 3, 2, 6)


def test_sample_restores_training_mode():
    backbone = IdealBackbone().train()
    backbone.frozen = nn.Dropout().eval()
    modes = []
    predict = backbone.predict
    backbone.predict = lambda *args: modes.append(backbone.training) or predict(*args)
    sample_images(backbone, ["0.1"])
    assert not any(modes) and backbone.training and not backbone.frozen.training


def test_sample_invalid_settings_raise():
    backbone = IdealBackbone()
    with pytest.raises(ValueError, match=r"solver 'euler'.*unipc, ddim"):
        sample_images(backbone, ["0.1"], solver="euler")
    with pytest.raises(ValueError, match="1 seeds and 2 prompts"):
        sample_images(backbone, ["0.1", "0.2"], seeds=[0])
    with pytest.raises(ValueError, match=r"num_steps.* 1 .*1000.* 0$"):
        sample_images(backbone, ["0.1"], num_steps=0)
    with pytest.raises(ValueError, match=r"negative prompt.* 1 .*for 2 prompts"):
        sample_images(backbone, ["0.1", "0.2"], negative=["0"], guidance=2)
    with pytest.raises(ValueError, match=r"negative prompt.*guidance 1;"):
        sample_images(backbone, ["0.1"], negative="0.5")
    with pytest.raises(ValueError, match="prediction type 'sample'"):
        make_scheduler("ddim", backbone.noise_levels, "sample", 5)


def test_generate_writes_png_metadata_and_index(tmp_path, caplog):
    source = {"backbone": "toy"}, IdealBackbone(), NumberEncoder()
    with caplog.at_level(logging.WARNING, "longalign"):
        rows = generate(
            source,
            ["0.25", "0.75 and a tail — ünïcode"],
            tmp_path / "out",
            seeds=[4, 5],
            num_steps=3,
            guidance=1,
            batch_size=3,
        )
    lines = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert lines == rows
    assert [row["file_name"] for row in rows] == ["00000-4.png", "00000-5.png", "00001-4.png", "00001-5.png"]
    assert rows[2]["truncated"] == "and a tail — ünïcode" and rows[0]["truncated"] == ""
    assert re.search(r"prompt 1: .*\b1 tokens.*\b5 words", caplog.text)
    with Image.open(tmp_path / "out" / "00001-5.png") as image:
        assert image.size == (4, 4) and image.getpixel((0, 0)) == (191, 191, 191)
        assert image.text["prompt"] == "0.75 and a tail — ünïcode" and image.text["seed"] == "5"
        assert json.loads(image.text["config"]) == {"backbone": "toy"}
        settings = json.loads(image.text["settings"])
        assert settings["num_steps"] == 3 and settings["solver"] == "unipc"
    with pytest.raises(ValueError, match=r"metadata\.jsonl.* 4 images"):
        generate(source, ["0.25"], tmp_path / "out")


def test_generate_failing_before_first_image_writes_nothing(tmp_path):
    backbone = IdealBackbone()
    source = {}, backbone, NumberEncoder()
    with pytest.raises(ValueError, match="solver 'euler'"):
        generate(source, ["0.5"], tmp_path / "out", solver="euler")
    backbone.predict = lambda *args: raise_(MemoryError())
    with pytest.raises(MemoryError):
        generate(source, ["0.5"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metadata.jsonl").touch()
    del backbone.predict
    assert len(generate(source, ["0.5"], tmp_path / "out", num_steps=2)) == 1


def test_generate_interrupted_keeps_complete_batches(tmp_path):
    source = {}, IdealBackbone(), NumberEncoder()
    with pytest.raises(ValueError, match="could not convert"):
        generate(source, ["0.1", "0.2", "0.3", "x"], tmp_path, num_steps=2, guidance=1, batch_size=2)
    lines = (tmp_path / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["file_name"] for line in lines] == ["00000-0.png", "00001-0.png"]
    with pytest.raises(ValueError, match=r"metadata\.jsonl.* 2 images.*" + re.escape(str(tmp_path))):
        generate("missing config", ["0.1"], tmp_path)
    with pytest.raises(ValueError, match=r"dtype and device.*\(config, backbone, encoder\)"):
        generate(source, ["0.1"], tmp_path / "new", dtype="bfloat16")
