"""Dataset of a folder of captioned images."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from longalign.data.base import check_index
from longalign.data.images.base import ImageDataset, Resolution
from longalign.data.images.config import FolderConfig
from longalign.files.lines import OUTCOMES, inside, text_of
from longalign.image_folder import read_captions
from longalign.runtime import Runtime

log = logging.getLogger(__name__)


class Folder(ImageDataset):
    """Dataset of image files with one caption each.

    Args:
        files: the image files.
        prompts: one caption per file; may be empty texts.
        resolution: side of square images in pixels, or a list of image sizes; see `ImageLoader`.
        max_unreadable: number of unreadable files to replace by the next readable one; one more raises an error.

    Raises:
        ValueError: if there are no files, or the numbers of files and captions differ.
    """

    def __init__(self, files: Sequence[Path], prompts: Sequence[str], *, resolution: Resolution, max_unreadable: int):
        if len(files) != len(prompts):
            raise ValueError(f"expected one prompt per file, got {len(files)} files and {len(prompts)} prompts")
        if not files:
            raise ValueError("expected at least one image, got none; give image files")
        super().__init__(resolution=resolution, max_unreadable=max_unreadable)
        self.files, self.prompts = list(files), list(prompts)

    @classmethod
    def from_config(cls, config: FolderConfig, runtime: Runtime) -> Folder:
        """Reads the captions with `longalign.image_folder.read_captions`; images are read on access.

        Raises:
            ValueError: if a line has no file name or no caption key, or if no image is left because those with an empty
                caption are skipped.
            FileNotFoundError: if the folder or its captions do not exist.
        """
        folder = Path(config.folder)
        files, prompts, empty = [], [], 0
        for where, row in read_captions(folder):
            if not isinstance(row.get("file_name"), str):
                raise ValueError(f"{where}: expected a text in 'file_name'; available keys: {', '.join(row) or 'none'}")
            prompt = text_of(row, where)
            empty += not prompt
            if prompt or config.empty == "keep":
                files.append(inside(folder, row["file_name"], where))
                prompts.append(prompt)
        if empty:
            total = empty + len(prompts) if config.empty == "skip" else len(prompts)
            log.warning("%d of %d captions in %s are empty and are %s", empty, total, folder, OUTCOMES[config.empty])
        if not files:
            raise ValueError(f"no image in {folder} has a caption; add captions, or set empty: keep")
        return cls(files, prompts, resolution=config.sizes, max_unreadable=config.max_unreadable)

    def __len__(self) -> int:
        return len(self.files)

    def source(self, index: int) -> Path:
        return self.files[index]

    def prompt(self, index: int) -> str:
        return self.prompts[check_index(index, len(self))]
