"""Long-text alignment of text-to-image diffusion models (LongAlign, arXiv 2410.11817).

Public names are imported on first use, so that ``import longalign`` does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longalign.lazy import lazy_exports

if TYPE_CHECKING:
    from longalign.ablation.run import ablate as ablate
    from longalign.compose import Composition as Composition
    from longalign.compose import build_from_config as build_from_config
    from longalign.config.changes import diff as diff
    from longalign.config.changes import override as override
    from longalign.config.describe import describe as describe
    from longalign.config.run import RunConfig as RunConfig
    from longalign.config.run import load_config as load_config
    from longalign.errors import ConfigError as ConfigError
    from longalign.errors import PartError as PartError
    from longalign.inference.diffusers import condition as condition
    from longalign.loop.fit import fit as fit
    from longalign.model import Model as Model
    from longalign.runtime import Runtime as Runtime

__all__, _get, __dir__ = lazy_exports(
    __name__,
    {
        "Composition": "compose",
        "ConfigError": "errors",
        "Model": "model",
        "PartError": "errors",
        "RunConfig": "config.run",
        "Runtime": "runtime",
        "ablate": "ablation.run",
        "build_from_config": "compose",
        "condition": "inference.diffusers",
        "describe": "config.describe",
        "diff": "config.changes",
        "fit": "loop.fit",
        "load_config": "config.run",
        "override": "config.changes",
    },
)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("longalign")
    return _get(name)
