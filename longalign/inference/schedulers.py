"""Creates diffusers schedulers with a backbone's noise levels."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from longalign.config.solvers import FLOW_SCHEDULER_CLASSES, SCHEDULER_CLASSES, check_solver
from longalign.functional.diffusion import NoiseLevels, check_prediction
from longalign.functional.solvers import sampling_timesteps, trailing_timesteps
from longalign.inference.pipelines import library

MIN_ALPHA_CUMPROD = 2.0**-24
"""Lower bound of ``alphas_cumprod``: without signal at the last timestep, the solvers' sigma would be infinite."""


def make_scheduler(name: str, levels: NoiseLevels, prediction: str, num_steps: int) -> Any:
    """Returns a diffusers scheduler with a model's noise levels and ``num_steps`` timesteps.

    Args:
        name: solver: ``"unipc"``, ``"ddim"`` (timesteps 999, 979, ..., 19 for 50 steps; Euler's method for
            flow-matching models), ``"dpm++"`` (not for flow-matching models) or ``"lcm"`` (999, 749, 499, 249 for 4
            steps).
        levels: scales of signal and noise at each of the T timesteps, T = 1000 in the examples above.
        prediction: prediction type of the denoiser: ``"epsilon"``, ``"v_prediction"`` or ``"flow"``.
        num_steps: number of sampling steps, 1 to T.

    Raises:
        ValueError: if the solver or the prediction type is unknown, the solver does not support the prediction type, or
            ``num_steps`` is out of range.
    """
    check_solver(name)
    check_prediction(prediction)
    length = len(levels)
    if not 1 <= num_steps <= length:
        raise ValueError(f"num_steps must be between 1 and {length}, the model's timesteps, got {num_steps}")
    if prediction == "flow":
        return _flow_scheduler(name, levels, num_steps)
    return _diffusion_scheduler(name, levels, prediction, num_steps)


def _diffusion_scheduler(name: str, levels: NoiseLevels, prediction: str, num_steps: int) -> Any:
    length = len(levels)
    alphas_cumprod = levels.signal.square().clamp(min=MIN_ALPHA_CUMPROD)
    previous = torch.cat([torch.ones(1, dtype=alphas_cumprod.dtype), alphas_cumprod[:-1]])
    betas = (1 - alphas_cumprod / previous).tolist()
    settings = {"timestep_spacing": "trailing", "clip_sample": False} if name == "ddim" else {}
    scheduler = getattr(library, SCHEDULER_CLASSES[name])(
        num_train_timesteps=length, trained_betas=betas, prediction_type=prediction, **settings
    )
    if name == "lcm":
        timesteps = trailing_timesteps(num_steps, length)
        scheduler.set_timesteps(timesteps=list(timesteps), original_inference_steps=length)
        return scheduler
    with warnings.catch_warnings():
        # diffusers converts tensors to numpy in a way that numpy 2 deprecates
        warnings.simplefilter("ignore", DeprecationWarning)
        scheduler.set_timesteps(num_steps)
    return scheduler


def _flow_scheduler(name: str, levels: NoiseLevels, num_steps: int) -> Any:
    """Returns a scheduler for a flow-matching model.

    The timesteps of the scheduler, which the denoiser receives, are the noise levels in [0, 1] times the number of
    levels.

    Args:
        name: solver: ``"unipc"``, ``"ddim"`` or ``"lcm"``.
        levels: scales of signal and noise at each training timestep.
        num_steps: number of sampling steps.

    Raises:
        ValueError: if the solver does not support flow-matching models.
    """
    length = len(levels)
    if name not in FLOW_SCHEDULER_CLASSES:
        raise ValueError(f"'{name}' does not support flow models; choose unipc, ddim (Euler's method) or lcm")
    settings = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if name == "unipc" else {}
    scheduler = getattr(library, FLOW_SCHEDULER_CLASSES[name])(length, **settings)
    scheduler.set_timesteps(sigmas=levels.noise[list(sampling_timesteps(name, levels, num_steps))].numpy())
    return scheduler
