"""Tensor store on disk, addressed by a hash of the content that the tensors were made from."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from longalign.files.atomic import atomic_write
from longalign.files.weights import crc, reading, save_tensors

IDENTITY = "identity.json"
FORMAT = 3
SHARD_BYTES = 256 * 2**20
KEY_BYTES = 16
MAX_OPEN_SHARDS = 128
#: what to do about a damaged cache file
REPAIR_ADVICE = "remove it and run: longalign cache CONFIG"


def key_of(content: bytes | str) -> bytes:
    """Returns the key of an entry made from ``content``: the content's 16-byte BLAKE2b hash (RFC 7693)."""
    return blake2b(content.encode() if isinstance(content, str) else content, digest_size=KEY_BYTES).digest()


class StaleCache(ValueError):
    """Raised if a cache was made with other settings than the requested ones."""


class Store:
    """A folder of entries, each looked up by a 16-byte key, and the settings that the entries depend on.

    An entry maps names to tensors ``(k, ...)``. Only k may differ between entries; the remaining shape, the dtype and
    the names are equal. Entries are written in safetensors files, called shards. A shard of m entries contains, for
    each name, the concatenated tensors and ``<name>.starts`` ``(m + 1,)``, the bounds of the entries; furthermore
    ``keys`` ``(m, 16)`` and ``checks`` ``(m,)``, the CRC-32 of each entry.

    Args:
        folder: folder of the store; created if ``writable``.
        identity: settings that the entries depend on, as plain JSON values. A new store saves them; an existing one
            must have been made with equal settings.
        writable: whether entries will be added.
        shard_bytes: number of bytes of added entries at which these are written as a shard.
        rank: rank of this process among the concurrent writers, which write separate shards. Shard numbers are unique
            only if every writer opens the folder before any of them writes.
        processes: number of concurrent writers.

    Raises:
        StaleCache: if the store was made with a different ``identity``; the message lists the differences.
        FileNotFoundError: if the folder has no store and ``writable`` is False.
        ValueError: if a file of the store is damaged.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        writable: bool = False,
        shard_bytes: int = SHARD_BYTES,
        rank: int = 0,
        processes: int = 1,
    ):
        self.folder, self.identity, self.shard_bytes, self.processes = folder, identity, shard_bytes, processes
        self._check_identity({"format": FORMAT, **json.loads(json.dumps(identity))}, writable)
        self._shards: list[Path] = sorted(folder.glob("[0-9]*.safetensors"))
        self._number = rank + (1 + int(self._shards[-1].stem) if self._shards else 0)
        self._locations: dict[bytes, tuple[int, int]] = {}
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._pending: dict[bytes, Mapping[str, Tensor]] = {}
        self._pending_bytes = 0
        for number in range(len(self._shards)):
            self._index(number)

    def reopened(self) -> Store:
        """Opens this folder again and returns a read-only store with the entries that all writers have written."""
        return Store(self.folder, self.identity)

    def _check_identity(self, identity: dict[str, Any], writable: bool) -> None:
        path = self.folder / IDENTITY
        if not path.is_file():
            if not writable:
                raise FileNotFoundError(f"no cache in {self.folder}; create it with: longalign cache CONFIG")
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as unfinished:
                unfinished.write_text(json.dumps(identity, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            advice = f"remove the folder {self.folder} and run: longalign cache CONFIG"
            raise ValueError(f"{path} is damaged ({error}); {advice}") from error
        if differing := list(_differences("", stored, identity)):
            raise StaleCache(
                f"the cache {self.folder} was made with different settings:\n"
                + "\n".join(f"  {key}: {old!r} in the cache, {new!r} now" for key, old, new in differing)
                + "\nRestore these settings, set a different cache.folder, or remove this cache and run: "
                "longalign cache CONFIG"
            )

    def _index(self, number: int) -> None:
        with reading(self._shards[number], REPAIR_ADVICE):
            raw = self._open_shard(number).get_tensor("keys").numpy().tobytes()
        for row in range(len(raw) // KEY_BYTES):
            self._locations.setdefault(raw[row * KEY_BYTES : (row + 1) * KEY_BYTES], (number, row))

    def _open_shard(self, number: int) -> Any:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        with reading(self._shards[number], REPAIR_ADVICE):
            self._open[number] = safe_open(self._shards[number], "pt")
        if len(self._open) > MAX_OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[number]

    def __len__(self) -> int:
        return len(self._locations) + len(self._pending)

    def __contains__(self, key: object) -> bool:
        return key in self._locations or key in self._pending

    def __iter__(self) -> Iterator[bytes]:
        yield from self._locations
        yield from self._pending

    def __getitem__(self, key: bytes) -> dict[str, Tensor]:
        """Reads an entry from disk.

        Raises:
            KeyError: if no written entry has this key; added entries can be read after `flush`.
            ValueError: if the file of the entry is damaged.
        """
        number, row = self._locations[key]
        file = self._open_shard(number)
        out = {}
        with reading(self._shards[number], REPAIR_ADVICE):
            for name in (name for name in file.keys() if f"{name}.starts" in file.keys()):  # noqa: SIM118
                start, stop = file.get_slice(f"{name}.starts")[row : row + 2].tolist()
                out[name] = file.get_slice(name)[start:stop]
            if file.get_slice("checks")[row : row + 1].tolist() != [crc(out)]:
                raise EOFError(f"the checksum of entry {row} differs")
        return out

    def add(self, key: bytes, entry: Mapping[str, Tensor]) -> None:
        """Adds an entry, unless the store has one with this key.

        Added entries are written to disk when together they have at least ``shard_bytes`` bytes, or by `flush`.
        """
        if key in self:
            return
        self._pending[key] = {name: tensor.detach().cpu() for name, tensor in entry.items()}
        self._pending_bytes += sum(tensor.nbytes for tensor in entry.values())
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes the added entries that are not on disk yet as a shard.

        Raises:
            ValueError: if the tensors of one name differ in dtype, or in shape after the first dimension.
        """
        if not self._pending:
            return
        keys, entries = list(self._pending), list(self._pending.values())
        tensors = {"keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), KEY_BYTES)}
        for name in entries[0]:
            parts = [entry[name] for entry in entries]
            if len(shapes := {(part.shape[1:], part.dtype) for part in parts}) > 1:
                shown = " and ".join(sorted(f"{list(shape)} {dtype}" for shape, dtype in shapes))
                raise ValueError(
                    f"expected '{name}' with one dtype and, after the first dimension, one shape in all entries, got "
                    f"{shown}; add entries that agree"
                )
            tensors[name] = torch.cat(parts).contiguous()
            tensors[f"{name}.starts"] = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
        tensors["checks"] = torch.tensor([crc(entry) for entry in entries], dtype=torch.int64)
        path = self.folder / f"{self._number:06d}.safetensors"
        save_tensors(path, tensors)
        self._shards.append(path)
        self._number += self.processes
        self._pending, self._pending_bytes = {}, 0
        self._index(len(self._shards) - 1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # open files cannot be pickled


def _differences(path: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(f"{path}.{key}" if path else key, old.get(key), new.get(key))
    elif old != new and not (path.startswith("weights.") and None in (old, new)):  # None: unknown
        yield path, old, new
