"""Tensors under the key of what they were computed from, in shards of safetensors that are read by memory map."""

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

from longalign.weights import crc, reading, save_tensors, writing

IDENTITY = "identity.json"
FORMAT = 2
SHARD_BYTES = 256 * 2**20
KEY_BYTES = 16
OPEN_SHARDS = 128
#: how a damaged file of a cache is put right
ADVICE = "remove it and run: longalign cache CONFIG"


def key_of(content: bytes | str) -> bytes:
    """The key of a text or of bytes: 16 bytes of their BLAKE2b hash (RFC 7693)."""
    return blake2b(content.encode() if isinstance(content, str) else content, digest_size=KEY_BYTES).digest()


class StaleCache(ValueError):
    """A cache was made from something else than what is asked for."""


class Store:
    """A folder of shards, each complete when it has its name, and the identity of what they were computed with.

    An entry is a mapping of names to tensors ``(k, ...)``; k may differ between entries, the rest of the shape, the
    dtype and the names may not. A shard holds the entries' tensors one after the other, ``<name>.starts`` (where each
    begins), ``keys`` ``(m, 16)`` and ``checks`` ``(m,)``, the CRC-32 of each entry.

    Args:
        folder: where it is; made if ``writes``.
        identity: settings that the entries depend on, as plain JSON values.
        writes: whether entries will be added.
        shard_bytes: size at which a shard is written.
        rank: number of this process among those that add entries at the same time, each shards of its own. They agree
            on the shards' numbers if none writes before all have opened the folder.
        processes: how many there are.

    Raises:
        StaleCache: if the folder has another identity; the message lists what differs.
        FileNotFoundError: if there is none and ``writes`` is False.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        writes: bool = False,
        shard_bytes: int = SHARD_BYTES,
        rank: int = 0,
        processes: int = 1,
    ):
        self.folder, self.shard_bytes, self.processes = folder, shard_bytes, processes
        self._claim({"format": FORMAT, **json.loads(json.dumps(identity))}, writes)
        self._shards: list[Path] = sorted(folder.glob("[0-9]*.safetensors"))
        self._number = rank + (1 + int(self._shards[-1].stem) if self._shards else 0)
        self._places: dict[bytes, tuple[int, int]] = {}
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._pending: dict[bytes, Mapping[str, Tensor]] = {}
        self._pending_bytes = 0
        for number in range(len(self._shards)):
            self._index(number)

    def _claim(self, identity: dict[str, Any], writes: bool) -> None:
        path = self.folder / IDENTITY
        if not path.is_file():
            if not writes:
                raise FileNotFoundError(f"there is no cache in {self.folder}; make it with: longalign cache CONFIG")
            self.folder.mkdir(parents=True, exist_ok=True)
            with writing(path) as unfinished:
                unfinished.write_text(json.dumps(identity, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            advice = f"remove the folder {self.folder} and run: longalign cache CONFIG"
            raise ValueError(f"{path} is damaged ({error}); {advice}") from error
        if differing := list(_differences("", found, identity)):
            raise StaleCache(
                f"the cache {self.folder} was made with other settings:\n"
                + "\n".join(f"  {key}: {old!r} in the cache, {new!r} now" for key, old, new in differing)
                + "\nChange these back, choose another cache.folder, or remove this one and run: longalign cache CONFIG"
            )

    def _index(self, number: int) -> None:
        with reading(self._shards[number], ADVICE):
            raw = self._file(number).get_tensor("keys").numpy().tobytes()
        for row in range(len(raw) // KEY_BYTES):
            self._places.setdefault(raw[row * KEY_BYTES : (row + 1) * KEY_BYTES], (number, row))

    def _file(self, number: int) -> Any:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        with reading(self._shards[number], ADVICE):
            self._open[number] = safe_open(self._shards[number], "pt")
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[number]

    def __len__(self) -> int:
        return len(self._places) + len(self._pending)

    def __contains__(self, key: object) -> bool:
        return key in self._places or key in self._pending

    def __iter__(self) -> Iterator[bytes]:
        yield from self._places
        yield from self._pending

    def __getitem__(self, key: bytes) -> dict[str, Tensor]:
        """A written entry, read from its shard. Raises ValueError if it is not what was written."""
        number, row = self._places[key]
        file = self._file(number)
        out = {}
        with reading(self._shards[number], ADVICE):
            for name in (name for name in file.keys() if f"{name}.starts" in file.keys()):  # noqa: SIM118
                start, stop = file.get_slice(f"{name}.starts")[row : row + 2].tolist()
                out[name] = file.get_slice(name)[start:stop]
            if file.get_slice("checks")[row : row + 1].tolist() != [crc(out)]:
                raise EOFError(f"the checksum of entry {row} differs")
        return out

    def add(self, key: bytes, entry: Mapping[str, Tensor]) -> None:
        """Adds an entry; it is on disk when its shard is full or after `flush`."""
        if key in self:
            return
        self._pending[key] = {name: tensor.detach().cpu() for name, tensor in entry.items()}
        self._pending_bytes += sum(tensor.nbytes for tensor in entry.values())
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes what has been added since the last shard."""
        if not self._pending:
            return
        keys, entries = list(self._pending), list(self._pending.values())
        tensors = {"keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(len(keys), KEY_BYTES)}
        for name in entries[0]:
            parts = [entry[name] for entry in entries]
            if len(shapes := {(part.shape[1:], part.dtype) for part in parts}) > 1:
                raise ValueError(f"expected '{name}' of one shape and dtype in a cache, got {shapes}")
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
        return {**self.__dict__, "_open": OrderedDict()}  # open files cannot be sent to another process


def _differences(path: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(f"{path}.{key}" if path else key, old.get(key), new.get(key))
    elif old != new and not (path.startswith("weights.") and None in (old, new)):  # None: it cannot be told
        yield path, old, new
