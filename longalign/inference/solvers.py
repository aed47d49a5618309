"""Names of the solvers and of their diffusers schedulers, and checks of sampling settings. Does not import torch."""

from __future__ import annotations

from typing import Any, Literal, get_args

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


def check_solver(name: str) -> None:
    """Raises ValueError for an unknown solver."""
    if name not in SOLVERS:
        raise ValueError(f"no solver '{name}'; available: {', '.join(SOLVERS)}")


def check_negative(negative: Any, guidance: float | None) -> None:
    """Raises ValueError for a negative prompt without guidance, which would have no effect."""
    if negative is not None and guidance == 1:
        raise ValueError(
            "a negative prompt has no effect at guidance 1; raise the guidance or remove the negative prompt"
        )
