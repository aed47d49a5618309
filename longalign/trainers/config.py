"""Base class of trainer configs. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from longalign.errors import ConfigProblem
from longalign.registry import PartConfig
from longalign.sizes import Size


class TrainerConfig(PartConfig):
    """Base class of trainer configs.

    A trainer is built from built parts, not from their configs: ``from_config(config, runtime, *, ...)`` receives
    exactly the parts in `built_from`.

    The following attributes specify what a trainer requires of a run. They are checked before any file is loaded.

    - ``needs``: which of ``backbone`` and ``encoder`` are required; the others must be omitted.
    - ``uses_rewards``: whether the trainer uses the run's rewards; otherwise the run must have none.
    - ``trains_rewards``: whether the rewards are trained.
    - ``compares_pairs``: whether the data must have two images of each prompt.
    """

    needs: ClassVar[tuple[str, ...]] = ("backbone", "encoder")
    uses_rewards: ClassVar[bool] = False
    trains_rewards: ClassVar[bool] = False
    compares_pairs: ClassVar[bool] = False

    @property
    def needs_images(self) -> bool:
        """Whether the data must have images."""
        return True

    @property
    def image_sizes(self) -> Mapping[str, Sequence[Size]]:
        """Sizes of sampled images by the key that sets them; empty for none, or the backbone's native resolution."""
        return {}

    @classmethod
    def built_from(cls) -> tuple[str, ...]:
        return (*cls.needs, "rewards") if cls.uses_rewards else cls.needs


def image_problems(run: Any, caller: str) -> list[ConfigProblem]:
    """Returns a problem if the data of the `RunConfig` ``run`` has no images; ``caller`` is used in the message."""
    if run.data is None or run.data.has_images:
        return []
    return [("data", f"{caller} needs images, but '{run.data.name}' has prompts only; choose data with images")]
