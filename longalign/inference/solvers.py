"""Names of the solvers and of their diffusers schedulers. Does not import torch."""

from __future__ import annotations

from typing import Literal, get_args

Solver = Literal["unipc", "ddim", "dpm++", "lcm"]
SOLVERS: tuple[str, ...] = get_args(Solver)
SCHEDULER_CLASSES: dict[str, str] = {
    "unipc": "UniPCMultistepScheduler",
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}
FLOW_SCHEDULER_CLASSES: dict[str, str] = {
    "unipc": "UniPCMultistepScheduler",
    "ddim": "FlowMatchEulerDiscreteScheduler",
    "lcm": "FlowMatchLCMScheduler",
}
