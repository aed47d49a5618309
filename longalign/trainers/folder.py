"""A run's folder: one process writes to it at a time, and each checkpoint in it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longalign.weights import flush

PREFIX = "checkpoint-"


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    return sorted((p for p in output.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdecimal()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(checkpoint.name.removeprefix(PREFIX))


def recover(output: Path) -> None:
    """Puts right what a process left that was killed while it wrote, replaced or removed a checkpoint."""
    for path in output.glob(f".{PREFIX}*.replaced"):
        final = output / path.name.removeprefix(".").removesuffix(".replaced")
        if final.exists():
            shutil.rmtree(path)
        else:
            path.rename(final)
    for ending in ("unfinished", "removed"):
        for path in output.glob(f".{PREFIX}*.{ending}"):
            shutil.rmtree(path)


@contextmanager
def new_checkpoint(output: Path, step: int) -> Iterator[tuple[Path, Path]]:
    """Gives the folder to write a checkpoint to, and the one that `publish` makes of it.

    Raises:
        OSError: if it cannot be written, with what is left to resume from. What was written of it is removed.
    """
    final = output / f"{PREFIX}{step:06d}"
    unfinished = output / f".{final.name}.unfinished"
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        yield unfinished, final
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = str(error).strip().split("\n")[0]
        raise OSError(
            f"the checkpoint of step {step} cannot be written into {output}: {reason}. Make room there, or lower "
            f"loop.keep; {resume_hint(output)}"
        ) from error


def publish(unfinished: Path, final: Path, keep: int | None) -> None:
    """Gives a complete checkpoint its name, and removes what `prune` does.

    At each moment the newest checkpoint is whole, or `recover` makes it so: what is replaced or removed loses its name
    before its files.
    """
    for path in (*unfinished.rglob("*"), unfinished):
        flush(path)
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        final.rename(replaced)
    unfinished.rename(final)
    flush(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
    prune(final, keep)


def prune(checkpoint: Path, keep: int | None) -> None:
    """Removes all checkpoints but the newest ``keep`` up to ``checkpoint``; none if ``keep`` is None."""
    if keep is not None:
        up_to = [p for p in checkpoints(checkpoint.parent) if step_of(p) <= step_of(checkpoint)]
        for old in up_to[:-keep]:
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.removed")))


def resume_hint(output: Path) -> str:
    """How to resume the run in a folder."""
    found = checkpoints(output)
    if not found:
        return f"there is no checkpoint in {output} yet"
    return f"the last checkpoint is {found[-1]}; to resume: longalign train {found[-1]} --resume"
