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
    """Raises ValueError unless ``name`` is one of `SOLVERS`: unipc, ddim, dpm++ or lcm."""
    if name not in SOLVERS:
        raise ValueError(f"no solver '{name}'; available: {', '.join(SOLVERS)}")


def check_negative(negative: Any, guidance: float | None) -> None:
    """Raises ValueError for a negative prompt at guidance scale 1, where it would have no effect.

    Args:
        negative: the negative prompt or prompts; None if there is none.
        guidance: scale of classifier-free guidance; None if it is not known.
    """
    if negative is not None and guidance == 1:
        raise ValueError(
            "a negative prompt has no effect at guidance 1; raise the guidance or remove the negative prompt"
        )
