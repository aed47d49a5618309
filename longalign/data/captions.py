"""The public LongAlign captions (hub: luping-liu/LongAlign), joined with the images that a user has."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

from longalign.data.base import check_index
from longalign.data.configs import LongAlignCaptionsConfig
from longalign.data.hub import caption_from_cell, files_of, load
from longalign.data.image_dataset import ImageDataset
from longalign.data.lines import inside
from longalign.runtime import Runtime

log = logging.getLogger(__name__)

COLUMNS = ("caption", "path", "source")


class LongAlignCaptions(ImageDataset):
    """Rows ``caption, path, source`` whose image is there.

    Args:
        rows: a table of the library ``datasets``.
        kept: numbers of the rows to use.
        folders: folder of each source's images, in which ``path`` is looked for.
        resolution: side of the images in pixels.
        max_unreadable: how many unreadable files are replaced by the next readable one before the run is stopped.
    """

    def __init__(
        self,
        rows: Any,
        kept: list[int],
        folders: dict[str, Path],
        resolution: int | None = 512,
        max_unreadable: int = 10,
    ):
        super().__init__(resolution, max_unreadable)
        self.rows, self.kept, self.folders = rows, kept, folders

    @classmethod
    def from_config(cls, config: LongAlignCaptionsConfig, runtime: Runtime) -> LongAlignCaptions:
        """Reads the table and looks for every image; what is left out is counted in a warning.

        Raises:
            ValueError: if the table lacks a column or a source, more images are missing than ``max_missing``, or
                nothing is left.
        """
        given, files = config.captions, None
        if Path(given).exists():
            given, files = files_of(Path(given))
        keys = {"revision": config.revision, "cache_dir": config.cache}
        rows = load(config.name, given, split=config.split, data_files=files, **keys)
        lacking = [column for column in COLUMNS if column not in rows.column_names]
        if lacking:
            raise ValueError(f"'{config.captions}' has no '{lacking[0]}'; there is {', '.join(rows.column_names)}")
        folders = {source: Path(folder) for source, folder in config.folders.items()}
        return cls(rows, _with_images(rows, folders, config), folders, config.resolution, config.max_unreadable)

    def __len__(self) -> int:
        return len(self.kept)

    def prompt(self, index: int) -> str:
        return caption_from_cell(self.rows[self.kept[check_index(index, len(self))]]["caption"])

    def source(self, index: int) -> Path:
        row = self.rows[self.kept[index]]
        return _place(self.folders[row["source"]], row["path"])


def _place(folder: Path, path: str, where: str = "") -> Path:
    return inside(folder, path.lstrip("/"), where)


def _with_images(rows: Any, folders: dict[str, Path], config: LongAlignCaptionsConfig) -> list[int]:
    """Numbers of the rows of the given sources with a caption and an image."""
    of_source: Counter[str] = Counter()
    kept, missing, empty = [], [], 0
    for i, (caption, path, source) in enumerate(zip(*(rows[column] for column in COLUMNS), strict=True)):
        of_source[source] += 1
        if source not in folders:
            continue
        where = f"row {i} of {config.captions}"
        if not isinstance(path, str):
            raise ValueError(f"{where}: the path must be a text, got {path!r:.60}")
        if not caption_from_cell(caption, where):
            empty += 1
            if config.empty == "skip":
                continue
        place = _place(folders[source], path, where)
        if place.is_file():
            kept.append(i)
        else:
            missing.append(place)
            if config.max_missing is not None and len(missing) > config.max_missing:
                raise ValueError(f"more than max_missing={config.max_missing} images are missing, the last is {place}")
    if unknown := sorted(set(folders) - set(of_source)):
        raise ValueError(f"no caption has the source '{unknown[0]}'; there is {', '.join(sorted(of_source))}")
    others = {source: count for source, count in of_source.items() if source not in folders}
    if others:
        log.warning("left out, for want of a folder: %s", ", ".join(f"{n} of {s}" for s, n in others.items()))
    if empty:
        log.warning("%d captions are empty: %s", empty, config.empty)
    if missing:
        first = ", ".join(map(str, missing[:3]))
        log.warning("left out, for their images are missing: %d, the first are %s", len(missing), first)
    if not kept:
        where = f", the first of {len(missing)} missing ones is {missing[0]}" if missing else ""
        raise ValueError(f"no image of '{config.captions}' is in the folders given{where}")
    return kept
