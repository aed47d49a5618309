"""The backbone `flux` and its encoder `t5-flux`, compared with diffusers' pipeline; trainers; files."""

import diffusers
import pytest
import torch

from longalign import condition, load_config
from longalign.checkpoints.checkpoint import load_for_sampling, save
from longalign.checkpoints.diffusers_files import export_lora
from longalign.encoders.base import Conditioning
from longalign.functional.solvers import trailing_timesteps
from longalign.inference.sampling import sample
from longalign.registry import backbones, encoders, trainers
from longalign.testing.encoders import check_encoder
from longalign.testing.tiny import tiny_flux

LONG = "A red fox sleeps on a wall. The sky is green. A wall is red."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def encoder(folder):
    return encoders.build({"name": "t5-flux", "checkpoint": str(folder), "max_tokens": 40})


@pytest.fixture(scope="module")
def pipe(folder):
    return load_pipeline(folder)


def load_pipeline(folder):
    pipe = diffusers.FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build(folder, **settings):
    return backbones.build({"name": "flux", "checkpoint": str(folder), "image_size": 32, **settings})


def test_flux_published_numbers():
    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    assert sum(p.numel() for p in transformer.parameters()) == 11_901_408_320


def test_flux_encoder_conforms(folder):
    check_encoder({"name": "t5-flux", "checkpoint": str(folder), "max_tokens": 20})


def test_flux_noise_levels_equal_the_scheduler_of_the_image_size(folder):
    backbone = build(folder)
    assert backbone.resolution == 32 and backbone.latent_shape() == (4, 8, 8) and backbone.divisor == 8
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    for side, tokens in ((32, 16), (256, 1024)):
        mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
        levels = backbone.levels_at(backbone.latent_shape(side, side))
        noise = levels.noise[list(trailing_timesteps(4))]
        torch.testing.assert_close(noise.float(), scheduler.sigmas[:-1])
    assert backbone.levels_at((4, 8, 8)) is backbone.noise_levels


