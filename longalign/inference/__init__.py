"""Generates images: sampling, baselines, and conditioning of diffusers pipelines.

Public names are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longalign.inference.diffusers import condition as condition
    from longalign.inference.pipelines import load_pipeline as load_pipeline
    from longalign.inference.sampling import generate as generate
    from longalign.inference.sampling import load_model as load_model
    from longalign.inference.sampling import sample as sample
    from longalign.inference.schedulers import make_scheduler as make_scheduler
    from longalign.inference.solvers import SOLVERS as SOLVERS

_MODULES = {
    "SOLVERS": "solvers",
    "condition": "diffusers",
    "generate": "sampling",
    "load_model": "sampling",
    "load_pipeline": "pipelines",
    "make_scheduler": "schedulers",
    "sample": "sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
