"""Device, dtype and processes of a program, and the folders of bundled weights and examples.

Importing this module does not import torch.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib import resources
from pathlib import Path
from typing import Any

__all__ = ["Runtime", "resolve_checkpoint"]

DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _identity(tensor: Any) -> Any:
    return tensor


@dataclass(frozen=True)
class Runtime:
    """Device and dtype with which models are built, and communication between the processes of distributed training.

    Attributes:
        device: a torch device string, e.g. ``"cuda"``.
        dtype: the dtype of frozen modules: ``"float32"``, ``"bfloat16"`` or ``"float16"``. Trainable parameters
            are always float32.
        gather: maps this process's tensor ``(b, ...)`` to the tensors of all processes ``(b * world_size, ...)``,
            in rank order and without gradient. With a single process, it returns its argument.
        rank: index of this process, from 0.
        world_size: number of processes.

    Raises:
        ValueError: if ``dtype`` is not one of the three values.
    """

    device: str = "cpu"
    dtype: str = "float32"
    gather: Callable[[Any], Any] = _identity
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES.values():
            raise ValueError(f"dtype must be one of {', '.join(DTYPES.values())}, got {self.dtype!r}")

    @classmethod
    def detect(cls, precision: str = "no", device: str | None = None) -> Runtime:
        """Returns a runtime of one process on this machine. Imports torch.

        Args:
            precision: a value of the config key ``loop.precision``, which sets the dtype: ``"no"`` (float32),
                ``"bf16"`` or ``"fp16"``.
            device: a torch device. None selects CUDA if available, else Apple's MPS, else the CPU. A numbered GPU, such
                as ``"cuda:1"``, becomes torch's current CUDA device, so training runs on it too.

        Raises:
            ValueError: if the device is not available, or is a numbered GPU and there are several processes.
        """
        import torch

        if device is None:
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        else:
            _check_device(device)
        return cls(device, DTYPES[precision])

    def with_dtype(self, dtype: str | None) -> Runtime:
        """Returns a copy with a different dtype, or this runtime itself if ``dtype`` is None."""
        return self if dtype is None else replace(self, dtype=dtype)

    @property
    def torch_dtype(self) -> Any:
        """The attribute ``dtype`` as a ``torch.dtype``. Imports torch."""
        import torch

        return getattr(torch, self.dtype)


def devices() -> list[str]:
    """Returns the torch device strings of this machine, e.g. ``["cpu", "cuda:0"]``. Imports torch."""
    import torch

    mps = ["mps"] if torch.backends.mps.is_available() else []
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *mps]


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises each of them
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"expected an available device, got '{device}'; available: {', '.join(devices())} ({reason})"
        ) from error
    if torch.device(device).type == "cuda" and ":" in device:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"expected 'cuda' with several processes, got '{device}'; pass 'cuda', each process selects its own GPU"
            )
        torch.cuda.set_device(device)


@contextmanager
def distributed_runtime(precision: str = "no", device: str | None = None) -> Iterator[Runtime]:
    """Context manager that yields a runtime for the processes started by ``torchrun`` or ``accelerate launch``.

    Each process uses the GPU of its local rank. Tensors are gathered on the CPU (gloo); a process waits at most one
    week for the others. Without a launcher, the runtime is that of `Runtime.detect`.

    Args:
        precision: a value of the config key ``loop.precision``: ``"no"``, ``"bf16"`` or ``"fp16"``.
        device: a torch device; see `Runtime.detect`.

    Raises:
        ValueError: if the device is not available; see `Runtime.detect`.
    """
    runtime = Runtime.detect(precision, device)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 or "LOCAL_RANK" not in os.environ:
        yield runtime
        return
    import torch
    from torch import distributed

    def gather(tensor: Any) -> Any:
        local = tensor.detach().cpu().contiguous()
        gathered = [torch.empty_like(local) for _ in range(world_size)]
        distributed.all_gather(gathered, local)
        return torch.cat(gathered).to(tensor.device)

    distributed.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        device = f"cuda:{os.environ['LOCAL_RANK']}" if runtime.device == "cuda" else runtime.device
        yield replace(runtime, device=device, gather=gather, rank=distributed.get_rank(), world_size=world_size)
        distributed.barrier()  # a process that leaves early can abort another one
    finally:
        distributed.destroy_process_group()


def examples_folder() -> Path:
    """Returns the folder of the example configs, in the installed package or in a checkout of the repository.

    Raises:
        ValueError: if there are no example configs in either folder.
    """
    package = Path(str(resources.files("longalign")))
    folders = [package / "examples", package.parent / "examples"]
    for folder in folders:
        if (folder / "mini-align.yaml").is_file():
            return folder
    raise ValueError(f"expected the example configs in {folders[0]} or {folders[1]}; reinstall longalign")


def resolve_checkpoint(checkpoint: str) -> str:
    """Returns the local folder of bundled weights; returns all other checkpoints unchanged.

    The bundled weights are those of small models that are part of the package, named ``mini`` or ``mini/<folder>``. If
    ``checkpoint`` is also an existing local path, it is returned unchanged.

    Raises:
        ValueError: if the name starts with ``mini``, but no bundled weights have that name.
    """
    if checkpoint.split("/")[0] != "mini" or Path(checkpoint).exists():
        return checkpoint
    weights = Path(str(resources.files("longalign.mini"))) / "weights"
    folder = weights / checkpoint.removeprefix("mini").lstrip("/")
    if not folder.is_dir():
        names = sorted(p.name for p in weights.iterdir() if p.is_dir()) if weights.is_dir() else []
        raise ValueError(f"no bundled weights '{checkpoint}'; expected 'mini' or 'mini/<folder>' with one of {names}")
    return str(folder)


def processor() -> str:
    """Returns the model name of this machine's CPU, or its architecture if the model is unknown."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
