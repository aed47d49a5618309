"""The base class of trainer configs; no torch here."""

from __future__ import annotations

from typing import Any, ClassVar

from longalign.errors import ConfigProblem
from longalign.registry import PartConfig


class TrainerConfig(PartConfig):
    """Base class of trainer configs.

    A trainer is built from other parts, not from their configs: its ``from_config(config, runtime, *, ...)`` takes
    exactly the parts of `built_from`.

    These capabilities state what a trainer requires of a run. They are checked before anything is loaded.

    - ``needs``: which of ``backbone`` and ``encoder`` are required; the others must be omitted.
    - ``uses_rewards``: whether the trainer takes the run's rewards; otherwise the run must have none.
    - ``trains_rewards``: whether the rewards are what is trained.
    - ``compares_pairs``: whether the data must have two images of each prompt.
    - ``needs_images``: whether the data must have images.
    """

    needs: ClassVar[tuple[str, ...]] = ("backbone", "encoder")
    uses_rewards: ClassVar[bool] = False
    trains_rewards: ClassVar[bool] = False
    compares_pairs: ClassVar[bool] = False

    @property
    def needs_images(self) -> bool:
        return True

    @property
    def image_size(self) -> int | None:
        """Side of the sampled images in pixels; None if it samples none, or in the backbone's native resolution."""
        return None

    @classmethod
    def built_from(cls) -> tuple[str, ...]:
        return (*cls.needs, "rewards") if cls.uses_rewards else cls.needs


def image_problems(run: Any, caller: str) -> list[ConfigProblem]:
    """A problem if the data of ``run``, a `RunConfig`, has no images; ``caller`` is named in its message."""
    if run.data is None or run.data.has_images:
        return []
    return [("data", f"{caller} needs images, and '{run.data.name}' has prompts only; choose data with images")]