def test_flux_encoder_equals_diffusers_pipeline(folder, pipe, encoder):
    conditioning = encoder.encode(["A red fox.", ""])
    states, pooled, _ = pipe.encode_prompt(["A red fox.", ""], None, max_sequence_length=40)
    torch.testing.assert_close(conditioning.states, states, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(conditioning.pooled, pooled, rtol=1e-4, atol=1e-4)
    whole = encoders.build({"name": "t5-flux", "checkpoint": str(folder), "pooled": "truncate"}).encode([LONG])
    _, pooled, _ = pipe.encode_prompt(LONG, None)
    torch.testing.assert_close(whole.pooled, pooled, rtol=1e-4, atol=1e-4)
    assert whole.states.shape == (1, 512, 32) and not torch.allclose(whole.pooled, encoder.encode([LONG]).pooled)
    default = condition(pipe, "A red fox.")
    torch.testing.assert_close(default["pooled_prompt_embeds"], conditioning.pooled[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dynamic", "guidance", "side"), [(True, True, 32), (True, True, 48), (False, False, 32)])
def test_flux_images_equal_diffusers_pipeline(tmp_path, encoder, dynamic, guidance, side):
    folder = tiny_flux(tmp_path, dynamic, guidance)
    backbone, pipe = build(folder), load_pipeline(folder)
    size = {"height": side, "width": side}
    images = sample(backbone, encoder, [LONG], seeds=[3], num_steps=4, guidance=1, solver="ddim", **size)
    noise = torch.randn(1, 4, side // 4, side // 4, generator=torch.Generator().manual_seed(3))
    packed = pipe._pack_latents(noise, 1, 4, side // 4, side // 4)
    expected = pipe(
        **condition(pipe, LONG, encoder=encoder), latents=packed, num_inference_steps=4, output_type="pt", **size
    ).images
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    assert images.std() > 0.01


def test_flux_guidance_is_an_input(folder, encoder, tmp_path):
    latents, conditioning = torch.randn(1, 4, 8, 8), encoder.encode([LONG])
    outputs = [build(folder, **g).predict(latents, torch.tensor([500]), conditioning) for g in ({}, {"guidance": 1})]
    assert not torch.allclose(*outputs)
    with pytest.raises(ValueError, match=r"no guidance scale, got guidance=2"):
        build(tiny_flux(tmp_path, guidance=False), guidance=2)


def test_flux_rejects_wrong_conditioning(folder):
    states, mask = torch.randn(1, 4, 32), torch.tensor([[True, True, False, False]])
    for wrong in (Conditioning(states), Conditioning(states, mask, torch.randn(1, 16))):
        with pytest.raises(ValueError, match=r"FLUX's transformer .*(t5-flux|without a mask)"):
            build(folder).predict(torch.randn(1, 4, 8, 8), torch.tensor([1]), wrong)


def red_reward(images, prompts):
    return images[:, 0].mean((1, 2))


def test_flux_reward_gradient_equals_autograd(folder, encoder):
    config = {"name": "reward", "num_steps": 2, "guidance": 1, "gradient_steps": "all"}
    config |= {"lora": {"rank": 2, "dropout": 0.0}, "resolution": "64x32"}
    trainer = trainers.build(config, backbone=build(folder), encoder=encoder, rewards=[red_reward])
    backbone = trainer.backbone.double()
    for i, p in enumerate(trainer.trainable()):
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(i))
    conditioning = encoder.encode([LONG]).to(dtype=torch.float64)
    latents = noise = torch.randn(1, 4, 8, 16, dtype=torch.float64)
    trainer.noise = lambda count: noise
    levels = backbone.levels_at((4, 8, 16)).noise
    assert levels is not backbone.noise_levels.noise
    for t, level, next_level in ((999, levels[999], levels[499]), (499, levels[499], 0.0)):
        output = backbone.predict(latents.detach(), torch.tensor([t]), conditioning)
        latents = latents + (next_level - level) * output  # Euler's step
    (0.5 * (1 - red_reward(backbone.decode(latents), None).mean())).backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.trainable()])
    backbone.zero_grad()
    trainer.step({"prompt": [LONG]}, torch.Tensor.backward)
    got = torch.cat([p.grad.flatten() for p in trainer.trainable()])
    assert expected.norm() > 0 and (got - expected).norm() / expected.norm() < 1e-6


def test_flux_lcm_uses_the_noise_levels_of_the_size(folder, encoder):
    trainer = trainers.build({"name": "lcm", "lora": {"rank": 2}}, backbone=build(folder), encoder=encoder)
    for height, width in ((32, 32), (16, 48)):
        loss = trainer.loss({"prompt": [LONG], "image": torch.rand(1, 3, height, width)})["consistency_loss"]
        noise = trainer.backbone.levels_at((4, height // 4, width // 4)).noise
        assert loss.isfinite() and trainer.solve.b[999] == pytest.approx(float(noise[979] - noise[999]))


def run_config(folder, **trainer):
    return load_config(
        {
            "backbone": {"name": "flux", "checkpoint": str(folder), "image_size": 32},
            "encoder": {"name": "t5-flux", "checkpoint": str(folder), "max_tokens": 40},
            "trainer": {"name": "align", "lora": {"rank": 2, "dropout": 0.0}, **trainer},
            "data": {"name": "scenes", "size": 2},
        }
    )


def test_flux_align_and_lora_in_diffusers(folder, encoder, tmp_path):
    config, backbone = run_config(folder), build(folder)
    trainer = trainers.build(config.trainer.model_dump(), backbone=backbone, encoder=encoder)
    losses = trainer.train().step({"prompt": [LONG, ""], "image": torch.rand(2, 3, 32, 32)}, torch.Tensor.backward)
    assert all(torch.isfinite(loss) for loss in losses.values())
    with torch.no_grad():
        for p in trainer.trainable():
            p.add_(0.3 * torch.randn_like(p))
    trainer.eval()
    latents, conditioning = torch.randn(1, 4, 8, 8), encoder.encode([LONG])
    trained = backbone.predict(latents, torch.tensor([249]), conditioning).detach()
    save(tmp_path / "run", config, backbone, encoder, 1)
    _, loaded, _ = load_for_sampling(tmp_path / "run")
    torch.testing.assert_close(loaded.predict(latents, torch.tensor([249]), conditioning), trained)
    pipe, file = load_pipeline(folder), export_lora(tmp_path / "run", tmp_path / "lora")
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    other = build(folder)
    other.denoiser = pipe.transformer
    other.wrap_denoiser(pipe.transformer)
    with torch.no_grad():
        prediction = other.predict(latents, torch.tensor([249]), conditioning)
    torch.testing.assert_close(prediction, trained, atol=1e-5, rtol=1e-5)
