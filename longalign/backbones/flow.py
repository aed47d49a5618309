"""Base class of flow-matching transformers: noise levels, image tokens, and checks of the conditioning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from longalign.backbones.config import vae_scale_factor
from longalign.backbones.latent import LatentBackbone
from longalign.encoders.base import Conditioning
from longalign.functional.diffusion import NoiseLevels

ScheduleMu = Callable[[int, Tensor], Tensor]
"""Maps the number of image tokens and numbers of sampling steps ``(n,)`` to ``mu`` ``(n,)``; see `flow_levels`."""


def flow_levels(
    scheduler: Mapping[str, Any], name: str, tokens: int, schedule_mu: ScheduleMu | None = None
) -> NoiseLevels:
    """Returns the noise levels of a flow-matching scheduler of diffusers.

    The scheduler is ``FlowMatchEulerDiscreteScheduler``, or a different one with ``use_flow_sigmas``. With
    ``use_dynamic_shifting``, the shift of `NoiseLevels.from_flow` depends on the number of image tokens: it is
    ``exp(mu)``, or ``mu`` with ``time_shift_type="linear"``. ``mu`` is linear in the number of tokens, from
    ``base_shift`` at ``base_image_seq_len`` to ``max_shift`` at ``max_image_seq_len``.

    Args:
        scheduler: config of the scheduler.
        name: name of the backbone, for messages.
        tokens: number of image tokens.
        schedule_mu: ``mu`` of sampling schedules, if it depends on their number of steps; None: it does not.

    Raises:
        ValueError: if the scheduler is not a flow-matching scheduler, or has a setting that is not supported.
    """
    kind = scheduler.get("_class_name", "")
    if not (kind.startswith("FlowMatch") or scheduler.get("use_flow_sigmas")):
        raise ValueError(
            f"'{name}' expects a flow-matching scheduler (FlowMatchEulerDiscreteScheduler, or one with "
            f"use_flow_sigmas), got '{kind}'; for Stable Diffusion 1, 2 or XL use the backbone 'sd' or 'sdxl'"
        )
    if scheduler.get("invert_sigmas"):
        raise ValueError(
            f"'{name}' does not support the scheduler setting invert_sigmas={scheduler['invert_sigmas']}; set it to "
            "null in scheduler_config.json"
        )
    shift = float(scheduler.get("flow_shift" if scheduler.get("use_flow_sigmas") else "shift", 1.0))
    num_timesteps, schedule_shifts = int(scheduler.get("num_train_timesteps", 1000)), None
    if scheduler.get("use_dynamic_shifting"):
        exponential = scheduler.get("time_shift_type") != "linear"
        low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
        start, end = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        mu = start + (end - start) * (tokens - low) / (high - low)
        shift = math.exp(mu) if exponential else mu
        if schedule_mu is not None:
            mus = schedule_mu(tokens, torch.arange(1, num_timesteps + 1, dtype=torch.float64))
            schedule_shifts = mus.exp() if exponential else mus
    terminal = scheduler.get("shift_terminal") or None
    return NoiseLevels.from_flow(num_timesteps, shift, terminal, schedule_shifts)


class FlowBackbone(LatentBackbone):
    """Base class of flow-matching transformers whose noise levels may depend on the number of image tokens.

    A token is a square patch of latents. `noise_levels` are those of the native resolution; see `flow_levels`.

    Args:
        transformer: the denoiser.
        vae: the autoencoder; frozen by this class.
        scheduler: config of the model's diffusers scheduler.
        resolution: native side of square images in pixels; None computes it from the transformer's ``sample_size``.

    Raises:
        ValueError: if the scheduler is not supported.
    """

    #: name of the backbone, for messages
    name: ClassVar[str]
    #: number of latents along each side of a token
    patch: int = 2
    #: ``mu`` of sampling schedules, if it depends on their number of steps
    schedule_mu: ClassVar[ScheduleMu | None] = None

    def __init__(self, transformer: Any, vae: Any, scheduler: Mapping[str, Any], *, resolution: int | None):
        self._scheduler = scheduler
        self._levels: dict[int, NoiseLevels] = {}
        self._device_levels: dict[tuple[int, torch.device], Tensor] = {}
        factor = vae_scale_factor(vae.config) or 1
        native: int = transformer.config.sample_size * factor if resolution is None else resolution
        levels = self.levels_at((native // factor, native // factor))
        super().__init__(transformer, vae, "flow", levels, native)

    @property
    def divisor(self) -> int:
        return self.patch * self.vae_scale_factor

    def levels_at(self, shape: Sequence[int]) -> NoiseLevels:
        key = self._key(shape)
        if key not in self._levels:
            self._levels[key] = flow_levels(self._scheduler, self.name, key, type(self).schedule_mu)
        return self._levels[key]

    def noise_at(self, latents: Tensor, timesteps: Tensor) -> Tensor:
        """Returns the noise levels ``(b,)`` in [0, 1] of latents ``(b, c, h, w)`` at timesteps ``(b,)``, in float32."""
        key = self._key(latents.shape), latents.device
        if key not in self._device_levels:
            # copied to the device once: a copy in each call would wait for the device
            self._device_levels[key] = self.levels_at(latents.shape).noise.to(latents.device, torch.float32)
        return self._device_levels[key][timesteps]

    def _key(self, shape: Sequence[int]) -> int:
        """Returns the number of image tokens for latents of a shape; 0 if the noise levels do not depend on it."""
        dynamic = self._scheduler.get("use_dynamic_shifting")
        return (shape[-2] // self.patch) * (shape[-1] // self.patch) if dynamic else 0


def pack(latents: Tensor) -> Tensor:
    """Packs latents ``(b, c, h, w)`` into tokens ``(b, h/2 * w/2, 4c)`` of 2 by 2 latents."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def unpack(tokens: Tensor, height: int) -> Tensor:
    """Inverse of `pack`: maps tokens to latents ``(b, c, h, w)``, where ``height`` is h."""
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=height // 2, p=2, q=2)


