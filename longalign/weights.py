"""Files of tensors: written whole or not at all, and read without running anything that is in them."""

from __future__ import annotations

import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from errno import EINVAL
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

#: key of the metadata that holds the checksum of the tensors
CHECKSUM = "checksum"


@contextmanager
def reading(what: str | Path, advice: str = "get it again") -> Iterator[None]:
    """Inside, libraries' errors about damaged or foreign files become a ValueError that names ``what``.

    Their own text never reaches the user where it advises to allow a pickle to run code.
    """
    try:
        yield
    except (UnpicklingError, EOFError, SafetensorError, zipfile.BadZipFile, json.JSONDecodeError, KeyError) as error:
        raise ValueError(_unreadable(what, error, advice)) from None
    except RuntimeError as error:
        if not re.search("PytorchStreamReader|mmap can only|zip archive|storage|file in archive", str(error)):
            raise  # of the model, not of its file
        raise ValueError(_unreadable(what, error, advice)) from None


def _unreadable(what: str | Path, error: Exception, advice: str) -> str:
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named:
        return (
            f"{what} is not read: it holds '{named[1]}', and a pickle of more than tensors and plain values can run "
            "any code; expected the tensors alone, best as .safetensors"
        )
    reason = str(error).strip().split("\n")[0] if not isinstance(error, UnpicklingError) else "not a pickle of tensors"
    return f"{what} is damaged, or holds something else than tensors ({type(error).__name__}: {reason}); {advice}"


def load_pickle(path: str | Path, checked: bool = False) -> Any:
    """The tensors and plain values in a file that ``torch.save`` wrote, on the CPU; nothing in it is run.

    Args:
        path: of the file.
        checked: compares the checksums in the file, which torch does not, and leaves tensors on the disk until they
            are used.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: naming the file, if it is damaged or holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        if checked:
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():
                    raise EOFError(f"the checksum of {bad} differs")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=checked)
    except MemoryError:
        raise
    except Exception as error:  # a pickle that is cut or changed can raise anything
        if isinstance(error, OSError) and error.errno != EINVAL:  # which torch gives for a file that is cut
            raise
        raise ValueError(_unreadable(path, error, "get it again")) from None


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, compared with the checksum that `save_tensors` left in it.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: naming the file, if it is damaged or its tensors are not those that were written.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    with reading(path), safe_open(path, "pt") as file:
        expected = (file.metadata() or {}).get(CHECKSUM)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if expected is not None and expected != checksum(tensors):
        raise ValueError(f"{path} is damaged: its tensors are not those that were written into it; get it again")
    return tensors


def save_pickle(path: str | Path, value: Any) -> None:
    """Writes a value with ``torch.save``; the file has its name only when all of it is on the disk.

    Raises:
        OSError: if it cannot be written, such as on a full disk, which torch reports as a RuntimeError.
    """
    with writing(Path(path)) as unfinished:
        torch.save(value, unfinished)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file with a checksum. It has its name only when all of it is on the disk.

    Its permissions are those of any new file. What is left of a failed attempt is removed.

    Args:
        path: of the file; one that is there is replaced.
        tensors: contiguous, on the CPU.
        metadata: added to it.
    """
    with writing(path) as unfinished:
        unfinished.touch()
        mode = unfinished.stat().st_mode  # safetensors makes a file that is its owner's alone
        save_file(dict(tensors), unfinished, {**(metadata or {}), CHECKSUM: checksum(tensors)})
        unfinished.chmod(mode)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Gives a path beside ``path`` to write to; the file gets its name when all of it is on the disk."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        flush(unfinished)
        unfinished.replace(path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, (SafetensorError, RuntimeError)):  # how libraries tell of a full disk
            raise OSError(f"cannot write {path}: {str(error).strip()}") from error
        raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Returns when a file, or the names in a folder, would survive a power cut."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """`crc` as text."""
    return f"crc32:{crc(tensors):08x}"


def crc(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of names, dtypes, shapes and contents; 4 GB/s on one core."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode(), value)
        value = zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data, value)
    return value
