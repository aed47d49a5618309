"""Functions of tensors: diffusion, solvers, rollouts (sampling with gradient), preference scores and images.

Public names are loaded on first use, so importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longalign.lazy import lazy_exports

if TYPE_CHECKING:
    from longalign.functional.diffusion import NoiseLevels as NoiseLevels
    from longalign.functional.diffusion import add_noise as add_noise
    from longalign.functional.diffusion import guide as guide
    from longalign.functional.diffusion import guided_steps as guided_steps
    from longalign.functional.diffusion import predict_guided as predict_guided
    from longalign.functional.diffusion import sample_timesteps as sample_timesteps
    from longalign.functional.diffusion import training_target as training_target
    from longalign.functional.images import ImagePreprocessor as ImagePreprocessor
    from longalign.functional.images import random_crop as random_crop
    from longalign.functional.images import resize_to_input as resize_to_input
    from longalign.functional.preference import Decomposition as Decomposition
    from longalign.functional.preference import common_direction as common_direction
    from longalign.functional.preference import decompose as decompose
    from longalign.functional.preference import perpendicular as perpendicular
    from longalign.functional.preference import reweight as reweight
    from longalign.functional.preference import strict_relevance as strict_relevance
    from longalign.functional.rollout_gradient import RecordedStep as RecordedStep
    from longalign.functional.rollout_gradient import replay as replay
    from longalign.functional.rollout_gradient import replay_backward as replay_backward
    from longalign.functional.rollout_gradient import rollout as rollout
    from longalign.functional.solvers import Solver as Solver
    from longalign.functional.solvers import ddim as ddim
    from longalign.functional.solvers import dpmpp_2m as dpmpp_2m
    from longalign.functional.solvers import lcm as lcm
    from longalign.functional.solvers import sampling_timesteps as sampling_timesteps
    from longalign.functional.solvers import trailing_timesteps as trailing_timesteps

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Decomposition": "preference",
        "ImagePreprocessor": "images",
        "NoiseLevels": "diffusion",
        "RecordedStep": "rollout_gradient",
        "Solver": "solvers",
        "add_noise": "diffusion",
        "common_direction": "preference",
        "ddim": "solvers",
        "decompose": "preference",
        "dpmpp_2m": "solvers",
        "guide": "diffusion",
        "guided_steps": "diffusion",
        "lcm": "solvers",
        "perpendicular": "preference",
        "predict_guided": "diffusion",
        "random_crop": "images",
        "replay": "rollout_gradient",
        "replay_backward": "rollout_gradient",
        "resize_to_input": "images",
        "reweight": "preference",
        "rollout": "rollout_gradient",
        "sample_timesteps": "diffusion",
        "sampling_timesteps": "solvers",
        "strict_relevance": "preference",
        "trailing_timesteps": "solvers",
        "training_target": "diffusion",
    },
)
