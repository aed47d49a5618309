"""The backbone `sdxl`: sizes, layout, conditioning compared with diffusers' pipeline, trainers."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from longalign import condition
from longalign.backbones.lora import lora_targets
from longalign.backbones.stable_diffusion.sdxl import SDXLBackbone
from longalign.encoders.base import Conditioning
from longalign.inference.sampling import sample
from longalign.inference.schedulers import make_scheduler
from longalign.registry import backbones, encoders, trainers
from longalign.runtime import Runtime
from longalign.testing.tiny import tiny_sd, tiny_sdxl

LONG = "A red fox sleeps on a wall. The sky is green. A wall is red."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def backbone(folder):
    return backbones.build({"name": "sdxl", "checkpoint": str(folder)})


@pytest.fixture(scope="module")
def encoder(folder):
    return build_encoder(folder)


def build_encoder(folder, **settings):
    return encoders.build({"name": "clip-segment-sdxl", "checkpoint": str(folder), "max_tokens": 40, **settings})


def test_sdxl_unet_published_numbers():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    # 70 blocks with two attentions of four layers and a GEGLU; 17 residual blocks, 11 with a shortcut
    assert len(lora_targets(unet)) == 70 * 9 + 17 * 3 + 11


def test_sdxl_conditioning_equals_diffusers_pipeline(folder, pipe):
    encoder = build_encoder(folder, max_tokens=77, eot="all")
    conditioning = encoder.encode(["A red fox.", ""])
    states, zeros, pooled, no_pooled = pipe.encode_prompt(["A red fox."], do_classifier_free_guidance=True)
    tokens = conditioning.reports[0].tokens[0] + 2
    assert conditioning.states.shape == (2, 77, 40) and encoder.dim == 40 and conditioning.pooled.shape == (2, 12)
    torch.testing.assert_close(conditioning.states[:1, :tokens], states[:, :tokens])
    torch.testing.assert_close(conditioning.pooled[:1], pooled)
    assert torch.equal(conditioning.states[1:], zeros) and torch.equal(conditioning.pooled[1:], no_pooled)


def test_sdxl_encoder_pooled_rules(folder, pipe):
    parts = ["A red fox sleeps on a wall.", "The sky is green.", "A wall is red."]
    per_part = torch.cat([pipe.encode_prompt([part], do_classifier_free_guidance=False)[2] for part in parts])
    whole = pipe.encode_prompt([LONG], do_classifier_free_guidance=False)[2]
    expected = {"mean": per_part.mean(0), "first": per_part[0], "truncate": whole[0]}
    encoder = build_encoder(folder, segmenter={"name": "manual"})
    for rule, pooled in expected.items():
        encoder.pooled = rule
        prompt = LONG if rule == "truncate" else parts
        torch.testing.assert_close(encoder.encode([prompt, "The sky."]).pooled[0], pooled, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(per_part[0], whole[0], atol=1e-2)


def test_sdxl_encoder_empty_prompt_and_padding(folder):
    encoder = build_encoder(folder, empty="encode")
    conditioning = encoder.encode(["", "A fox."])
    assert conditioning.pooled[0].abs().sum() > 0 and conditioning.states[0].abs().sum() > 0
    assert torch.equal(conditioning.states[0, 1], conditioning.states[0, 39]) and not torch.equal(
        conditioning.states[0, 0], conditioning.states[0, 1]
    )
    masked = build_encoder(folder, pad="none")
    conditioning = masked.encode(["A fox.", "A red fox. A wall."])
    assert conditioning.mask.sum(1).tolist() == [4, conditioning.states.shape[1]]


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # between diffusers' solvers and numpy 2
def test_sdxl_images_equal_diffusers_pipeline(backbone, encoder, pipe):
    settings = {"seeds": [3, 4], "num_steps": 3, "guidance": 3.0, "solver": "ddim", "negative": "green"}
    images = sample(backbone, encoder, [LONG, "The sky."], **settings)
    pipe.scheduler = make_scheduler("ddim", backbone.noise_levels, backbone.prediction, 3)
    conditioning = condition(pipe, [LONG, "The sky."], "green", encoder=encoder)
    assert set(conditioning) == {f"{a}{b}prompt_embeds" for a in ("", "negative_") for b in ("", "pooled_")}
    noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (3, 4)])
    expected = pipe(**conditioning, latents=noise, num_inference_steps=3, guidance_scale=3.0, output_type="pt").images
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
    assert images.std() > 0.01


def test_sdxl_call_passes_time_ids_and_pooled(backbone, encoder):
    conditioning, received = encoder.encode(["A fox.", "The sky."]), []

    def denoiser(latents, timesteps, **keys):
        received.append(keys["added_cond_kwargs"])
        return (latents,)

    backbone.call(denoiser, torch.zeros(2, 4, 8, 12), torch.tensor([5, 5]), conditioning)
    assert received[0]["time_ids"].tolist() == [[64, 96, 0, 0, 64, 96]] * 2
    assert torch.equal(received[0]["text_embeds"], conditioning.pooled)


def test_sdxl_rejects_wrong_conditioning_or_layout(folder, backbone, tmp_path):
    latents, timesteps = torch.zeros(1, 4, 8, 8), torch.tensor([5])
    for pooled, got in ((None, "none"), (torch.zeros(1, 7), "one of width 7")):
        with pytest.raises(ValueError, match=f"pooled embedding of width 12 .*gives {got}"):
            backbone.predict(latents, timesteps, Conditioning(torch.zeros(1, 2, 40), pooled=pooled))
    with pytest.raises(ValueError, match=r"width 40, .*width 16"):
        backbone.predict(latents, timesteps, Conditioning(torch.zeros(1, 2, 16)))
    with pytest.raises(ValueError, match=r"addition_embed_type 'text_time'.* got None"):
        backbones.build({"name": "sdxl", "checkpoint": str(tiny_sd(tmp_path))})
    with pytest.raises(ValueError, match=r"addition_embed_type=text_time.*'sdxl'"):
        backbones.build({"name": "sd", "checkpoint": str(folder)})


def test_sdxl_force_upcast_vae_stays_in_float32(folder):
    half = backbones.build({"name": "sdxl", "checkpoint": str(folder)}, Runtime("cpu", "float16"))
    assert isinstance(half, SDXLBackbone) and half.vae.dtype == torch.float32
    assert half.resolution == 64 and half.prediction == "epsilon" and half.pooled_width == 12


def red_reward(images, prompts):
    return images[:, 0].mean((1, 2))


@pytest.mark.parametrize("name", ["align", "reward"])
def test_sdxl_trainer_step(folder, encoder, name):
    backbone = backbones.build({"name": "sdxl", "checkpoint": str(folder)})
    layers = len(lora_targets(backbone.denoiser))
    config = {"name": name, "lora": {"rank": 2, "dropout": 0.0}}
    if name == "reward":
        config |= {"num_steps": 2, "guidance": 3.0, "gradient_steps": {"name": "grouped-random", "groups": 1}}
    torch.manual_seed(0)
    trainer = trainers.build(
        config, backbone=backbone, encoder=encoder, **({"rewards": [red_reward]} if name == "reward" else {})
    )
    losses = trainer.train().step({"prompt": [LONG, ""], "image": torch.rand(2, 3, 64, 64)}, torch.Tensor.backward)
    (loss,) = (value for key, value in losses.items() if key.endswith("_loss"))
    assert torch.isfinite(loss) and loss > 0
    with_gradient = {n for n, p in trainer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient and all(".lora_B." in n for n in with_gradient)
    assert len(trainer.trainable()) == 2 * layers
