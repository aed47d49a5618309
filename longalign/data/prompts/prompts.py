"""Dataset of prompts without images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from longalign.data.base import Data, check_index
from longalign.data.prompts.config import PromptsConfig
from longalign.files.lines import OUTCOMES, read_prompts
from longalign.runtime import Runtime

log = logging.getLogger(__name__)


class Prompts(Data):
    """Dataset of prompts without images. An item is ``{"prompt": str}``.

    Args:
        prompts: the prompts, a list or any sequence that reads them by index, such as the captions of a table.

    Raises:
        ValueError: if there are no prompts.
    """

    has_images = False

    def __init__(self, prompts: Sequence[str]):
        if not prompts:
            raise ValueError("expected at least one prompt, got none; give prompts")
        self.prompts = prompts

    @classmethod
    def from_config(cls, config: PromptsConfig, runtime: Runtime) -> Prompts:
        """Reads the prompts of ``config.file``.

        Raises:
            ValueError: if the file has no prompts, or only empty ones and ``config.empty`` is "skip".
            FileNotFoundError: if the file does not exist.
        """
        prompts = read_prompts(config.file)
        non_empty = [p for p in prompts if p]
        if len(non_empty) < len(prompts):
            empty = len(prompts) - len(non_empty)
            log.warning(
                "%d of %d prompts in %s are empty and are %s", empty, len(prompts), config.file, OUTCOMES[config.empty]
            )
        prompts = prompts if config.empty == "keep" else non_empty
        if not prompts:
            raise ValueError(f"{config.file} contains no prompts, or only empty ones; expected at least one prompt")
        return cls(prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"prompt": self.prompt(index)}

    def prompt(self, index: int) -> str:
        return self.prompts[check_index(index, len(self))]
