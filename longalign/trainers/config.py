"""Base class of trainer configs. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from longalign.errors import ConfigProblem
from longalign.registry import PartConfig
from longalign.sizes import Size


class TrainerConfig(PartConfig):
    """Base class of trainer configs.

    A trainer uses other parts of its run, which are built first: ``from_config(config, runtime, *, ...)`` receives
    backbone, encoder and rewards by these names, as far as the following attributes require them.

    The attributes specify what the trainer requires of a run. They are checked before any file is loaded.

    - ``needs``: the parts that the run must have: ``"backbone"``, ``"encoder"``, both or none. The run must not have
      a backbone or encoder that is not listed here.
    - ``uses_rewards``: whether the trainer uses the run's rewards; otherwise the run must have none.
    - ``trains_rewards``: whether the trainer changes the weights of the rewards; otherwise they are frozen.
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
        """Sizes in pixels of the images that the trainer samples, by the config key that sets them.

        Empty if the trainer samples no images, or only images of the backbone's native resolution.
        """
        return {}

    @classmethod
    def built_from(cls) -> tuple[str, ...]:
        return (*cls.needs, "rewards") if cls.uses_rewards else cls.needs


def image_problems(run: Any, caller: str) -> list[ConfigProblem]:
    """Returns ``[("data", message)]`` if the data of the `RunConfig` ``run`` has no images; else an empty list.

    ``caller`` names the part that needs images, for the message.
    """
    if run.data is None or run.data.has_images:
        return []
    return [("data", f"{caller} needs images, but '{run.data.name}' has prompts only; choose data with images")]
