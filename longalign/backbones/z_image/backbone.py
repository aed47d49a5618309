"""Z-Image (arXiv 2511.22699): a transformer over one sequence of image and text tokens, trained with flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_z_image import SEQ_MULTI_OF, ZImageTransformer2DModel
from torch import Tensor

from longalign.backbones.flow import FlowBackbone
from longalign.backbones.latent import check_width
from longalign.backbones.stable_diffusion.loading import load_parts
from longalign.backbones.z_image.config import ZImageConfig
from longalign.encoders.base import Conditioning
from longalign.runtime import Runtime


class ZImageBackbone(FlowBackbone):
    """Z-Image's transformer and VAE.

    The transformer is conditioned on ``1 - s`` at noise level s, and takes the hidden states of each prompt without
    padding. Its output is the velocity from noise to image, the negative of a prediction of type ``"flow"``.

    Args:
        transformer: the denoiser.
        vae: the autoencoder; frozen by this class.
        scheduler: config of the model's diffusers scheduler.
        resolution: native side of square images in pixels.

    Raises:
        ValueError: if transformer and VAE have different numbers of channels, the transformer is not one for text to
            image, or the scheduler is not supported.
    """

    name = "z-image"

    def __init__(self, transformer: Any, vae: Any, scheduler: Mapping[str, Any], *, resolution: int):
        config, channels = transformer.config, vae.config.latent_channels
        if config.in_channels != channels:
            raise ValueError(
                f"the transformer has {config.in_channels} channels, but the VAE has {channels}; use a text-to-image "
                "model in the layout of Z-Image"
            )
        if 2 not in config.all_patch_size or getattr(config, "siglip_feat_dim", None) is not None:
            raise ValueError(
                "expected a transformer with patches of 2 x 2 latents that takes no images as input, got patches of "
                f"{list(config.all_patch_size)} and siglip_feat_dim={getattr(config, 'siglip_feat_dim', None)}; use a "
                "text-to-image model in the layout of Z-Image"
            )
        super().__init__(transformer, vae, scheduler, resolution=resolution)

    @classmethod
    def from_config(cls, config: ZImageConfig, runtime: Runtime) -> ZImageBackbone:
        """Loads transformer, VAE and scheduler config from a folder or the Hub."""
        transformer, vae, scheduler = load_parts(config, runtime, ZImageTransformer2DModel)
        return cls(transformer, vae, scheduler, resolution=config.image_size).to(runtime.device)

    def call(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        config, dtype = self.denoiser.config, self.denoiser.dtype
        check_width(conditioning, config.cap_feat_dim, transformer="Z-Image's transformer", encoder="llm")
        prompts = _unpadded(conditioning, dtype)
        self._check_positions(max(map(len, prompts)), latents)
        outputs = denoiser(
            list(latents.to(dtype)[:, :, None]), 1 - self.noise_at(latents, timesteps), prompts, return_dict=False
        )[0]
        return -torch.stack(list(outputs))[:, :, 0].to(latents.dtype)

    def _check_positions(self, num_states: int, latents: Tensor) -> None:
        """Raises ValueError if the transformer has fewer positions than text states or than image tokens.

        ``num_states`` is the number of hidden states of the longest prompt; ``latents`` are ``(b, c, h, w)``.
        """
        text, rows, columns = self.denoiser.config.axes_lens
        # texts are padded; the first position is not used, and the image follows the text
        limit = (text - 2) // SEQ_MULTI_OF * SEQ_MULTI_OF
        if num_states > limit:
            raise ValueError(
                f"Z-Image's transformer has positions for {limit} text states, got {num_states}; shorten the "
                "prompt, or lower the encoder's max_tokens"
            )
        height, width = (side // self.patch for side in latents.shape[-2:])
        if height > rows or width > columns:
            raise ValueError(
                f"Z-Image's transformer has positions for {rows} x {columns} image tokens, got {height} x {width}; "
                "choose a smaller image"
            )


def _unpadded(conditioning: Conditioning, dtype: torch.dtype) -> list[Tensor]:
    """Returns for each prompt i its ``n_i`` unmasked hidden states, ``(n_i, d)``, cast to ``dtype``."""
    states, mask = conditioning.states.to(dtype), conditioning.mask
    return list(states) if mask is None else list(states[mask].split(mask.sum(1).tolist()))
