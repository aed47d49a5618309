"""The backbones with a language model as text encoder, compared with diffusers' pipelines; trainers; files."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import diffusers
import pytest
import torch
import yaml
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from longalign import ConfigError, Model, condition, load_config
from longalign.backbones.config import LoraConfig
from longalign.backbones.flux2.backbone import Flux2Backbone
from longalign.backbones.qwen_image.backbone import QwenImageBackbone
from longalign.cli.main import main
from longalign.encoders.base import Conditioning
from longalign.functional.diffusion import predict_guided
from longalign.functional.solvers import sampling_timesteps
from longalign.inference.sampling import sample
from longalign.registry import backbones, encoders, trainers
from longalign.testing import tiny_llm

PROMPTS = ["A red fox sleeps on a wall. The sky is green.", "A fox."]


@dataclass(frozen=True)
class Case:
    """A backbone, its encoder, and a call of its pipeline."""

    name: str
    write: Callable
    pipeline: str
    encoder: dict
    #: arguments of the pipeline for prompts, noise, width, height and guidance scale
    arguments: Callable
    settings: dict = field(default_factory=lambda: {"image_size": 32})
    #: layers with a LoRA by default
    num_layers: int = 0
    num_parameters: float = 0
    transformer: str = ""
    latents: tuple[int, int, int] = (4, 8, 8)
    width: int = 16
    divisor: int = 8

    def folder(self, folder):
        return self.write(folder)

    def config(self, folder):
        return {"name": self.name, "checkpoint": str(folder), **self.settings}

    def build(self, folder):
        return backbones.build(self.config(folder))

    def build_encoder(self, folder):
        return encoders.build(self.encoder_config(folder))

    def encoder_config(self, folder):
        return {"name": "llm", "checkpoint": str(folder), **self.encoder}


def z_image_arguments(pipe, noise, guidance):
    return {"prompt": list(PROMPTS), "latents": noise, "guidance_scale": guidance - 1}


SYSTEM = "Paint this."
INSTRUCTION = "paint this: "


def qwen_image_arguments(pipe, noise, guidance):
    before = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    pipe.prompt_template_encode = before + "{}<|im_end|>\n<|im_start|>assistant\n"
    pipe.prompt_template_encode_start_idx = len(pipe.tokenizer(before)["input_ids"])
    negative = {"negative_prompt": [""] * len(PROMPTS)} if guidance > 1 else {}
    packed = pipe._pack_latents(noise, *noise.shape)
    return {"prompt": list(PROMPTS), "latents": packed, "true_cfg_scale": guidance, **negative}


NO_THINKING = {"enable_thinking": False}
LAYERS = {"layer": [0, 1, 2], "pad_to": 96}


def flux2_arguments(pipe, noise, guidance):
    return {
        "prompt": list(PROMPTS), "latents": torch.pixel_unshuffle(noise, 2), "guidance_scale": guidance,
        "text_encoder_out_layers": (0, 1, 2), "max_sequence_length": 96,
    }  # fmt: skip


def sana_arguments(pipe, noise, guidance):
    # the pipeline's own scheduler has a multistep solver
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return {
        "prompt": list(PROMPTS), "latents": noise, "guidance_scale": guidance, "sigmas": [1, 0.75, 0.5, 0.25],
        "complex_human_instruction": [INSTRUCTION], "use_resolution_binning": False,
    }  # fmt: skip


CASES = [
    Case(
        "flux2", tiny_llm.tiny_flux2, "Flux2KleinPipeline", {**LAYERS, "template_variables": NO_THINKING},
        flux2_arguments, num_layers=8 + 2, num_parameters=32.2e9, transformer="Flux2Transformer2DModel", width=48,
    ),
    Case(
        "z-image", tiny_llm.tiny_z_image, "ZImagePipeline", {"layer": -2}, z_image_arguments,
        num_layers=4 * 3, num_parameters=6.15e9, transformer="ZImageTransformer2DModel",
    ),
    Case(
        "qwen-image", tiny_llm.tiny_qwen_image, "QwenImagePipeline", {"system": SYSTEM, "prefix": "none"},
        qwen_image_arguments, num_layers=2 * 8 - 2, num_parameters=20.43e9, transformer="QwenImageTransformer2DModel",
    ),
    Case(
        "sana", tiny_llm.tiny_sana, "SanaPipeline",
        {"template": INSTRUCTION + "{}", "prefix": "first", "lowercase": True}, sana_arguments, settings={},
        num_layers=8, num_parameters=1.604e9, transformer="SanaTransformer2DModel", divisor=4,
    ),
]  # fmt: skip

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def folder(case, tmp_path_factory):
    return case.folder(tmp_path_factory.mktemp(case.name))


def load_pipeline(case, folder):
    pipe = getattr(diffusers, case.pipeline).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_backbone_published_numbers(case):
    with torch.device("meta"):
        transformer = getattr(diffusers, case.transformer)()
    assert sum(p.numel() for p in transformer.parameters()) == pytest.approx(case.num_parameters, rel=5e-3)


def test_backbone_sizes(case, folder):
    backbone = case.build(folder)
    assert backbone.resolution == 32 and backbone.latent_shape() == case.latents and backbone.divisor == case.divisor
    assert len(backbone.add_lora(LoraConfig(rank=2), "lora")) == 2 * case.num_layers


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_images_equal_diffusers_pipeline(case, folder, guidance):
    height, width = 32, 64
    backbone, pipe = case.build(folder), load_pipeline(case, folder)
    size = {"height": height, "width": width}
    settings = {"seeds": [3, 4], "num_steps": 4, "guidance": guidance, "solver": "ddim", **size}
    images = sample(backbone, case.build_encoder(folder), PROMPTS, **settings)
    shape = backbone.latent_shape(height, width)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    arguments = {"num_inference_steps": 4, "output_type": "pt", **size, **case.arguments(pipe, noise, guidance)}
    torch.testing.assert_close(images, pipe(**arguments).images, atol=1e-5, rtol=0)
    assert images.std() > 0.01


def red_reward(images, prompts):
    return images[:, 0].mean((1, 2))


def test_reward_gradient_equals_autograd(case, folder):
    encoder = case.build_encoder(folder)
    config = {"name": "reward", "num_steps": 2, "guidance": 3.0, "gradient_steps": "all", "resolution": 64}
    trainer = trainers.build(
        {**config, "lora": {"rank": 2, "dropout": 0.0}}, backbone=case.build(folder), encoder=encoder,
        rewards=[red_reward],
    )  # fmt: skip
    backbone = trainer.backbone.double()
    for i, p in enumerate(trainer.trainable()):
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(i))
    conditioning = trainer.encode_with_uncond(PROMPTS[:1])
    noise = torch.randn(1, *backbone.latent_shape(64, 64), dtype=torch.float64)
    latents, trainer.noise = noise, lambda count: noise
    levels = backbone.levels_at(noise.shape[1:])
    for index, t in enumerate(trainer.solver.timesteps):
        output = predict_guided(
            lambda x, times: backbone.predict(x, times, conditioning), latents.detach(), torch.tensor([t]), 3.0,
            backbone.guide,
        )  # fmt: skip
        after = levels.noise[trainer.solver.timesteps[1]] if index == 0 else 0.0
        latents = latents + (after - levels.noise[t]) * output  # Euler's step
    (0.5 * (1 - red_reward(backbone.decode(latents), None).mean())).backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.trainable()])
    backbone.zero_grad()
    trainer.step({"prompt": PROMPTS[:1]}, torch.Tensor.backward)
    got = torch.cat([p.grad.flatten() for p in trainer.trainable()])
    assert expected.norm() > 0 and (got - expected).norm() / expected.norm() < 1e-6


def test_training_sampling_and_export_by_command_line(case, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = {
        "backbone": case.config(folder), "encoder": {**case.encoder_config(folder), "segmenter": "sentence"},
        "trainer": {"name": "align", "lora": {"rank": 2, "dropout": 0.0}},
        "data": {"name": "scenes", "size": 2}, "output": "run",
        "loop": {"steps": 1, "batch_size": 2, "lr": 0.1, "gradient_checkpointing": True},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert main(["train", "run.yaml"]) == 0
    assert main(["export", "run", "model"]) == 0
    options = ["--prompt", "A fox.", "--num-steps", "1", "--output", "images"]
    assert main(["generate", "--checkpoint", "model", *options]) == 0
    assert len(list((tmp_path / "images").glob("*.png"))) == 1
    model, pipe = Model.from_pretrained(tmp_path / "model"), load_pipeline(case, folder)
    latents, timesteps = torch.randn(1, *case.latents), torch.tensor([249])
    conditioning = case.build_encoder(folder).encode(["A fox."])
    trained = model.backbone.predict(latents, timesteps, conditioning)
    before = case.build(folder).predict(latents, timesteps, conditioning)
    assert not torch.allclose(trained, before, atol=1e-4)
    pipe.load_lora_weights(tmp_path / "model")
    other = case.build(folder)
    other.denoiser = pipe.transformer
    other.wrap_denoiser(pipe.transformer)
    with torch.no_grad():
        torch.testing.assert_close(other.predict(latents, timesteps, conditioning), trained, atol=1e-4, rtol=1e-4)


def test_config_knows_widths_and_sizes(case, folder):
    config = load_config(
        {
            "backbone": case.config(folder), "encoder": case.encoder_config(folder), "rewards": ["denscore"],
            "trainer": "reward", "data": {"name": "scenes", "size": 2},
        }
    )  # fmt: skip
    assert config.backbone.widths()[0] == config.encoder.widths()[0] == case.width
    assert config.backbone.divisor == case.divisor and config.backbone.resolution() == 32


def test_config_rejects_cuda_graphs_of_calls_that_cannot_be_captured(case, folder):
    run = {
        "backbone": case.config(folder), "encoder": case.encoder_config(folder), "trainer": "align",
        "data": {"name": "scenes", "size": 2}, "loop": {"cuda_graphs": True},
    }  # fmt: skip
    if case.name in ("sana", "flux2"):
        load_config(run)
    else:
        with pytest.raises(ConfigError, match=rf"loop\.cuda_graphs: .*'{case.name}' .*; set it to false"):
            load_config(run)


def test_backbone_rejects_states_of_other_width(case, folder):
    with pytest.raises(ValueError, match=rf"width {case.width}, got width 24.*'llm'"):
        case.build(folder).predict(
            torch.randn(1, *case.latents), torch.tensor([1]), Conditioning(torch.randn(1, 4, 24))
        )


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    """FLUX.2-dev, which takes a guidance scale as an input."""
    return tiny_llm.tiny_flux2(tmp_path_factory.mktemp("dev"), mistral=True)


@pytest.mark.parametrize("guidance", [None, 2.5])
def test_flux2_dev_images_equal_diffusers_pipeline(dev, guidance):
    backbone = backbones.build({"name": "flux2", "checkpoint": str(dev), "image_size": 32, "guidance": guidance})
    encoder = encoders.build({"name": "llm", "checkpoint": str(dev), "system": SYSTEM, **LAYERS})
    pipe = diffusers.Flux2Pipeline.from_pretrained(dev)
    pipe.set_progress_bar_config(disable=True)
    pipe.system_message = SYSTEM
    settings = {"seeds": [3, 4], "num_steps": 3, "guidance": 1, "solver": "ddim"}
    images = sample(backbone, encoder, PROMPTS, **settings)
    noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    arguments = flux2_arguments(pipe, noise, 4.0 if guidance is None else guidance)
    expected = pipe(**arguments, height=32, width=32, num_inference_steps=3, output_type="pt").images
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("side", "tokens"), [(32, 16), (256, 1024), (528, 4356)])
def test_flux2_noise_levels_depend_on_the_number_of_steps(tmp_path, side, tokens):
    folder = tiny_llm.tiny_flux2(tmp_path)
    backbone = BY_NAME["flux2"].build(folder)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    levels = backbone.levels_at(backbone.latent_shape(side, side))
    for num_steps in (1, 4, 300):
        mu = compute_empirical_mu(tokens, num_steps)
        scheduler.set_timesteps(sigmas=[1 - i / num_steps for i in range(num_steps)], mu=mu)
        noise = levels.noise[list(sampling_timesteps("ddim", levels, num_steps))]
        torch.testing.assert_close(noise.float(), scheduler.sigmas[:-1], atol=1e-6, rtol=1e-5)
    # the training timesteps have the shift of 200 steps
    shift = math.exp(compute_empirical_mu(tokens, 200))
    assert float(levels.noise[499]) == pytest.approx(shift / (1 + shift), rel=1e-5) and len(levels) == 1000


def test_condition_equals_the_prompt_of_flux2_klein(tmp_path):
    case, folder = BY_NAME["flux2"], tiny_llm.tiny_flux2(tmp_path)
    pipe, size = load_pipeline(case, folder), {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "pt"}
    arguments = flux2_arguments(pipe, torch.randn(2, 4, 8, 8), 3.0)
    expected = pipe(**arguments, **size).images
    states = condition(pipe, arguments.pop("prompt"), encoder=case.encoder_config(folder))
    assert set(states) == {"prompt_embeds", "negative_prompt_embeds"}
    torch.testing.assert_close(pipe(**arguments, **states, **size).images, expected, atol=1e-5, rtol=0)


def test_flux2_latents_are_normalized_by_the_statistics_of_patches(tmp_path):
    backbone = BY_NAME["flux2"].build(tiny_llm.tiny_flux2(tmp_path))
    z, bn = torch.randn(2, 4, 6, 8), backbone.vae.bn
    latents = backbone.normalize(z)
    torch.testing.assert_close(latents, torch.pixel_shuffle(bn(torch.pixel_unshuffle(z, 2)), 2))
    torch.testing.assert_close(backbone.denormalize(latents), z)
    assert not bn.training


def test_flux2_rejects_masks_guidance_and_other_models(tmp_path):
    backbone = BY_NAME["flux2"].build(tiny_llm.tiny_flux2(tmp_path))
    masked = Conditioning(torch.randn(1, 2, 48), torch.tensor([[True, False]]))
    with pytest.raises(ValueError, match=r"FLUX.2's transformer has no attention mask.*pad_to"):
        backbone.predict(torch.randn(1, 4, 8, 8), torch.tensor([1]), masked)
    with pytest.raises(ValueError, match=r"takes no guidance scale, got guidance=2"):
        Flux2Backbone(backbone.denoiser, backbone.vae, {}, resolution=32, guidance=2.0)
    backbone.vae.register_to_config(latent_channels=5)
    with pytest.raises(ValueError, match=r"16 input and 16 output channels .*have 20"):
        Flux2Backbone(backbone.denoiser, backbone.vae, {}, resolution=32, guidance=None)


def test_z_image_rejects_what_has_no_position(tmp_path):
    backbone = BY_NAME["z-image"].build(tiny_llm.tiny_z_image(tmp_path))
    for states, latents, message in ((993, (8, 8), "992 text states, got 993"), (4, (8, 66), r"32 x 32 .* got 4 x 33")):
        with pytest.raises(ValueError, match=message):
            backbone.predict(torch.randn(1, 4, *latents), torch.tensor([1]), Conditioning(torch.randn(1, states, 16)))


def test_qwen_image_noise_levels_equal_the_scheduler(tmp_path):
    folder = tiny_llm.tiny_qwen_image(tmp_path)
    backbone = BY_NAME["qwen-image"].build(folder)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    for side, tokens in ((32, 16), (256, 1024)):
        mu = 0.5 + (0.9 - 0.5) * (tokens - 256) / (8192 - 256)
        levels = backbone.levels_at(backbone.latent_shape(side, side))
        for num_steps in (2, 7):
            scheduler.set_timesteps(sigmas=[1 - i / num_steps for i in range(num_steps)], mu=mu)
            noise = levels.noise[list(sampling_timesteps("ddim", levels, num_steps))]
            torch.testing.assert_close(noise.float(), scheduler.sigmas[:-1])


def test_qwen_image_rejects_other_models(tmp_path):
    backbone = BY_NAME["qwen-image"].build(tiny_llm.tiny_qwen_image(tmp_path))
    backbone.denoiser.register_to_config(zero_cond_t=True)
    with pytest.raises(ValueError, match=r"does not support transformers with zero_cond_t"):
        QwenImageBackbone(backbone.denoiser, backbone.vae, {}, resolution=32)
    with pytest.raises(ValueError, match=r"4092 text states next to 8 x 8 .*got 4093"):
        backbone.predict(torch.randn(1, 4, 16, 16), torch.tensor([1]), Conditioning(torch.randn(1, 4093, 16)))
