"""Conformance checks for parts (encoders, rewards, trainers and so on), for the tests of plugins and of this library.

Each function ``check_<kind>`` takes the config of one part, builds the part, and raises one AssertionError that lists
everything that fails::

    from longalign.testing import check_reward

    def test_conformance():
        check_reward({"name": "brightness", "weight": 2.0})

A part that passes works with all parts of other kinds. `longalign.testing.tiny` writes tiny random checkpoints in the
published layouts, so that no check needs a download.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longalign.lazy import lazy_exports

if TYPE_CHECKING:
    from longalign.testing.backbones import check_backbone as check_backbone
    from longalign.testing.data import check_data as check_data
    from longalign.testing.edits import check_edit as check_edit
    from longalign.testing.encoders import check_encoder as check_encoder
    from longalign.testing.gradient_steps import check_gradient_steps as check_gradient_steps
    from longalign.testing.metrics import check_metric as check_metric
    from longalign.testing.rewards import check_reward as check_reward
    from longalign.testing.segmenters import check_segmenter as check_segmenter
    from longalign.testing.trainers import check_trainer as check_trainer

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "check_backbone": "backbones",
        "check_data": "data",
        "check_edit": "edits",
        "check_encoder": "encoders",
        "check_gradient_steps": "gradient_steps",
        "check_metric": "metrics",
        "check_reward": "rewards",
        "check_segmenter": "segmenters",
        "check_trainer": "trainers",
    },
)
