"""Checkpoints of trained models: saving, loading, export, upload, and conversion of published weights.

Public names are loaded on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longalign.lazy import lazy_exports

if TYPE_CHECKING:
    from longalign.checkpoints.checkpoint import Weights as Weights
    from longalign.checkpoints.checkpoint import load_for_sampling as load_for_sampling
    from longalign.checkpoints.checkpoint import load_weights as load_weights
    from longalign.checkpoints.checkpoint import read_config as read_config
    from longalign.checkpoints.checkpoint import save as save
    from longalign.checkpoints.convert import convert_longsd as convert_longsd
    from longalign.checkpoints.diffusers_files import export_lora as export_lora
    from longalign.checkpoints.publish import export as export
    from longalign.checkpoints.upload import push_to_hub as push_to_hub

__all__, __getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Weights": "checkpoint",
        "convert_longsd": "convert",
        "export": "publish",
        "export_lora": "diffusers_files",
        "load_for_sampling": "checkpoint",
        "load_weights": "checkpoint",
        "push_to_hub": "upload",
        "read_config": "checkpoint",
        "save": "checkpoint",
    },
)
