"""The backbone `pixart`, compared with diffusers' pipelines; trainers."""

import diffusers
import pytest
import torch

from longalign import condition, load_config
from longalign.encoders.base import Conditioning
from longalign.functional.diffusion import predict_guided
from longalign.inference.sampling import sample
from longalign.inference.schedulers import make_scheduler
from longalign.registry import backbones, encoders, trainers
from longalign.testing.tiny import tiny_pixart

LONG = "A red fox sleeps on a wall. The sky is green. A wall is red."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pixart(tmp_path_factory.mktemp("pixart"), size_conditions=True)


@pytest.fixture(scope="module")
def encoder(folder):
    return encoders.build({"name": "t5", "checkpoint": str(folder), "max_tokens": 40, "mask": True})


def build(folder):
    return backbones.build({"name": "pixart", "checkpoint": str(folder)})


def test_pixart_published_numbers():
    with torch.device("meta"):
        transformer = diffusers.PixArtTransformer2DModel(caption_channels=4096, use_additional_conditions=False)
    # the position embeddings are a buffer
    assert sum(p.numel() for p in transformer.parameters()) == 610_856_096


def test_pixart_size_and_first_half_of_the_output(folder, encoder):
    backbone, conditioning = build(folder), encoder.encode([LONG, "A fox."])
    assert backbone.resolution == 32 and backbone.latent_shape(32, 48) == (4, 8, 12) and backbone.divisor == 8
    latents, timesteps = torch.randn(2, 4, 8, 12), torch.tensor([3, 999])
    prediction = backbone.predict(latents, timesteps, conditioning)
    added = {"resolution": torch.tensor([[32.0, 48.0]] * 2), "aspect_ratio": torch.tensor([[2 / 3]] * 2)}
    output = backbone.denoiser(
        latents,
        encoder_hidden_states=conditioning.states,
        encoder_attention_mask=conditioning.mask,
        timestep=timesteps,
        added_cond_kwargs=added,
    ).sample
    assert output.shape == (2, 8, 8, 12)
    torch.testing.assert_close(prediction, output[:, :4])
    with pytest.raises(ValueError, match=r"width 32, got width 24"):
        backbone.predict(latents, timesteps, Conditioning(torch.randn(2, 3, 24)))


@pytest.mark.parametrize("sigma", [False, True], ids=["alpha", "sigma"])
def test_pixart_images_equal_diffusers_pipeline(tmp_path, encoder, sigma):
    folder = tiny_pixart(tmp_path, sigma)
    backbone = build(folder)
    pipe = (diffusers.PixArtSigmaPipeline if sigma else diffusers.PixArtAlphaPipeline).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler("ddim", backbone.noise_levels, backbone.prediction, 3)
    settings = {"num_steps": 3, "guidance": 3.0, "solver": "ddim", "negative": "green"}
    images = sample(backbone, encoder, [LONG, "A fox."], seeds=[3, 4], **settings)
    noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (3, 4)])
    expected = pipe(
        **condition(pipe, [LONG, "A fox."], "green", encoder=encoder), latents=noise, num_inference_steps=3,
        guidance_scale=3.0, height=32, width=32, use_resolution_binning=False, output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    assert images.std() > 0.01


def red_reward(images, prompts):
    return images[:, 0].mean((1, 2))


def test_pixart_reward_gradient_equals_autograd(folder, encoder):
    config = {"name": "reward", "num_steps": 2, "guidance": 3.0, "gradient_steps": "all"}
    trainer = trainers.build(
        {**config, "lora": {"rank": 2, "dropout": 0.0}}, backbone=build(folder), encoder=encoder, rewards=[red_reward]
    )
    backbone = trainer.backbone.double()
    for i, p in enumerate(trainer.trainable()):
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(i))
    conditioning = trainer.encode_with_uncond([LONG])
    latents = noise = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    trainer.noise = lambda count: noise
    for index, t in enumerate(trainer.solver.timesteps):
        output = predict_guided(
            lambda x, times: backbone.predict(x, times, conditioning), latents.detach(), torch.tensor([t]), 3.0
        )
        latents, _ = trainer.solver.step(index, latents, output)
    (0.5 * (1 - red_reward(backbone.decode(latents), None).mean())).backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.trainable()])
    backbone.zero_grad()
    trainer.step({"prompt": [LONG]}, torch.Tensor.backward)
    got = torch.cat([p.grad.flatten() for p in trainer.trainable()])
    assert expected.norm() > 0 and (got - expected).norm() / expected.norm() < 1e-6


def test_pixart_align_by_config(folder, encoder):
    config = load_config(
        {
            "backbone": {"name": "pixart", "checkpoint": str(folder)},
            "encoder": {"name": "t5", "checkpoint": str(folder), "max_tokens": 40, "mask": True},
            "trainer": {"name": "align", "lora": {"rank": 2, "targets": ["to_q", "ff.net.2"]}},
            "data": {"name": "scenes", "size": 2},
        }
    )
    trainer = trainers.build(config.trainer.model_dump(), backbone=build(folder), encoder=encoder)
    losses = trainer.train().step({"prompt": [LONG, ""], "image": torch.rand(2, 3, 32, 32)}, torch.Tensor.backward)
    assert all(torch.isfinite(loss) for loss in losses.values()) and len(trainer.trainable()) == 2 * 3
