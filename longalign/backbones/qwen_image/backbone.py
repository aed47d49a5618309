"""Qwen-Image (arXiv 2508.02324): a transformer over text and image tokens, trained with flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from torch import Tensor

from longalign.backbones.flow import FlowBackbone, pack, unpack
from longalign.backbones.latent import check_width
from longalign.backbones.qwen_image.config import QwenImageConfig
from longalign.backbones.stable_diffusion.loading import load_parts
from longalign.encoders.base import Conditioning
from longalign.functional.diffusion import guide
from longalign.runtime import Runtime

VARIANTS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
"""Settings of transformers, not supported here, that take more than noisy latents, text and a noise level."""


class QwenImageBackbone(FlowBackbone):
    """Qwen-Image's transformer and VAE.

    A token is a patch of 2 by 2 latents. The transformer is conditioned on the noise level. The VAE is one for videos;
    an image is a video of one frame. Latents are normalized by a mean and a standard deviation per channel.

    Args:
        transformer: the denoiser.
        vae: the autoencoder; frozen by this class.
        scheduler: config of the model's diffusers scheduler.
        resolution: native side of square images in pixels.

    Raises:
        ValueError: if transformer and VAE have different numbers of channels, the transformer is not one for text to
            image, or the scheduler is not supported.
    """

    name = "qwen-image"
    # all attention layers
    default_targets = r".*\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    #: mean and standard deviation ``(2, c, 1, 1)`` of the autoencoder's latent
    statistics: Tensor

    def __init__(self, transformer: Any, vae: Any, scheduler: Mapping[str, Any], *, resolution: int):
        config, channels = transformer.config, vae.config.z_dim
        if config.in_channels != 4 * channels or transformer.out_channels != channels:
            raise ValueError(
                f"expected a transformer with {4 * channels} input and {channels} output channels for a VAE with "
                f"{channels} channels, got {config.in_channels} and {transformer.out_channels}; use a text-to-image "
                "model in the layout of Qwen-Image"
            )
        if variants := [key for key in VARIANTS if getattr(config, key, False)]:
            raise ValueError(
                f"'{self.name}' does not support transformers with {', '.join(variants)}; use a text-to-image model in "
                "the layout of Qwen-Image"
            )
        super().__init__(transformer, vae, scheduler, resolution=resolution)
        statistics = torch.tensor([vae.config.latents_mean, vae.config.latents_std])[..., None, None]
        # a buffer moves to the device with the backbone; a copy in each call would wait for the device
        self.register_buffer("statistics", statistics, persistent=False)
        # those of the last block that only change the text, which is not used after it
        block = rf"transformer_blocks\.{config.num_layers - 1}"
        self.unused_modules = rf"{block}\.(attn\.(add_q_proj|norm_added_q|to_add_out)|txt_mlp)"

    @classmethod
    def from_config(cls, config: QwenImageConfig, runtime: Runtime) -> QwenImageBackbone:
        """Loads transformer, VAE and scheduler config from a folder or the Hub."""
        parts = load_parts(config, runtime, QwenImageTransformer2DModel, AutoencoderKLQwenImage)
        return cls(*parts, resolution=config.image_size).to(runtime.device)

    @property
    def latent_channels(self) -> int:
        return self.vae.config.z_dim

    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super().encode_pixels(pixels[:, :, None])
        return mean[:, :, 0], std[:, :, 0]

    def decode_pixels(self, z: Tensor) -> Tensor:
        return super().decode_pixels(z[:, :, None])[:, :, 0]

    def normalize(self, z: Tensor) -> Tensor:
        mean, std = self.statistics.to(z)
        return (z - mean) / std

    def denormalize(self, latents: Tensor) -> Tensor:
        mean, std = self.statistics.to(latents)
        return latents * std + mean

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
        combined = pack(guide(conditional, unconditional, scale))
        norm = pack(conditional).norm(dim=-1, keepdim=True)
        return unpack(combined * (norm / combined.norm(dim=-1, keepdim=True)), conditional.shape[-2])

    def call(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        config, dtype = self.denoiser.config, self.denoiser.dtype
        check_width(conditioning, config.joint_attention_dim, transformer="Qwen-Image's transformer", encoder="llm")
        height, width = (side // self.patch for side in latents.shape[-2:])
        self._check_positions(conditioning.states.shape[1], height, width)
        output = denoiser(
            hidden_states=pack(latents.to(dtype)),
            encoder_hidden_states=conditioning.states.to(dtype),
            encoder_hidden_states_mask=conditioning.mask,
            timestep=self.noise_at(latents, timesteps),
            img_shapes=[[(1, height, width)]] * len(latents),
            return_dict=False,
        )[0]
        return unpack(output, latents.shape[-2]).to(latents.dtype)

    def _check_positions(self, num_states: int, height: int, width: int) -> None:
        """Raises ValueError if there are more hidden states of the text than positions for them.

        The positions of the text follow those of the ``height`` by ``width`` image tokens.
        """
        limit = len(self.denoiser.pos_embed.pos_freqs) - max(height // 2, width // 2)
        if num_states > limit:
            raise ValueError(
                f"Qwen-Image's transformer has positions for {limit} text states next to {height} x {width} image "
                f"tokens, got {num_states}; shorten the prompt, or lower the encoder's max_tokens"
            )
