"""Noise levels and conditioning that flow-matching transformers share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from longalign.encoders.base import Conditioning
from longalign.functional.diffusion import NoiseLevels


def flow_levels(scheduler: Mapping[str, Any], name: str = "sd3", tokens: int | None = None) -> NoiseLevels:
    """Returns the noise levels of diffusers' ``FlowMatchEulerDiscreteScheduler``.

    With ``use_dynamic_shifting``, the shift of `NoiseLevels.from_flow` depends on the number of image tokens: it is
    ``exp(mu)``, or ``mu`` with ``time_shift_type="linear"``. ``mu`` is linear in the number of tokens, from
    ``base_shift`` at ``base_image_seq_len`` to ``max_shift`` at ``max_image_seq_len``.

    Args:
        scheduler: config of the scheduler.
        name: name of the backbone, for messages.
        tokens: number of image tokens; None rejects schedulers whose shift depends on it.

    Raises:
        ValueError: if the scheduler is not a flow-matching scheduler, or has settings that the backbone does not have.
    """
    kind = scheduler.get("_class_name", "")
    if not kind.startswith("FlowMatch"):
        raise ValueError(
            f"'{name}' expects a flow-matching scheduler (FlowMatchEulerDiscreteScheduler), got '{kind}'; "
            "for Stable Diffusion 1, 2 or XL use 'sd' or 'sdxl'"
        )
    dynamic = bool(scheduler.get("use_dynamic_shifting"))
    for key in ("use_dynamic_shifting", "shift_terminal", "invert_sigmas"):
        if scheduler.get(key) and not (key == "use_dynamic_shifting" and tokens is not None):
            constant = " and set a constant 'shift', as in Stable Diffusion 3" if key == "use_dynamic_shifting" else ""
            raise ValueError(
                f"'{name}' does not support the scheduler setting {key}={scheduler[key]}; set {key} to null in "
                f"scheduler_config.json{constant}"
            )
    num_timesteps, shift = int(scheduler.get("num_train_timesteps", 1000)), float(scheduler.get("shift", 1.0))
    if dynamic and tokens is not None:
        low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
        start, end = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
        mu = start + (end - start) * (tokens - low) / (high - low)
        shift = mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu)
    return NoiseLevels.from_flow(num_timesteps, shift)


def check_joint_conditioning(
    conditioning: Conditioning, states: int, pooled: int, *, transformer: str, encoder: str
) -> None:
    """Checks the conditioning of a transformer that attends to text and image together, without an attention mask.

    Args:
        conditioning: the conditioning.
        states: width of the states that the transformer expects.
        pooled: width of the pooled embedding that it expects.
        transformer: the transformer, for messages.
        encoder: name of a matching encoder, for messages.

    Raises:
        ValueError: if a width is wrong, or positions are masked.
    """
    given = None if conditioning.pooled is None else conditioning.pooled.shape[-1]
    widths = (conditioning.states.shape[-1], given)
    if widths != (states, pooled):
        raise ValueError(
            f"{transformer} expects states of width {states} and a pooled embedding of width {pooled}, but the encoder "
            f"gives {widths[0]} and {widths[1]}; use the encoder '{encoder}'"
        )
    if conditioning.mask is not None and not bool(conditioning.mask.all()):
        raise ValueError(
            f"{transformer} has no attention mask, but the encoder masks the padding of shorter prompts; set the "
            "encoder's pad to 'pad*', and use T5 without a mask"
        )
