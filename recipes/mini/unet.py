"""The `mini` UNet, pre-trained on short captions like SD. Run: ``python recipes/mini/unet.py [steps]``.

With ``--from-weights`` it continues from the bundled UNet.

Images have one to nine objects and captions at most 45 words, so captions of crowded images are incomplete. The text is
encoded as in SD 1.5: one window of 77 tokens, last hidden state.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from common import WEIGHTS, load_or_compute, publish_text_encoder, render_images, train
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from longalign.mini import oracle
from longalign.mini.captions import describe
from longalign.mini.scenes import Scene, sample_scene

STEPS, BATCH, POOL = int(sys.argv[1]) if len(sys.argv) > 1 else 4300, 32, 16000


def build() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(96, 160),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def scheduler_config() -> dict[str, Any]:
    # With SD's beta_end of 0.012, the mean of 8 x 8 noisy latents at the last timestep still reveals the colour of the
    # ground, so the model would ignore the text. With less signal, epsilon prediction determines this mean too poorly,
    # hence v-prediction (as in SD 2.1).
    return {
        "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.02, "beta_schedule": "scaled_linear",
        "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction",
    }  # fmt: skip


def pool_scene(index: int) -> Scene:
    rng = np.random.default_rng([11, index])
    return sample_scene(rng, (1, 3) if rng.random() < 0.6 else (2, 9))


def short_caption(scene: Scene, rng: np.random.Generator) -> str:
    full = 13 * len(scene.things) if rng.random() < 0.85 else 45
    return describe(scene, rng, words=int(rng.integers(min(8, full), min(full, 42) + 1))).text


@torch.no_grad()
def encode_images(vae: AutoencoderKL, scenes: list[Scene]) -> dict[str, Tensor]:
    """Scaled latents ``(n, 8, 8, 8)`` of the training images."""
    chunks = (scenes[i : i + 100] for i in range(0, len(scenes), 100))
    latents = torch.cat([vae.encode(render_images(chunk) * 2 - 1).latent_dist.mode() for chunk in chunks])
    return {"latents": latents * vae.config.scaling_factor}


def main() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "sd" / "vae", torch_dtype=torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "sd" / "tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(WEIGHTS / "sd" / "text_encoder", torch_dtype=torch.float32).eval()
    unet = build()
    if "--from-weights" in sys.argv:
        unet = UNet2DConditionModel.from_pretrained(WEIGHTS / "sd" / "unet", torch_dtype=torch.float32)
    unet = unet.to(memory_format=torch.channels_last)  # convolutions are 20% faster
    alphas = DDIMScheduler.from_config({**scheduler_config(), "clip_sample": False}).alphas_cumprod
    scenes = [pool_scene(i) for i in range(POOL)]
    latents = load_or_compute("unet-latents", lambda: encode_images(vae, scenes))["latents"]

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        return text_encoder(tokens.input_ids).last_hidden_state

    def compute_loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        index = rng.integers(POOL, size=BATCH)
        texts = ["" if rng.random() < 0.1 else short_caption(scenes[i], rng) for i in index]
        generator = torch.Generator().manual_seed(step)
        clean, noise = latents[index], torch.randn(BATCH, 8, 8, 8, generator=generator)
        # stratified timesteps: less noise in the loss than independent sampling
        t = ((torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH * 1000).long()
        a = alphas[t][:, None, None, None]
        predicted = unet(a.sqrt() * clean + (1 - a).sqrt() * noise, t, encode(texts)).sample
        return {"loss": F.mse_loss(predicted, a.sqrt() * noise - (1 - a).sqrt() * clean)}

    held_out = []
    for i in range(128):
        rng = np.random.default_rng([12, i])
        scene = sample_scene(rng, (1, 3))
        held_out.append(describe(scene, rng, words=12 * len(scene.things)))

    def pipeline() -> StableDiffusionPipeline:
        scheduler = PNDMScheduler.from_config({**scheduler_config(), "skip_prk_steps": True})
        return StableDiffusionPipeline(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip

    def evaluate() -> dict[str, float]:
        pipe = pipeline()
        pipe.scheduler = DDIMScheduler.from_config(
            {**scheduler_config(), "clip_sample": False, "timestep_spacing": "trailing"}
        )
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        texts = [c.text for c in held_out]
        out = pipe(texts, num_inference_steps=20, guidance_scale=3.0, generator=generator, output_type="np").images
        images = out.transpose(0, 3, 1, 2)
        facts = [f for c in held_out for f in c.facts]
        correct = [f for image in oracle.verdicts(images, held_out) for s in image for f in s]
        result = {"facts_1_to_3": float(np.mean(correct))}
        for kind in ("ground", "shape", "colour", "size", "fill"):
            result[kind] = float(np.mean([c for f, c in zip(facts, correct, strict=True) if f.kind == kind]))
        return result

    train(
        "unet", unet, compute_loss, steps=STEPS, lr=8e-4, warmup=100, muon=10.0,
        outer=("conv_in", "conv_out", "time_emb"), evaluate=evaluate, evaluate_every=500, ema=0.998,
    )  # fmt: skip
    unet.half().to(memory_format=torch.contiguous_format)
    vae.half()
    text_encoder.half()
    pipeline().save_pretrained(WEIGHTS / "sd")
    publish_text_encoder()
    for config in (WEIGHTS / "sd").rglob("config.json"):  # remove the local path that diffusers adds
        values = json.loads(config.read_text())
        if values.pop("_name_or_path", None):
            config.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
