"""The `mini` VAE: 64 px to 8 x 8 latents of 8 channels. Run: ``python recipes/mini/vae.py``."""

from __future__ import annotations

import sys

import numpy as np
import torch
from common import WEIGHTS, render_images, scene_and_caption, train
from diffusers import AutoencoderKL
from torch import Tensor

from longalign.mini import oracle
from longalign.mini.scenes import MASK_KEYS, PLACES, Scene, object_masks, sample_scene

STEPS, BATCH = int(sys.argv[1]) if len(sys.argv) > 1 else 2400, 8


def build() -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )
    # with unit variance, noise would dominate the latents for the first thousand steps
    torch.nn.init.constant_(vae.quant_conv.bias[8:], -6.0)
    return vae


def colour_error(error: Tensor, scenes: list[Scene]) -> Tensor:
    """Mean squared error of the mean colour of objects, for errors ``(b, 3, 64, 64)``; measures hue, not blur."""
    keys = [
        (i, PLACES.index(t.place), MASK_KEYS.index((t.shape, t.size, t.fill)))
        for i, scene in enumerate(scenes)
        for t in scene.things
    ]
    image, place, kind = np.array(keys).T
    masks = torch.from_numpy(object_masks()[place, kind])
    means = torch.einsum("nchw,nhw->nc", error[image], masks) / masks.sum((1, 2))[:, None]
    return means.pow(2).mean()


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL) -> None:
    """Normalizes each latent channel to mean 0 and standard deviation 1 over scenes, with scaling factor 1.

    The 1 x 1 convolutions on both sides of the latents absorb the change, so reconstructions stay the same.
    """
    scenes = [sample_scene(np.random.default_rng([8, i]), (1, 9)) for i in range(512)]
    latents = vae.encode(render_images(scenes) * 2 - 1).latent_dist.mode()
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    count = len(mean)
    before.bias[:count] = (before.bias[:count] - mean) / std
    before.weight[:count] /= std[:, None, None, None]
    before.bias[count:] -= 2 * std.log()
    after.bias += after.weight[:, :, 0, 0] @ mean
    after.weight *= std[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)


def main() -> None:
    torch.manual_seed(0)
    vae = build()

    def compute_loss(step: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        scenes = [sample_scene(rng, (3, 9)) for _ in range(BATCH)]
        images = render_images(scenes) * 2 - 1
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample(torch.Generator().manual_seed(step))).sample
        error = decoded - images
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        mse, colour = error.pow(2).mean(), colour_error(error, scenes)
        return {"loss": error.abs().mean() + mse + 2 * colour + 2e-4 * kl, "mse": mse, "colour": colour, "kl": kl}

    held_out = [scene_and_caption(np.random.default_rng([7, i]), (1, 9), (60, 60)) for i in range(200)]

    def evaluate() -> dict[str, float]:
        images = render_images([s for s, _ in held_out]) * 2 - 1
        decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample / 2 + 0.5
        accuracy = oracle.fact_accuracy(decoded.clamp(0, 1).numpy(), [c for _, c in held_out])
        return {"fact_accuracy": float(accuracy.mean())}

    train(
        "vae",
        vae,
        compute_loss,
        steps=STEPS,
        lr=2e-3,
        warmup=20,
        outer=("conv_in", "conv_out", "quant"),
        evaluate=evaluate,
        evaluate_every=200,
        ema=0.995,
    )
    normalize_latents(vae)
    vae.to(dtype=torch.float16).save_pretrained(WEIGHTS / "sd" / "vae")


if __name__ == "__main__":
    main()
