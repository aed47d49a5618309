"""Writes checkpoint folders of a run atomically, rotates them, and recovers them after a killed process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from longalign.atomic import sync
from longalign.config.files import BEST, PREFIX, best_checkpoint, checkpoints, step_of


def recover(output: Path) -> None:
    """Cleans up after a process that was killed while it wrote, replaced or removed a checkpoint."""
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
    """Context manager: yields the temporary folder of a checkpoint, and the final path for `publish`.

    Raises:
        OSError: if writing fails. The message names the checkpoint to resume from, and the temporary folder is removed.
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
    """Renames a complete checkpoint to its final name, marks it if it is the best, and removes old ones with `prune`.

    A checkpoint's files are deleted only after it has been renamed. If the process is killed, the newest checkpoint is
    therefore complete, in some cases only after `recover`.
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
    """Makes the link `BEST` point to a checkpoint. The former link is replaced atomically."""
    link = checkpoint.with_name(BEST)
    unfinished = link.with_name(f".{BEST}.unfinished")
    unfinished.unlink(missing_ok=True)
    unfinished.symlink_to(checkpoint.name)
    unfinished.replace(link)
    sync(link.parent)


def prune(checkpoint: Path, keep: int | None) -> None:
    """Removes old checkpoints of a run, except the best one.

    Args:
        checkpoint: the last checkpoint to consider; checkpoints of later steps are kept.
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
    """Returns a hint on how to resume the run in a folder, for messages."""
    saved = checkpoints(output)
    if not saved:
        return f"no checkpoint in {output} yet"
    return f"the last checkpoint is {saved[-1]}; to resume: longalign train {saved[-1]} --resume"
