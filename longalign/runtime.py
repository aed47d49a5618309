"""What a part needs to know about the machine it runs on; importing this module does not import torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib import resources
from pathlib import Path
from typing import Any

DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _alone(tensor: Any) -> Any:
    return tensor


@dataclass(frozen=True)
class Runtime:
    """Where parts are built and how processes talk.

    Attributes:
        device: a torch device string, e.g. ``"cuda"``.
        dtype: the dtype of frozen modules: ``"float32"``, ``"bfloat16"`` or ``"float16"``. Whatever is trained
            stays in float32.
        gather: takes a tensor ``(b, ...)`` of this process and returns ``(b * processes, ...)`` of all of them,
            without gradient, the processes in order. Alone it is the identity.
        rank: number of this process.
        processes: how many there are.
    """

    device: str = "cpu"
    dtype: str = "float32"
    gather: Callable[[Any], Any] = _alone
    rank: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES.values():
            raise ValueError(f"dtype must be one of {', '.join(DTYPES.values())}, not {self.dtype!r}")

    @classmethod
    def detect(cls, precision: str = "no", device: str | None = None) -> Runtime:
        """This machine's device, with the dtype of a ``loop.precision``. Imports torch.

        Args:
            precision: a ``loop.precision``.
            device: a torch device; if None, CUDA where available, else Apple's MPS, else the CPU. A numbered GPU
                becomes the current one, on which training runs too.

        Raises:
            ValueError: if the device is not available.
        """
        import torch

        if device is None:
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        else:
            _check_device(device)
        return cls(device, DTYPES[precision])

    def with_dtype(self, dtype: str | None) -> Runtime:
        """The same with another dtype; itself if None."""
        return self if dtype is None else replace(self, dtype=dtype)

    @property
    def torch_dtype(self) -> Any:
        """The torch dtype of ``dtype``. Imports torch."""
        import torch

        return getattr(torch, self.dtype)


def devices() -> list[str]:
    """The names of this machine's devices. Imports torch."""
    import torch

    mps = ["mps"] if torch.backends.mps.is_available() else []
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *mps]


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises each of them
        first = str(error).partition("\n")[0]
        raise ValueError(
            f"expected an available device, got '{device}'; available: {', '.join(devices())} ({first})"
        ) from error
    if torch.device(device).type == "cuda" and ":" in device:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(f"expected 'cuda' for several processes, each of which takes its own GPU, got '{device}'")
        torch.cuda.set_device(device)


@contextmanager
def distributed_runtime(precision: str = "no", device: str | None = None) -> Iterator[Runtime]:
    """Inside, this process is one of those that ``torchrun`` or ``accelerate launch`` started, and talks to them.

    A process that was started alone gets what `Runtime.detect` gives. Of a machine's GPUs each takes its own. What is
    gathered goes through the CPU (gloo), and waits for the slowest process for up to a week.

    Args:
        precision: a ``loop.precision``.
        device: as for `Runtime.detect`.
    """
    runtime = Runtime.detect(precision, device)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes == 1 or "LOCAL_RANK" not in os.environ:
        yield runtime
        return
    import torch
    from torch import distributed

    def gather(tensor: Any) -> Any:
        own = tensor.detach().cpu().contiguous()
        parts = [torch.empty_like(own) for _ in range(processes)]
        distributed.all_gather(parts, own)
        return torch.cat(parts).to(tensor.device)

    distributed.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        device = f"cuda:{os.environ['LOCAL_RANK']}" if runtime.device == "cuda" else runtime.device
        yield replace(runtime, device=device, gather=gather, rank=distributed.get_rank(), processes=processes)
    finally:
        distributed.destroy_process_group()


def examples_folder() -> Path:
    """The folder of the example configs: in the installed package, or beside it in a checkout of the repository.

    Raises:
        ValueError: if neither is there.
    """
    package = Path(str(resources.files("longalign")))
    folders = [package / "examples", package.parent / "examples"]
    for folder in folders:
        if (folder / "mini-align.yaml").is_file():
            return folder
    raise ValueError(f"expected the example configs in {folders[0]} or {folders[1]}; install longalign again")


def resolve_checkpoint(checkpoint: str) -> str:
    """Turns ``mini`` or ``mini/<folder>`` into the folder of the bundled small weights; returns others as they are.

    An existing local path of the same name wins, so nothing that a user has on disk is hidden.

    Raises:
        ValueError: if there are no bundled weights of that name.
    """
    if checkpoint.split("/")[0] != "mini" or Path(checkpoint).exists():
        return checkpoint
    weights = Path(str(resources.files("longalign.mini"))) / "weights"
    folder = weights / checkpoint.removeprefix("mini").lstrip("/")
    if not folder.is_dir():
        names = sorted(p.name for p in weights.iterdir() if p.is_dir()) if weights.is_dir() else []
        raise ValueError(f"no bundled weights '{checkpoint}'; expected 'mini' or 'mini/<folder>' with one of {names}")
    return str(folder)
