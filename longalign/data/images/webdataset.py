"""Shards in WebDataset layout: tar files in which files with the same stem form one item."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from longalign.data.images.base import Resolution
from longalign.data.images.config import WebDatasetConfig
from longalign.data.images.shards import find_shards
from longalign.data.stream import Record, Stream
from longalign.runtime import Runtime
from longalign.segmenters import check_text

#: Size limits in bytes, of an image or caption file and of the header of a tar member. Compressed files can declare any
#: size.
MAX_BYTES = 256 * 2**20
MAX_HEADER_BYTES = 2**20
HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class _Member(tarfile.TarInfo):
    """Tar member that rejects headers above `MAX_HEADER_BYTES`; tarfile would read any header into memory."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in HEADERS and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header has {self.size} bytes, more than the limit of {MAX_HEADER_BYTES} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


class WebDataset(Stream):
    """Stream of captioned images in plain or compressed tar files. Each tar file is one shard.

    Files of the same folder and stem (name up to the first dot) form one item.

    Args:
        shards: the tar files.
        image: suffixes of the image file without dot; the first one that an item has is used.
        caption: suffix of the caption file without dot.
        field: key of the caption in a JSON caption file; None if caption files are text.
        resolution: see `Stream`.
        empty: see `Stream`.
        max_unreadable: see `Stream`.
        shuffle_buffer: see `Stream`.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        *,
        image: Sequence[str],
        caption: str,
        field: str | None,
        resolution: Resolution,
        empty: str,
        max_unreadable: int,
        shuffle_buffer: int,
    ):
        super().__init__(
            resolution=resolution, empty=empty, max_unreadable=max_unreadable, shuffle_buffer=shuffle_buffer
        )
        self.shards, self.image, self.caption, self.field = list(shards), tuple(image), caption, field

    @classmethod
    def from_config(cls, config: WebDatasetConfig, runtime: Runtime) -> WebDataset:
        """Finds the tar files, without opening them. Raises FileNotFoundError if one is missing."""
        return cls(
            [path for pattern in config.shards for path in find_shards(pattern)],
            image=config.image,
            caption=config.caption,
            field=config.caption_field,
            resolution=config.sizes,
            empty=config.empty,
            max_unreadable=config.max_unreadable,
            shuffle_buffer=config.shuffle_buffer,
        )

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def read(self, shard: int) -> Iterator[Record]:
        path = self.shards[shard]
        suffixes = {self.caption, *self.image}
        stem, files, problem = "", {}, ""
        try:
            with tarfile.open(path, "r|*", tarinfo=_Member) as tar:
                for member in tar:
                    member_path = PurePosixPath(member.name)
                    if not member.isfile() or member_path.name.startswith("."):
                        continue
                    name, _, suffix = member_path.name.partition(".")
                    key = str(member_path.with_name(name))
                    if files and key != stem:
                        yield self._record(path, stem, files, problem)
                        files, problem = {}, ""
                    stem, suffix = key, suffix.lower()
                    if suffix in suffixes and member.size > MAX_BYTES:
                        problem = f"its .{suffix} has {member.size} bytes, more than the limit of {MAX_BYTES} bytes"
                    file = tar.extractfile(member) if suffix in suffixes and not problem else None
                    files[suffix] = file.read() if file is not None else b""
        except Exception as error:  # damaged files make tarfile raise TypeError, zlib.error and others
            self.unreadable.note(f"the rest of {path}", error)
            files = {}
        if files:
            yield self._record(path, stem, files, problem)

    def _record(self, path: Path, stem: str, files: dict[str, bytes], problem: str) -> Record:
        name = f"{stem} in {path}"
        if problem:
            return Record(name, problem=problem)
        if self.caption not in files:
            return Record(name, problem=f"the item has no .{self.caption}; available: {', '.join(sorted(files))}")
        image = next((files[suffix] for suffix in self.image if suffix in files), None)
        try:
            text = files[self.caption].decode("utf-8-sig")
            if self.field is not None:
                text = json.loads(text)[self.field] or ""
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            expected = f"JSON with '{self.field}'" if self.field else "text"
            return Record(name, problem=f"its .{self.caption} is not {expected} ({type(error).__name__}: {error})")
        if not isinstance(text, str):
            return Record(name, problem=f"'{self.field}' must be a string, got {text!r:.60}")
        try:
            return Record(name, check_text(text, f"its .{self.caption}").strip(), image)
        except ValueError as error:
            return Record(name, problem=str(error))
