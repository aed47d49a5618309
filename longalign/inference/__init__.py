"""Generates images with trained models and unmodified diffusers pipelines, and encodes prompts for such pipelines.

Public names are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longalign.lazy import lazy_exports

if TYPE_CHECKING:
    from longalign.inference.diffusers import condition as condition
    from longalign.inference.pipelines import load_pipeline as load_pipeline
    from longalign.inference.sampling import generate as generate
    from longalign.inference.sampling import load_model as load_model
    from longalign.inference.sampling import sample as sample
    from longalign.inference.schedulers import make_scheduler as make_scheduler

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "condition": "diffusers",
        "generate": "sampling",
        "load_model": "sampling",
        "load_pipeline": "pipelines",
        "make_scheduler": "schedulers",
        "sample": "sampling",
    },
)
