"""Predictions at the sampling steps of a batch, with guidance; keys and values of the text are shared."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from longalign.backbones.base import Backbone
from longalign.encoders.base import Conditioning
from longalign.functional.diffusion import predict_guided
from longalign.functional.rollout_gradient import Predict


def make_predictions(
    backbone: Backbone,
    conditioning: Conditioning,
    rows: slice,
    guided: Sequence[bool],
    scale: float,
    reference: bool = False,
) -> list[Predict]:
    """Returns for each sampling step a function that predicts with the denoiser.

    Each function maps latents ``(s * b, c, h, w)`` and timesteps ``(s * b,)`` to predictions ``(s * b, c, h, w)``; s is
    the number of steps that one call covers. All steps with guidance have the same function, and so have all steps
    without guidance.

    The cross-attention's keys and values of the empty prompt are computed once for all images. Calls without gradient
    also share the keys and values of the prompts, so weights and training mode must not change between these calls.
    If the encoder's states depend on the timestep, no keys and values are shared.

    Args:
        backbone: backbone with the denoiser.
        conditioning: conditioning of prompts and, if any step has guidance, of the empty prompt in the last row.
        rows: slice of the prompts in ``conditioning``, with b prompts.
        guided: for each step, whether it has classifier-free guidance.
        scale: guidance scale of the steps with guidance.
        reference: whether the reference model predicts, which is the model before training, instead of the trained one.
    """
    denoise, project = backbone.predict, backbone.project_text
    if reference:
        denoise, project = backbone.predict_reference, lambda conditioning: conditioning
    count, device = rows.stop - rows.start, conditioning.states.device
    used = torch.arange(rows.start, rows.stop, device=device)
    if any(guided):
        used = torch.cat([used, torch.full((1,), len(conditioning.states) - 1, device=device)])

    def index(copies: int, is_guided: bool) -> Tensor:
        prompt_rows = torch.arange(count, device=device).repeat(copies)
        return torch.cat([prompt_rows, torch.full_like(prompt_rows, count)]) if is_guided else prompt_rows

    projected = cache(lambda: project(conditioning[used]))
    selected = cache(lambda copies, is_guided: projected()[index(copies, is_guided)])

    def text(latents: Tensor, is_guided: bool) -> Conditioning:
        """Returns one row per latent, that of its prompt; with guidance, then as many rows of the empty prompt."""
        copies = len(latents) // count
        if torch.is_grad_enabled():  # each call has a graph of its own
            return project(conditioning[used])[index(copies, is_guided)]
        return selected(copies, is_guided)

    def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
        return denoise(latents, timesteps, text(latents, is_guided=False))

    def predict_with_guidance(latents: Tensor, timesteps: Tensor) -> Tensor:
        branches = text(latents, is_guided=True)
        return predict_guided(lambda x, t: denoise(x, t, branches), latents, timesteps, scale, backbone.guide)

    return [predict_with_guidance if is_guided else predict for is_guided in guided]
