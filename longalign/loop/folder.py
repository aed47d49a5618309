"""Writes checkpoint folders of a run atomically, removes old ones, and recovers them after a killed process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longalign.files.atomic import sync
from longalign.files.paths import BEST, PREFIX, best_checkpoint, checkpoints, step_of


def recover(output: Path) -> None:
    """Cleans up a run's folder ``output`` after a process was killed while writing or removing a checkpoint there."""
    for path in output.glob(f".{PREFIX}*.replaced"):
        final = output / path.name.removeprefix(".").removesuffix(".replaced")
        if final.exists():
            shutil.rmtree(path)
        else:
            path.rename(final)
    for suffix in ("unfinished", "removed"):
        for path in output.glob(f".{PREFIX}*.{suffix}"):
            shutil.rmtree(path)


@contextmanager
def new_checkpoint(output: Path, step: int) -> Iterator[tuple[Path, Path]]:
    """Context manager: yields a temporary folder for the files of a checkpoint, and the path to `publish` it at.

    Args:
        output: the run's folder.
        step: number of completed optimizer steps, which is part of the checkpoint's name.

    Raises:
        OSError: if writing inside the context fails. The temporary folder is then removed, and the message names the
            checkpoint to resume from.
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
            f"the checkpoint of step {step} cannot be written into {output}: {reason}. Free disk space, or lower "
            f"loop.keep; {resume_hint(output)}"
        ) from error


def publish(unfinished: Path, final: Path, keep: int | None, is_best: bool = False) -> None:
    """Renames a complete checkpoint to its final name, and removes old checkpoints with `prune`.

    If the process is killed at any point, a complete checkpoint remains; `recover` may have to restore its name.

    Args:
        unfinished: temporary folder with all files of the checkpoint; see `new_checkpoint`.
        final: path of the checkpoint; a former checkpoint at this path is replaced.
        keep: number of newest checkpoints to keep; None keeps all.
        is_best: whether to call `mark_best`.
    """
    for path in (*unfinished.rglob("*"), unfinished):
        sync(path)
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        final.rename(replaced)
    unfinished.rename(final)
    sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)
    if is_best:
        mark_best(final)
    prune(final, keep)


def mark_best(checkpoint: Path) -> None:
    """Makes the symbolic link ``best`` in the run's folder point to a checkpoint, replacing a former link."""
    link = checkpoint.with_name(BEST)
    unfinished = link.with_name(f".{BEST}.unfinished")
    unfinished.unlink(missing_ok=True)
    unfinished.symlink_to(checkpoint.name)
    unfinished.replace(link)
    sync(link.parent)


def prune(checkpoint: Path, keep: int | None) -> None:
    """Removes old checkpoints of a run, except the one that the link ``best`` points to.

    Args:
        checkpoint: newest checkpoint to count; checkpoints of later steps are neither counted nor removed.
        keep: number of checkpoints to keep, the newest up to ``checkpoint``; None keeps all.
    """
    if keep is not None:
        candidates = [p for p in checkpoints(checkpoint.parent) if step_of(p) <= step_of(checkpoint)]
        best = best_checkpoint(checkpoint.parent)
        for old in candidates[:-keep]:
            if old == best:
                continue
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.removed")))


def resume_hint(output: Path) -> str:
    """Returns a text for messages: a run's last checkpoint and the command to resume from it, or that there is none."""
    saved = checkpoints(output)
    if not saved:
        return f"no checkpoint in {output} yet"
    return f"the last checkpoint is {saved[-1]}; to resume: longalign train {saved[-1]} --resume"
