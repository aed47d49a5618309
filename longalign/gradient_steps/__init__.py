"""Methods that select the gradient steps: the sampling steps that receive the gradient of a reward.

Public names are loaded on first use, so importing this package does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longalign.lazy import lazy_exports

if TYPE_CHECKING:
    from longalign.gradient_steps.base import GradientSteps as GradientSteps
    from longalign.gradient_steps.base import GradientStepSelector as GradientStepSelector
    from longalign.gradient_steps.config import GradientStepsConfig as GradientStepsConfig
    from longalign.gradient_steps.general import All as All
    from longalign.gradient_steps.general import AllConfig as AllConfig
    from longalign.gradient_steps.general import GroupedRandom as GroupedRandom
    from longalign.gradient_steps.general import GroupedRandomConfig as GroupedRandomConfig
    from longalign.gradient_steps.general import Last as Last
    from longalign.gradient_steps.general import LastConfig as LastConfig
    from longalign.gradient_steps.papers import AlignProp as AlignProp
    from longalign.gradient_steps.papers import AlignPropConfig as AlignPropConfig
    from longalign.gradient_steps.papers import DraftK as DraftK
    from longalign.gradient_steps.papers import DraftKConfig as DraftKConfig
    from longalign.gradient_steps.papers import DraftLV as DraftLV
    from longalign.gradient_steps.papers import DraftLVConfig as DraftLVConfig
    from longalign.gradient_steps.papers import DRTune as DRTune
    from longalign.gradient_steps.papers import DRTuneConfig as DRTuneConfig
    from longalign.gradient_steps.papers import ReFL as ReFL
    from longalign.gradient_steps.papers import ReFLConfig as ReFLConfig
    from longalign.gradient_steps.random import synced_randint as synced_randint

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "AlignProp": "papers",
        "AlignPropConfig": "papers",
        "All": "general",
        "AllConfig": "general",
        "DRTune": "papers",
        "DRTuneConfig": "papers",
        "DraftK": "papers",
        "DraftKConfig": "papers",
        "DraftLV": "papers",
        "DraftLVConfig": "papers",
        "GradientStepSelector": "base",
        "GradientSteps": "base",
        "GradientStepsConfig": "config",
        "GroupedRandom": "general",
        "GroupedRandomConfig": "general",
        "Last": "general",
        "LastConfig": "general",
        "ReFL": "papers",
        "synced_randint": "random",
        "ReFLConfig": "papers",
    },
)
