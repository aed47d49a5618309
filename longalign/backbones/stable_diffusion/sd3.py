"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a transformer over text and image, trained with flow matching."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor

from longalign.backbones.latent import LatentBackbone
from longalign.backbones.stable_diffusion.config import StableDiffusionConfig
from longalign.backbones.stable_diffusion.loading import load_parts
from longalign.encoders.base import Conditioning
from longalign.functional.diffusion import NoiseLevels
from longalign.runtime import Runtime


class SD3Backbone(LatentBackbone):
    """SD3's transformer and VAE.

    At timestep t of T, noisy latents are ``(1 - s) x_0 + s n`` with clean latents ``x_0`` and noise ``n``. Here
    ``s = shift u / (1 + (shift - 1) u)`` and ``u = (t + 1) / T`` (section 5.3.2 of the paper, eq. 23). The
    network is conditioned on ``T s`` and has no attention mask.

    Args:
        transformer: the denoiser.
        vae: the autoencoder; frozen by this class.
        noise_levels: scales of signal and noise; see `flow_levels`.

    Raises:
        ValueError: if transformer and VAE have different numbers of channels.
    """

    blocks = (JointTransformerBlock,)

    def __init__(self, transformer: Any, vae: Any, noise_levels: NoiseLevels):
        config, channels = transformer.config, vae.config.latent_channels
        if not config.in_channels == transformer.out_channels == channels:
            raise ValueError(
                f"the transformer has {config.in_channels} input and {transformer.out_channels} output channels, but "
                f"the VAE has {channels}; use a text-to-image model in the layout of Stable Diffusion 3"
            )
        super().__init__(transformer, vae, "flow", noise_levels)

    @classmethod
    def from_config(cls, config: StableDiffusionConfig, runtime: Runtime) -> SD3Backbone:
        """Loads transformer, VAE and scheduler config from a folder or the Hub."""
        transformer, vae, constants = load_parts(config, runtime, SD3Transformer2DModel)
        return cls(transformer, vae, flow_levels(constants)).to(runtime.device)

    @property
    def divisor(self) -> int:
        return self.vae_scale_factor * self.denoiser.config.patch_size

    def call(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        conditioning = conditioning.at(timesteps)
        self.check_conditioning(conditioning)
        assert conditioning.pooled is not None
        dtype, times = self.denoiser.dtype, len(self.noise_levels) * self.noise_levels.noise
        output = denoiser(
            hidden_states=latents.to(dtype),
            encoder_hidden_states=conditioning.states.to(dtype),
            pooled_projections=conditioning.pooled.to(dtype),
            timestep=times.to(timesteps.device, torch.float32)[timesteps],
            return_dict=False,
        )[0]
        return output.to(latents.dtype)

    def check_conditioning(self, conditioning: Conditioning) -> None:
        """Raises ValueError if the conditioning has the wrong width or masked positions."""
        config, pooled = self.denoiser.config, conditioning.pooled
        widths = (conditioning.states.shape[-1], None if pooled is None else pooled.shape[-1])
        expected = (config.joint_attention_dim, config.pooled_projection_dim)
        if widths != expected:
            raise ValueError(
                f"SD3's transformer expects states of width {expected[0]} and a pooled embedding of width "
                f"{expected[1]}, but the encoder gives {widths[0]} and {widths[1]}; use the encoder 'clip-segment-sd3'"
            )
        if conditioning.mask is not None and not bool(conditioning.mask.all()):
            raise ValueError(
                "SD3's transformer has no attention mask, but the encoder masks the padding of shorter prompts; set "
                "the encoder's pad to 'pad*', and use T5 without a mask"
            )


def flow_levels(scheduler: dict[str, Any]) -> NoiseLevels:
    """Returns the noise levels of diffusers' ``FlowMatchEulerDiscreteScheduler`` with a constant shift.

    Raises:
        ValueError: if the scheduler is not a flow-matching scheduler, or its levels depend on the image size.
    """
    name = scheduler.get("_class_name", "")
    if not name.startswith("FlowMatch"):
        raise ValueError(
            f"'sd3' expects a flow-matching scheduler (FlowMatchEulerDiscreteScheduler), got '{name}'; "
            "for Stable Diffusion 1, 2 or XL use 'sd' or 'sdxl'"
        )
    for key in ("use_dynamic_shifting", "shift_terminal", "invert_sigmas"):
        if scheduler.get(key):
            raise ValueError(
                "'sd3' expects a scheduler with a constant shift, as in Stable Diffusion 3 and 3.5, got "
                f"{key}={scheduler[key]}; set 'shift' in scheduler_config.json instead"
            )
    num_timesteps, shift = int(scheduler.get("num_train_timesteps", 1000)), float(scheduler.get("shift", 1.0))
    return NoiseLevels.from_flow(num_timesteps, shift)
