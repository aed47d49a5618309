"""The public LongAlign captions (Hub: luping-liu/LongAlign), joined with local images."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

from longalign.data.base import check_index
from longalign.data.images.base import ImageDataset, Resolution
from longalign.data.images.config import LongAlignCaptionsConfig
from longalign.data.tables.table import caption_from_cell, load_table, table_files
from longalign.files.lines import OUTCOMES, inside
from longalign.runtime import Runtime

log = logging.getLogger(__name__)

COLUMNS = ("caption", "path", "source")


class LongAlignCaptions(ImageDataset):
    """The public LongAlign captions whose image files are available locally.

    A row has the columns ``caption``, ``path`` (of the image) and ``source``, the name of the data set of the image.

    Args:
        rows: a table of the library ``datasets``.
        indices: numbers of the rows to use, from 0.
        folders: source -> folder that the paths of this source are relative to.
        resolution: side of square images in pixels, or a list of image sizes; see `ImageLoader`.
        max_unreadable: number of unreadable files to replace by the next readable one; one more raises an error.
    """

    def __init__(
        self,
        rows: Any,
        *,
        indices: list[int],
        folders: dict[str, Path],
        resolution: Resolution,
        max_unreadable: int,
    ):
        super().__init__(resolution=resolution, max_unreadable=max_unreadable)
        self.rows, self.indices, self.folders = rows, indices, folders

    @classmethod
    def from_config(cls, config: LongAlignCaptionsConfig, runtime: Runtime) -> LongAlignCaptions:
        """Loads the table of captions and selects the rows whose image file exists in ``config.folders``.

        Warnings count the skipped rows.

        Raises:
            ValueError: if a column is missing, a source in ``config.folders`` occurs in no row, more than
                ``config.max_missing`` image files are missing, or no row can be used.
        """
        path, files = config.captions, None
        if Path(path).exists():
            path, files = table_files(Path(path))
        keys = {"revision": config.revision, "cache_dir": config.cache}
        rows = load_table(config.name, path, split=config.split, data_files=files, **keys)
        missing = [column for column in COLUMNS if column not in rows.column_names]
        if missing:
            expected, available = ", ".join(COLUMNS), ", ".join(rows.column_names)
            raise ValueError(
                f"'{config.captions}' has no column '{missing[0]}'; expected the columns {expected}, got {available}"
            )
        folders = {source: Path(folder) for source, folder in config.folders.items()}
        return cls(
            rows,
            indices=_with_images(rows, folders, config),
            folders=folders,
            resolution=config.sizes,
            max_unreadable=config.max_unreadable,
        )

    def __len__(self) -> int:
        return len(self.indices)

    def prompt(self, index: int) -> str:
        return caption_from_cell(self.rows[self.indices[check_index(index, len(self))]]["caption"])

    def source(self, index: int) -> Path:
        row = self.rows[self.indices[index]]
        return _image_path(self.folders[row["source"]], row["path"])


def _image_path(folder: Path, path: str, where: str = "") -> Path:
    return inside(folder, path.lstrip("/"), where)


def _with_images(rows: Any, folders: dict[str, Path], config: LongAlignCaptionsConfig) -> list[int]:
    """Returns the numbers of the rows to use: those of the configured sources that have an image file.

    Rows without a caption are used only if ``config.empty`` is "keep".
    """
    counts: Counter[str] = Counter()
    indices, missing, empty = [], [], 0
    for i, (caption, path, source) in enumerate(zip(*(rows[column] for column in COLUMNS), strict=True)):
        counts[source] += 1
        if source not in folders:
            continue
        where = f"row {i} of {config.captions}"
        if not isinstance(path, str):
            raise ValueError(f"{where}: 'path' must be a string, got {path!r:.60}; correct this row")
        if not caption_from_cell(caption, where):
            empty += 1
            if config.empty == "skip":
                continue
        image = _image_path(folders[source], path, where)
        if image.is_file():
            indices.append(i)
        else:
            missing.append(image)
            if config.max_missing is not None and len(missing) > config.max_missing:
                raise ValueError(
                    f"more than max_missing={config.max_missing} images are missing, e.g. {image}; add them, or raise "
                    "max_missing"
                )
    if unknown := sorted(set(folders) - set(counts)):
        raise ValueError(
            f"'folders' has the source '{unknown[0]}', which no caption has; expected some of "
            f"{', '.join(sorted(counts))}"
        )
    skipped = {source: count for source, count in counts.items() if source not in folders}
    if skipped:
        sources = ", ".join(f"{source} ({count})" for source, count in skipped.items())
        log.warning("captions skipped, since 'folders' has no folder for their source: %s", sources)
    if empty:
        log.warning("%d captions are empty and are %s", empty, OUTCOMES[config.empty])
    if missing:
        examples = ", ".join(map(str, missing[:3]))
        log.warning("%d captions skipped, since their image file is missing, e.g. %s", len(missing), examples)
    if not indices:
        example = f"; {len(missing)} are missing, e.g. {missing[0]}" if missing else ""
        raise ValueError(f"no image of '{config.captions}' is in the configured folders{example}; correct 'folders'")
    return indices
