"""The backbone `sd3`: sizes, layout, conditioning compared with diffusers' pipeline, trainers."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch.nn.functional import pad

from longalign import condition, load_config
from longalign.backbones.flow import flow_levels
from longalign.backbones.lora import lora_targets
from longalign.backbones.stable_diffusion.sd3 import SD3Backbone
from longalign.checkpoints.checkpoint import load_for_sampling, save
from longalign.checkpoints.diffusers_files import export_lora
from longalign.checkpoints.publish import export
from longalign.encoders.base import Conditioning, TruncationWarning
from longalign.functional.diffusion import guide
from longalign.functional.solvers import trailing_timesteps
from longalign.inference.sampling import generate, sample
from longalign.registry import backbones, encoders, trainers
from longalign.testing.tiny import tiny_backbone, tiny_sd3

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
LONG = "A red fox sleeps on a wall. The sky is green. A wall is red."
# LoRA target modules of diffusers' script for LoRA training of SD 3
DIFFUSERS_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def pipe(folder):
    return load_pipeline(folder)


def load_pipeline(folder):
    pipe = StableDiffusion3Pipeline.from_pretrained(folder).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_backbone(folder):
    return backbones.build({"name": "sd3", "checkpoint": str(folder)})


@pytest.fixture(scope="module")
def backbone(folder):
    return build_backbone(folder)


@pytest.fixture(scope="module")
def encoder(folder):
    return build_encoder(folder)


def build_encoder(folder, **settings):
    sizes = {"max_tokens": 40, "t5_tokens": 60, "width": 32, **settings}
    return encoders.build({"name": "clip-segment-sd3", "checkpoint": str(folder), **sizes})


def test_sd3_published_numbers():
    medium = {
        "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
        "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096,
        "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
    }  # fmt: skip
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**medium)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, use_quant_conv=False,
            use_post_quant_conv=False, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    # the state dict also contains the 192 x 192 position embeddings, a buffer
    assert sum(t.numel() for t in transformer.state_dict().values()) == 2_084_951_104
    assert sum(p.numel() for p in transformer.parameters()) == 2_084_951_104 - 192**2 * 1536
    assert sum(p.numel() for p in vae.parameters()) == 83_819_683
    targets = lora_targets(transformer)
    # the last block has no text output projection
    assert len(targets) == 24 * 8 - 1 and all(t.split(".attn.")[1] in DIFFUSERS_TARGETS for t in targets)


def test_sd3_loads_published_layout(folder, backbone):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline" and index["text_encoder_3"][1] == "T5EncoderModel"
    assert isinstance(backbone, SD3Backbone) and backbone.prediction == "flow" and backbone.resolution == 64
    assert backbone.latent_shape() == (16, 8, 8) and backbone.latent_shape(32, 96) == (16, 4, 12)
    with pytest.raises(ValueError, match="divisible by 16, got 72 x 64"):
        backbone.latent_shape(72, 64)
    half = backbones.build({"name": "sd3", "checkpoint": str(folder), "dtype": "bfloat16"})
    assert half.denoiser.dtype == torch.bfloat16 and half.vae.dtype == torch.float32


def test_sd3_noise_levels_equal_diffusers_scheduler(backbone):
    levels = backbone.noise_levels
    assert levels.noise[999] == 1 and levels.signal[999] == 0
    assert levels.noise[249].item() == pytest.approx(0.5)  # 3 / 4 over 1 + 2 / 4
    schedule = FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.testing.assert_close(levels.noise.float(), schedule.sigmas.flip(0))
    assert torch.equal(levels.signal + levels.noise, torch.ones(1000, dtype=torch.float64))
    assert flow_levels({**FLOW, "num_train_timesteps": 4}, "sd3", 0).noise.tolist() == [0.25, 0.5, 0.75, 1]


def test_sd3_noise_levels_may_depend_on_the_image_size(backbone):
    schedule = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    dynamic = SD3Backbone(backbone.denoiser, backbone.vae, {**FLOW, "use_dynamic_shifting": True})
    schedule.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.5 + (1.15 - 0.5) * (128 - 256) / (4096 - 256))
    noise = dynamic.levels_at(dynamic.latent_shape(128, 256)).noise[list(trailing_timesteps(4))]
    torch.testing.assert_close(noise.float(), schedule.sigmas[:-1])
    assert dynamic.levels_at((16, 8, 8)) is dynamic.noise_levels


def test_sd3_encode_and_decode_shift_and_scale(backbone):
    images = torch.rand(2, 3, 64, 64)
    latents = backbone.encode_images(images, torch.Generator().manual_seed(0))
    raw = backbone.vae.encode(2 * images - 1).latent_dist.sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(latents, (raw - 0.0609) * 1.5305)
    torch.testing.assert_close(backbone.decode(latents), (backbone.vae.decode(raw).sample / 2 + 0.5).clamp(0, 1))


def test_sd3_predict_equals_transformer(backbone, encoder):
    conditioning, latents = encoder.encode([LONG, "A fox."]), torch.randn(2, 16, 8, 8)
    prediction = backbone.predict(latents, torch.tensor([249, 999]), conditioning)
    expected = backbone.denoiser(
        latents,
        timestep=torch.tensor([500.0, 1000.0]),
        encoder_hidden_states=conditioning.states,
        pooled_projections=conditioning.pooled,
    ).sample
    torch.testing.assert_close(prediction, expected)
    assert not torch.allclose(prediction, backbone.predict(latents, torch.tensor([249, 500]), conditioning))


def test_sd3_conditioning_equals_diffusers_pipeline(folder, pipe):
    encoder = build_encoder(folder, max_tokens=77, eot="all")
    conditioning = encoder.encode(["A red fox.", ""])
    states, _, pooled, _ = pipe.encode_prompt(
        ["A red fox.", ""], None, None, do_classifier_free_guidance=False, max_sequence_length=60
    )
    assert conditioning.states.shape == states.shape == (2, 77 + 60, 32) and encoder.dim == 32
    tokens = conditioning.reports[0].parts[0].tokens[0] + 2
    rounding = {"rtol": 1e-4, "atol": 1e-4}  # texts are batched differently
    torch.testing.assert_close(conditioning.states[0, :tokens], states[0, :tokens], **rounding)
    torch.testing.assert_close(conditioning.states[1, :2], states[1, :2], **rounding)
    torch.testing.assert_close(conditioning.states[:, 77:], states[:, 77:], **rounding)
    assert conditioning.pooled.shape == (2, 20)
    torch.testing.assert_close(conditioning.pooled, pooled, **rounding)


def test_sd3_encoder_t5_zeros_none_and_overflow(folder, pipe, encoder):
    whole = encoder.encode([LONG])
    zeros = build_encoder(folder, t5="zeros").encode([LONG])
    torch.testing.assert_close(zeros.states[:, :40], whole.states[:, :40])
    assert zeros.states[:, 40:].shape == (1, 60, 32) and not zeros.states[:, 40:].any()
    assert zeros.reports[0] == whole.reports[0].parts[0] and torch.equal(zeros.pooled, whole.pooled)
    clips = {"name": "clip-segment-sd3", "checkpoint": str(folder), "max_tokens": 40, "width": 32, "t5": "none"}
    t5 = {"name": "t5", "checkpoint": str(folder), "subfolder": "text_encoder_3", "max_tokens": 60}
    composed = encoders.build({"name": "concat", "parts": [clips, t5]})
    torch.testing.assert_close(composed.encode([LONG]).states, whole.states)
    assert encoder.report([LONG]) == list(whole.reports)
    assert [len(part.segments) for part in whole.reports[0].parts] == [3, 1]
    with pytest.warns(TruncationWarning, match=r"1 of 1 .* 8 .*t5_tokens"):
        build_encoder(folder, t5_tokens=8, overflow="truncate").encode([LONG])
    with pytest.raises(ValueError, match=r"20 .*32.*width"):
        build_encoder(folder, width=24)


def test_sd3_encoder_pooled_of_both_clips(folder, pipe):
    parts = ["A red fox sleeps on a wall.", "The sky is green."]
    per_part = [torch.cat([pipe._get_clip_prompt_embeds([p], clip_model_index=i)[1] for p in parts]) for i in (0, 1)]
    encoder = build_encoder(folder, segmenter={"name": "manual"}, t5="none")
    expected = torch.cat([rows.mean(0) for rows in per_part])
    torch.testing.assert_close(encoder.encode([parts]).pooled[0], expected, atol=1e-5, rtol=1e-5)
    encoder.clips.pooled = "first"
    expected = torch.cat([rows[0] for rows in per_part])
    torch.testing.assert_close(encoder.encode([parts]).pooled[0], expected, atol=1e-5, rtol=1e-5)


def test_sd3_images_equal_diffusers_pipeline(backbone, encoder, pipe):
    settings = {"seeds": [3, 4], "num_steps": 4, "guidance": 3.0, "solver": "ddim", "negative": "green"}
    images = sample(backbone, encoder, [LONG, "The sky."], **settings)
    conditioning = condition(pipe, [LONG, "The sky."], "green", encoder=encoder)
    assert set(conditioning) == {f"{a}{b}prompt_embeds" for a in ("", "negative_") for b in ("", "pooled_")}
    assert conditioning["prompt_embeds"].shape == conditioning["negative_prompt_embeds"].shape == (2, 100, 32)
    noise = torch.stack([torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (3, 4)])
    expected = pipe(
        **conditioning,
        latents=noise,
        num_inference_steps=4,
        sigmas=[1, 0.75, 0.5, 0.25],  # the pipeline shifts them
        guidance_scale=3.0,
        output_type="pt",
    ).images
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
    assert images.std() > 0.01


def red_reward(images, prompts):
    return images[:, 0].mean((1, 2))


REWARD = {"name": "reward", "num_steps": 3, "guidance": 3.0, "gradient_steps": "all"}


@pytest.mark.parametrize("config", [{"name": "align"}, REWARD], ids=["align", "reward"])
def test_sd3_trainer_step(folder, encoder, config):
    backbone = build_backbone(folder)
    backbone.enable_gradient_checkpointing()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    torch.manual_seed(0)
    rewards = {"rewards": [red_reward]} if config["name"] == "reward" else {}
    config = {**config, "lora": {"rank": 2, "dropout": 0.0}}
    trainer = trainers.build(config, backbone=backbone, encoder=encoder, **rewards)
    losses = trainer.train().step({"prompt": [LONG, ""], "image": torch.rand(2, 3, 64, 64)}, torch.Tensor.backward)
    (loss,) = (value for key, value in losses.items() if key.endswith("_loss"))
    assert torch.isfinite(loss) and loss > 0
    with_gradient = {n for n, p in trainer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient and all(".lora_B." in n for n in with_gradient)
    assert len(trainer.trainable()) == 2 * (2 * 8 - 1)
    torch.optim.SGD(trainer.trainable(), lr=0.1).step()
    after = {k.replace(".base_layer", ""): v for k, v in backbone.state_dict().items() if ".lora_" not in k}
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


def test_sd3_reward_gradient_equals_autograd(folder, encoder):
    torch.manual_seed(0)
    config = {**REWARD, "lora": {"rank": 2, "dropout": 0.0}}
    trainer = trainers.build(config, backbone=build_backbone(folder), encoder=encoder, rewards=[red_reward])
    backbone = trainer.backbone.double()
    for i, p in enumerate(trainer.trainable()):
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(i))
    conditioning = trainer.encode_with_uncond([LONG, "The sky."])
    noise = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    trainer.noise = lambda count: noise
    latents = noise
    for t, next_t in zip((999, 666, 332), (666, 332, None), strict=True):
        inputs = torch.cat([latents.detach()] * 2)
        output = guide(
            *backbone.predict(inputs, torch.full((4,), t), conditioning[torch.tensor([0, 1, 2, 2])]).chunk(2), 3.0
        )
        levels = [0.0 if step is None else backbone.noise_levels.noise[step].item() for step in (t, next_t)]
        latents = latents + (levels[1] - levels[0]) * output  # Euler's step
    (0.5 * (1 - red_reward(backbone.decode(latents), None).mean())).backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.trainable()])
    backbone.zero_grad()
    trainer.step({"prompt": [LONG, "The sky."]}, torch.Tensor.backward)
    got = torch.cat([p.grad.flatten() for p in trainer.trainable()])
    assert expected.norm() > 0 and (got - expected).norm() / expected.norm() < 1e-6


def run_config(folder, **trainer):
    sizes = {"max_tokens": 40, "t5_tokens": 60, "width": 32}
    return load_config(
        {
            "backbone": {"name": "sd3", "checkpoint": str(folder)},
            "encoder": {"name": "clip-segment-sd3", "checkpoint": str(folder), **sizes},
            "trainer": {"name": "align", **trainer},
            "data": {"name": "scenes", "size": 2},
        }
    )


def perturb(parameters):
    torch.manual_seed(5)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.2 * torch.randn_like(p))


def test_sd3_loras_save_load_and_export_to_diffusers(folder, encoder, tmp_path):
    config, backbone = run_config(folder, lora={"rank": 2, "dropout": 0.0}), build_backbone(folder)
    conditioning, latents, timesteps = encoder.encode([LONG]), torch.randn(1, 16, 8, 8), torch.tensor([249])
    plain = backbone.predict(latents, timesteps, conditioning)
    for name in ("align", "reward"):
        perturb(backbone.add_lora(config.trainer.lora, name))
    trained = backbone.predict(latents, timesteps, conditioning).detach()
    assert not torch.allclose(trained, plain, atol=1e-2)
    save(tmp_path / "run", config, backbone, encoder, 3)

    loaded_config, loaded, loaded_encoder = load_for_sampling(tmp_path / "run")
    assert loaded_config == config and loaded.lora_names == ["align", "reward"]
    torch.testing.assert_close(loaded.predict(latents, timesteps, conditioning), trained, atol=1e-5, rtol=1e-5)
    rows = generate((loaded_config, loaded, loaded_encoder), [LONG], tmp_path / "images", num_steps=2)
    assert (tmp_path / "images" / rows[0]["file_name"]).exists()

    pipe = load_pipeline(folder)
    file = export_lora(tmp_path / "run", tmp_path / "lora")
    pipe.load_lora_weights(file.parent, weight_name=file.name)
    states = {"encoder_hidden_states": conditioning.states, "pooled_projections": conditioning.pooled}
    with torch.no_grad():
        prediction = pipe.transformer(latents, timestep=torch.tensor([500.0]), **states).sample
    torch.testing.assert_close(prediction, trained, atol=1e-5, rtol=1e-5)


def test_sd3_export_full_finetune_as_transformer(folder, encoder, tmp_path):
    config, backbone = run_config(folder, lora=None), build_backbone(folder)
    perturb(backbone.train_all())
    save(tmp_path / "run", config, backbone, encoder, 3)
    assert tmp_path / "out" / "transformer" in export(tmp_path / "run", tmp_path / "out")
    transformer = SD3Transformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    for key, tensor in backbone.denoiser.state_dict().items():
        assert torch.equal(transformer.state_dict()[key], tensor)


def test_sd3_lora_targets_dual_attention(tmp_path):
    backbone = build_backbone(tiny_sd3(tmp_path, qk_norm="rms_norm", dual_attention_layers=(0,)))
    assert len(lora_targets(backbone.denoiser)) == 2 * 8 - 1 + 4  # Stable Diffusion 3.5 Medium's blocks
    conditioning = Conditioning(torch.randn(1, 3, 32), pooled=torch.randn(1, 20))
    assert backbone.predict(torch.randn(1, 16, 8, 8), torch.tensor([5]), conditioning).shape == (1, 16, 8, 8)


def test_sd3_rejects_wrong_conditioning_vae_or_scheduler(backbone, encoder):
    def predict(states, mask=None, pooled=20):
        conditioning = Conditioning(states, mask, None if pooled is None else torch.zeros(1, pooled))
        return backbone.predict(torch.zeros(1, 16, 8, 8), torch.tensor([5]), conditioning)

    with pytest.raises(ValueError, match=r"width 32 .*width 20, .* 16 and 20; .*'clip-segment-sd3'"):
        predict(torch.zeros(1, 3, 16))
    with pytest.raises(ValueError, match=r"width 32 .*width 20, .* 32 and None"):
        predict(torch.zeros(1, 3, 32), pooled=None)
    with pytest.raises(ValueError, match=r"attention mask.*pad"):
        predict(torch.zeros(1, 3, 32), torch.tensor([[True, True, False]]))
    assert torch.equal(
        predict(torch.zeros(1, 3, 32), torch.ones(1, 3, dtype=torch.bool)), predict(torch.zeros(1, 3, 32))
    )
    with pytest.raises(ValueError, match=r"\b16\b.*\b16\b.* VAE has 4"):
        SD3Backbone(backbone.denoiser, tiny_backbone().vae, FLOW)
    with pytest.raises(ValueError, match=r"'sd3' .*invert_sigmas=True"):
        SD3Backbone(backbone.denoiser, backbone.vae, {**FLOW, "invert_sigmas": True})
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler.* got 'DDIMScheduler'"):
        SD3Backbone(backbone.denoiser, backbone.vae, {"_class_name": "DDIMScheduler"})


def test_sd3_encoder_pads_clip_states_with_zeros(encoder):
    conditioning = encoder.encode([LONG])
    torch.testing.assert_close(conditioning.states[:, :40], pad(encoder.clips.encode([LONG]).states, (0, 12)))
