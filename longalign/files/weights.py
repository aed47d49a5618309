"""Writes tensor files with a checksum, and reads them without executing code from the file."""

from __future__ import annotations

import json
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

from longalign.files.atomic import atomic_write
from longalign.hub import download_problem

#: metadata key of the checksum of a file's tensors
CHECKSUM = "checksum"


@contextmanager
def reading(what: str | Path, advice: str = "download or copy it again") -> Iterator[None]:
    """Context manager: inside, an error of torch or safetensors about an unreadable file becomes a ValueError.

    torch's advice to allow a pickle to run code is omitted from the message. Other errors are not changed.

    Args:
        what: name of the file, at the start of the message.
        advice: what the user can do, at the end of the message.
    """
    try:
        yield
    except (UnpicklingError, EOFError, SafetensorError, zipfile.BadZipFile, json.JSONDecodeError, KeyError) as error:
        raise ValueError(_unreadable(what, error, advice)) from None
    except RuntimeError as error:
        if not re.search("PytorchStreamReader|mmap can only|zip archive|storage|file in archive", str(error)):
            raise  # an error of the model, not of its file
        raise ValueError(_unreadable(what, error, advice)) from None


def _unreadable(what: str | Path, error: Exception, advice: str) -> str:
    global_name = re.search(r"GLOBAL ([\w.]+)", str(error))
    if global_name:
        return (
            f"{what} contains '{global_name[1]}'; expected only tensors and plain values, since unpickling anything "
            "else can run arbitrary code. Use a .safetensors file"
        )
    reason = str(error).strip().split("\n")[0] if not isinstance(error, UnpicklingError) else "not a pickle of tensors"
    return f"{what} is damaged or does not contain tensors ({type(error).__name__}: {reason}); {advice}"


def load_pickle(path: str | Path, checked: bool = False) -> Any:
    """Loads tensors and plain values from a ``torch.save`` file to the CPU, without executing code in the file.

    Args:
        path: path of the file.
        checked: whether to verify the checksums in the file, which torch does not do, and to memory-map the tensors.
            The file must then have torch's zip format.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is damaged, or contains anything but tensors and plain values. The message contains the
            path.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}; check the path")
    try:
        if checked:
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():
                    raise EOFError(f"the checksum of its entry {bad} does not match the content")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=checked)
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        if isinstance(error, OSError) and error.errno != EINVAL:  # torch raises EINVAL for truncated files
            raise
        raise ValueError(_unreadable(path, error, "download or copy it again")) from None


def load_pretrained(
    model_class: Any, checkpoint: str | None, *, subfolder: str = "", hint: str = "", **options: Any
) -> Any:
    """Loads a transformers model and returns it, after checking that no weight is missing.

    Args:
        model_class: transformers class with ``from_pretrained``.
        checkpoint: Hub id or local folder; None if ``options`` contains ``config`` and ``state_dict``.
        subfolder: subfolder of the checkpoint; empty for its top level.
        hint: what else the user may check; part of the message if there is no such model.
        **options: further arguments of ``from_pretrained``.

    Raises:
        ValueError: if there is no such model, its files are damaged, or weights are missing.
    """
    location = f"'{checkpoint}'" + (f", subfolder '{subfolder}'" if subfolder else "")
    try:
        with reading(f"a file of weights in {location}"):
            model, info = model_class.from_pretrained(
                checkpoint, subfolder=subfolder, output_loading_info=True, **options
            )
    except OSError as error:
        reason = error if Path(str(checkpoint)).exists() else download_problem(error)
        raise ValueError(
            f"no {model_class.__name__} in {location}; expected a Hub id or a folder with config.json and weights"
            f"{hint}: {reason}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        name = type(model).__name__
        raise ValueError(
            f"{location if checkpoint else 'the file'} is not a complete {name}: {len(missing)} weights are missing, "
            f"e.g. '{missing[0]}'; use a checkpoint saved from {name}"
        )
    return model


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Loads the tensors of a safetensors file to the CPU: name -> tensor.

    Verifies the checksum that `save_tensors` writes, if the file has one.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is damaged or the checksum differs. The message contains the path.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}; check the path")
    with reading(path), safe_open(path, "pt") as file:
        expected = (file.metadata() or {}).get(CHECKSUM)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if expected is not None and expected != checksum(tensors):
        raise ValueError(f"{path} is damaged: the checksum of its tensors does not match; download or copy it again")
    return tensors


def save_pickle(path: str | Path, value: Any) -> None:
    """Writes a value with ``torch.save`` atomically: an existing file is replaced only after the new one is complete.

    Raises:
        OSError: if the file cannot be written, e.g. on a full disk, for which torch itself raises RuntimeError.
    """
    with atomic_write(Path(path)) as unfinished:
        torch.save(value, unfinished)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file with a checksum of the tensors in its metadata.

    Args:
        path: path of the file. An existing file is replaced only after the new one is complete.
        tensors: name -> contiguous CPU tensor.
        metadata: further metadata; None: none.

    Raises:
        OSError: if the file cannot be written; the unfinished file is removed.
    """
    with atomic_write(path) as unfinished:
        unfinished.touch()
        mode = unfinished.stat().st_mode  # safetensors writes with owner-only permissions
        save_file(dict(tensors), unfinished, {**(metadata or {}), CHECKSUM: checksum(tensors)})
        unfinished.chmod(mode)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Returns the CRC-32 of tensors as text: ``crc32:`` and eight hexadecimal digits; see `crc`."""
    return f"crc32:{crc(tensors):08x}"


def crc(tensors: Mapping[str, Tensor]) -> int:
    """Returns the CRC-32 of CPU tensors, sorted by name, over their names, dtypes, shapes and contents."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode(), value)
        value = zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data, value)
    return value
