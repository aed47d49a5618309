"""A folder of captioned images as data."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from longalign.data.base import Data, check_index
from longalign.data.configs import FolderConfig
from longalign.data.lines import read_jsonl, text_of
from longalign.runtime import Runtime

log = logging.getLogger(__name__)

# what Pillow raises on files that are missing, cut short, of no known format, or too large to be an image
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


class Folder(Data):
    """Image files with one caption each.

    Args:
        files: the image files.
        prompts: one for each file.
        resolution: side of the images in pixels.
        max_unreadable: how many unreadable files are replaced by the next readable one before the run is stopped.
    """

    def __init__(self, files: Sequence[Path], prompts: Sequence[str], resolution: int = 512, max_unreadable: int = 10):
        if len(files) != len(prompts):
            raise ValueError(f"expected one prompt per file, got {len(files)} files and {len(prompts)} prompts")
        if not files:
            raise ValueError("there are no images")
        self.files, self.prompts, self.resolution = list(files), list(prompts), resolution
        self.max_unreadable = max_unreadable
        #: unreadable files met so far, with what was wrong
        self.unreadable: dict[Path, str] = {}

    @classmethod
    def from_config(cls, config: FolderConfig, runtime: Runtime) -> Folder:
        """Reads ``metadata.jsonl``; images are read when asked for.

        Raises:
            ValueError: if a line lacks its file name or caption, or no image is left.
            FileNotFoundError: if there is no ``metadata.jsonl``.
        """
        folder = Path(config.folder)
        files, prompts, empty = [], [], 0
        for where, row in read_jsonl(folder / "metadata.jsonl"):
            if not isinstance(row.get("file_name"), str):
                raise ValueError(f"{where} has no 'file_name'; there is {', '.join(row) or 'nothing'}")
            prompt = text_of(row, where)
            empty += not prompt
            if prompt or config.empty == "keep":
                files.append(folder / row["file_name"])
                prompts.append(prompt)
        if empty:
            log.warning("%d of %d captions in %s are empty: %s", empty, empty + len(prompts), folder, config.empty)
        if not files:
            raise ValueError(f"{folder / 'metadata.jsonl'} names no image with a caption")
        return cls(files, prompts, config.resolution, config.max_unreadable)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = check_index(index, len(self))
        for step in range(len(self)):
            at = (start + step) % len(self)
            path = self.files[at]
            if path in self.unreadable:
                continue
            try:
                return {"prompt": self.prompts[at], "image": load_square(path, self.resolution)}
            except UNREADABLE as error:
                self._skip(path, error)
        raise ValueError(f"none of the {len(self)} images can be read: {self._named()}")

    def prompt(self, index: int) -> str:
        return self.prompts[check_index(index, len(self))]

    def _skip(self, path: Path, error: BaseException) -> None:
        self.unreadable[path] = f"{type(error).__name__}: {error}"
        if len(self.unreadable) > self.max_unreadable:
            raise ValueError(
                f"{len(self.unreadable)} images cannot be read, more than max_unreadable={self.max_unreadable}: "
                f"{self._named()}"
            ) from error
        log.warning("%s cannot be read and is replaced by the next image (%s)", path, self.unreadable[path])

    def _named(self) -> str:
        return "; ".join(f"{path} ({what})" for path, what in self.unreadable.items())


def load_square(path: Path, resolution: int) -> Tensor:
    """The largest square in the middle of an image, upright and scaled: ``(3, resolution, resolution)`` in [0, 1]."""
    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        square = ImageOps.fit(upright, (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
