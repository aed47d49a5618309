"""Config of prompts without images. Importing this module does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from longalign.data.config import DataConfig, Text
from longalign.errors import ConfigProblem


class PromptsConfig(DataConfig):
    """Prompts from a file, without images, for reward fine-tuning."""

    target: ClassVar[str] = "longalign.data.prompts.prompts:Prompts"

    name: Literal["prompts"] = "prompts"
    file: Text
    """path of a .txt file with one prompt per line, or of a .jsonl file with "text" (or "prompt") in each line. Prompts
    with several paragraphs need .jsonl.
    """
    empty: Literal["skip", "keep"] = "skip"
    """what to do with empty prompts: "skip" them, or "keep" them."""

    @property
    def has_images(self) -> bool:
        return False

    def check_files(self) -> list[ConfigProblem]:
        return [] if Path(self.file).is_file() else [("file", f"no file {self.file}; expected a .txt or .jsonl file")]
