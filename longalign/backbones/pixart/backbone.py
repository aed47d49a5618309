"""PixArt-alpha (arXiv 2310.00426) and PixArt-Sigma (arXiv 2403.04692): a transformer with cross-attention to T5."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor

from longalign.backbones.latent import LatentBackbone, check_width
from longalign.backbones.pixart.config import PixArtConfig
from longalign.backbones.stable_diffusion.loading import load_parts
from longalign.backbones.stable_diffusion.sd import scheduler_constants
from longalign.encoders.base import Conditioning
from longalign.functional.diffusion import NoiseLevels
from longalign.runtime import Runtime


class PixArtBackbone(LatentBackbone):
    """PixArt's transformer and VAE.

    The transformer predicts noise and, in further channels, a variance that is not used. PixArt-alpha for images of
    1024 by 1024 pixels is also conditioned on the image's height, width (pixels) and aspect ratio (height / width).

    Args:
        transformer: the denoiser.
        vae: the autoencoder; frozen by this class.
        alphas_cumprod: ``(T,)`` cumulative products of the noise schedule's alphas.
        prediction: prediction type: ``"epsilon"`` or ``"v_prediction"``.

    Raises:
        ValueError: if transformer and VAE have different numbers of channels.
    """

    def __init__(self, transformer: Any, vae: Any, alphas_cumprod: Tensor, prediction: str):
        config, channels = transformer.config, vae.config.latent_channels
        if config.in_channels != channels or transformer.out_channels not in (channels, 2 * channels):
            raise ValueError(
                f"the transformer has {config.in_channels} input and {transformer.out_channels} output channels, but "
                f"the VAE has {channels}; use a text-to-image model in the layout of PixArt"
            )
        super().__init__(transformer, vae, prediction, NoiseLevels.from_alphas_cumprod(alphas_cumprod.float()))

    @classmethod
    def from_config(cls, config: PixArtConfig, runtime: Runtime) -> PixArtBackbone:
        """Loads transformer, VAE and scheduler config from a folder or the Hub."""
        transformer, vae, constants = load_parts(config, runtime, PixArtTransformer2DModel)
        return cls(transformer, vae, *scheduler_constants(constants)).to(runtime.device)

    @property
    def divisor(self) -> int:
        return self.vae_scale_factor * self.denoiser.config.patch_size

    def call(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        expected = self.denoiser.config.caption_channels
        check_width(conditioning, expected, transformer="PixArt's transformer", encoder="t5")
        dtype = self.denoiser.dtype
        output = denoiser(
            latents.to(dtype),
            encoder_hidden_states=conditioning.states.to(dtype),
            encoder_attention_mask=conditioning.mask,
            timestep=timesteps,
            added_cond_kwargs=self._size_conditions(latents),
            return_dict=False,
        )[0]
        return output[:, : latents.shape[1]].to(latents.dtype)

    def _size_conditions(self, latents: Tensor) -> dict[str, Tensor | None]:
        """Returns ``added_cond_kwargs`` of the transformer.

        These are height and width in pixels, ``(b, 2)``, and aspect ratio, ``(b, 1)``, of the images. Both are None if
        the transformer does not use them.
        """
        if not self.denoiser.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (self.vae_scale_factor * side for side in latents.shape[-2:])
        # filled on the device: copying a list to it would wait for the device
        columns = [
            torch.full((len(latents), 1), value, dtype=self.denoiser.dtype, device=latents.device)
            for value in (height, width, height / width)
        ]
        return {"resolution": torch.cat(columns[:2], dim=1), "aspect_ratio": columns[2]}