def image_positions(height: int, width: int, num_axes: int, device: torch.device) -> Tensor:
    """Returns the positions of FLUX's image tokens: row and column on axes 1 and 2, 0 on the others.

    Args:
        height: number of rows of tokens.
        width: number of columns.
        num_axes: number of axes of a position.
        device: device of the result.

    Returns:
        Positions ``(height * width, num_axes)``.
    """
    positions = torch.zeros(height, width, num_axes, device=device)
    positions[..., 1] = torch.arange(height, device=device)[:, None]
    positions[..., 2] = torch.arange(width, device=device)
    return positions.flatten(0, 1)


def embedded_guidance(takes_guidance: bool, guidance: float | None, default: float) -> float | None:
    """Returns the guidance scale that a transformer is conditioned on; None if it takes none.

    Args:
        takes_guidance: whether the transformer takes a guidance scale.
        guidance: the configured scale, or None.
        default: the scale if None is configured.

    Raises:
        ValueError: if a scale is configured and the transformer takes none.
    """
    if guidance is not None and not takes_guidance:
        raise ValueError(f"this transformer takes no guidance scale, got guidance={guidance}; set guidance to null")
    return (default if guidance is None else guidance) if takes_guidance else None


def check_joint_conditioning(
    conditioning: Conditioning, states: int, pooled: int, *, transformer: str, encoder: str
) -> None:
    """Checks the conditioning of a transformer that attends to text and image together, without an attention mask.

    Args:
        conditioning: the conditioning.
        states: expected width of the hidden states of the text.
        pooled: expected width of the pooled embedding.
        transformer: name of the transformer, for messages.
        encoder: name of a matching encoder, for messages.

    Raises:
        ValueError: if a width is wrong, or the conditioning masks some of its states.
    """
    given = None if conditioning.pooled is None else conditioning.pooled.shape[-1]
    widths = (conditioning.states.shape[-1], given)
    if widths != (states, pooled):
        raise ValueError(
            f"{transformer} expects states of width {states} and a pooled embedding of width {pooled}, but the encoder "
            f"gives {widths[0]} and {widths[1]}; use the encoder '{encoder}'"
        )
    advice = "set the encoder's pad to 'pad*', and use T5 without a mask"
    check_unmasked(conditioning, transformer=transformer, advice=advice)


def check_unmasked(conditioning: Conditioning, *, transformer: str, advice: str) -> None:
    """Raises ValueError if positions of a conditioning are masked, for a transformer without an attention mask."""
    if conditioning.mask is not None and not bool(conditioning.mask.all()):
        raise ValueError(
            f"{transformer} has no attention mask, but the encoder masks the padding of shorter prompts; {advice}"
        )
