"""Preference data in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longalign.data.pairs.base import Pair, Pairs, read_pair, select_pairs
from longalign.data.pairs.config import PairsConfig
from longalign.files.lines import inside, read_jsonl, text_of
from longalign.runtime import Runtime

EXAMPLE = '{"image_0": "a.png", "image_1": "b.png", "text": "A red fox.", "label_0": 1, "label_1": 0}'


class FolderPairs(Pairs):
    """Preference data whose images are files in a folder.

    Args:
        folder: folder of the files.
        files: the two files of each pair, relative to the folder.
        pairs: annotation of each pair.
        resolution: width and height of the images in pixels.
        max_unreadable: number of pairs with an unreadable image to replace by the next pair; one more raises an error.
    """

    def __init__(
        self,
        folder: Path,
        *,
        files: Sequence[tuple[str, str]],
        pairs: Sequence[Pair],
        resolution: int,
        max_unreadable: int,
    ):
        super().__init__(pairs, resolution=resolution, max_unreadable=max_unreadable)
        self.folder, self.files = folder, files

    @classmethod
    def from_config(cls, config: PairsConfig, runtime: Runtime) -> FolderPairs:
        """Reads ``metadata.jsonl`` in ``config.folder``; images are read when an item is accessed.

        Raises:
            ValueError: if a line is invalid, only some pairs have captions, or no pair has a prompt and a label.
            FileNotFoundError: if ``metadata.jsonl`` does not exist.
        """
        folder = Path(config.folder)
        files, rows = [], []
        for where, row in read_jsonl(folder / "metadata.jsonl", EXAMPLE):
            names: list[Any] = [row.get(key) for key in ("image_0", "image_1")]
            if not all(isinstance(name, str) for name in names):
                raise ValueError(
                    f"{where}: expected file names in 'image_0' and 'image_1'; available keys: "
                    f"{', '.join(row) or 'none'}"
                )
            labels = [row[key] for key in ("label_0", "label_1", "preference") if key in row]
            captions = [row[key] for key in ("caption_0", "caption_1") if key in row]
            for name in names:
                inside(folder, name, where)
            files.append((names[0], names[1]))
            rows.append(read_pair(text_of(row, where), labels, captions, where))
        indices, pairs = select_pairs(rows, str(folder))
        return cls(
            folder,
            files=[files[i] for i in indices],
            pairs=pairs,
            resolution=config.resolution,
            max_unreadable=config.max_unreadable,
        )

    def label(self, index: int) -> str:
        return f"the pair {' and '.join(self.files[index])}"

    def sources(self, index: int) -> Sequence[Path]:
        return [inside(self.folder, name) for name in self.files[index]]
