"""Which sampling steps carry the reward's gradient.

Public names are loaded on first use, so importing this package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longalign.gradient_steps.base import GradientSteps as GradientSteps
    from longalign.gradient_steps.base import GradientStepSelector as GradientStepSelector
    from longalign.gradient_steps.config import GradientStepsConfig as GradientStepsConfig
    from longalign.gradient_steps.general import All as All
    from longalign.gradient_steps.general import GroupedRandom as GroupedRandom
    from longalign.gradient_steps.general import Last as Last
    from longalign.gradient_steps.papers import AlignProp as AlignProp
    from longalign.gradient_steps.papers import DraftK as DraftK
    from longalign.gradient_steps.papers import DraftLV as DraftLV
    from longalign.gradient_steps.papers import DRTune as DRTune
    from longalign.gradient_steps.papers import ReFL as ReFL

_MODULES = {
    "AlignProp": "papers",
    "All": "general",
    "DRTune": "papers",
    "DraftK": "papers",
    "DraftLV": "papers",
    "GradientStepSelector": "base",
    "GradientSteps": "base",
    "GradientStepsConfig": "config",
    "GroupedRandom": "general",
    "Last": "general",
    "ReFL": "papers",
}

__all__ = [
    "AlignProp",
    "All",
    "DRTune",
    "DraftK",
    "DraftLV",
    "GradientStepSelector",
    "GradientSteps",
    "GradientStepsConfig",
    "GroupedRandom",
    "Last",
    "ReFL",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
