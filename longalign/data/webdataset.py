"""Shards in webdataset's layout: tar files in which files of one stem belong together."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from longalign.data.configs import WebDatasetConfig
from longalign.data.lines import find_shards
from longalign.data.stream import Record, Stream
from longalign.runtime import Runtime
from longalign.segment import check_text

#: most bytes of an image or caption, and of a member's header, which a few compressed bytes can claim to be
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
    """A member whose header is read only if it is of a usual size: tarfile would take it into memory at once."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in HEADERS and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes, more than the limit of {MAX_HEADER_BYTES}")
        return super()._proc_member(tar)  # type: ignore[misc]


class WebDataset(Stream):
    """Captioned images in tar files, plain or compressed, read from front to back.

    Args:
        shards: the tar files.
        image: endings that an image may have, of which an item's first one is taken.
        caption: ending of the caption's file.
        field: key of the caption in a JSON file, or None for a file of text.
        **settings: of `Stream`.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        image: Sequence[str] = ("jpg", "jpeg", "png", "webp"),
        caption: str = "txt",
        field: str | None = None,
        **settings: int | str,
    ):
        super().__init__(**settings)  # pyright: ignore[reportArgumentType]
        self.shards, self.image, self.caption, self.field = list(shards), tuple(image), caption, field

    @classmethod
    def from_config(cls, config: WebDatasetConfig, runtime: Runtime) -> WebDataset:
        """Finds the shards. Raises FileNotFoundError for those that are not there."""
        shards = [path for given in config.shards for path in find_shards(given)]
        keys = ("resolution", "empty", "max_unreadable", "shuffle_buffer")
        settings = {key: getattr(config, key) for key in keys}
        return cls(shards, config.image, config.caption, config.caption_field, **settings)

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def read(self, shard: int) -> Iterator[Record]:
        path = self.shards[shard]
        wanted = {self.caption, *self.image}
        stem, parts, problem = "", {}, ""
        try:
            with tarfile.open(path, "r|*", tarinfo=_Member) as tar:
                for member in tar:
                    place = PurePosixPath(member.name)
                    if not member.isfile() or place.name.startswith("."):
                        continue
                    name, _, ending = place.name.partition(".")
                    key = str(place.with_name(name))
                    if parts and key != stem:
                        yield self._record(path, stem, parts, problem)
                        parts, problem = {}, ""
                    stem, ending = key, ending.lower()
                    if ending in wanted and member.size > MAX_BYTES:
                        problem = f"its .{ending} has {member.size} bytes, more than the limit of {MAX_BYTES}"
                    file = tar.extractfile(member) if ending in wanted and not problem else None
                    parts[ending] = file.read() if file is not None else b""
        except Exception as error:  # on damaged files tarfile raises TypeError, zlib.error and others beside its own
            self.unreadable.note(f"the rest of {path}", error)
            parts = {}
        if parts:
            yield self._record(path, stem, parts, problem)

    def _record(self, path: Path, stem: str, parts: dict[str, bytes], problem: str) -> Record:
        name = f"{stem} in {path}"
        if problem:
            return Record(name, problem=problem)
        if self.caption not in parts:
            return Record(name, problem=f"it has no .{self.caption}; there is {', '.join(sorted(parts))}")
        image = next((parts[ending] for ending in self.image if ending in parts), None)
        try:
            text = parts[self.caption].decode("utf-8-sig")
            if self.field is not None:
                text = json.loads(text)[self.field] or ""
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            what = f" with '{self.field}'" if self.field else ""
            return Record(name, problem=f"its .{self.caption} is not a text{what} ({type(error).__name__}: {error})")
        if not isinstance(text, str):
            return Record(name, problem=f"'{self.field}' must be a text, got {text!r:.60}")
        try:
            return Record(name, check_text(text, f"its .{self.caption}").strip(), image)
        except ValueError as error:
            return Record(name, problem=str(error))
