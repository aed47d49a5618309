"""Errors that end a run, with advice on what to change and how to resume."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longalign.config.run import RunConfig
from longalign.errors import RunError, is_out_of_memory
from longalign.loop.folder import resume_hint
from longalign.loop.optimization import NonFinite, Optimization

#: keys of trainer configs that save memory if they are lowered
MEMORY_KEYS = ("denoise_batch", "decode_batch", "replay_batch")


@contextmanager
def explain_non_finite(optimization: Optimization, output: Path, step: int) -> Iterator[None]:
    """Context manager: on `NonFinite`, saves the prompts of the last optimizer step and raises RunError.

    Args:
        optimization: holds the batches of the last optimizer step.
        output: the run's folder.
        step: number of that step, counted from 1, for the message.
    """
    try:
        yield
    except NonFinite as problem:
        path = save_failed_batch(output, optimization.accelerator.process_index, step, optimization.batches)
        raise RunError(
            f"{problem} at step {step}; the prompts of this step are in {path}. No checkpoint of it was written; "
            f"{resume_hint(output)}. Lower loop.lr or loop.clip, or change loop.precision"
        ) from None


@contextmanager
def explain_errors(config: RunConfig) -> Iterator[None]:
    """Context manager: raises out-of-memory errors and failures of data-loading workers as `RunError`.

    The message names the keys of ``config`` to change.
    """
    output = Path(config.output)
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise RunError(f"{_first_line(error)}\n{_memory_advice(config)}; {resume_hint(output)}") from error
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
            raise RunError(
                f"{_first_line(error)}. A data-loading worker was killed, often because memory ran out; lower "
                f"loop.workers (now {config.loop.workers}), or set it to 0 to see the original error; "
                f"{resume_hint(output)}"
            ) from error
        raise


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(". ") or type(error).__name__


def _memory_advice(config: RunConfig) -> str:
    loop = config.loop
    advice = []
    if loop.batch_size > 1:
        advice.append(
            f"lower loop.batch_size (now {loop.batch_size}) and raise loop.accumulation (now {loop.accumulation})"
        )
    if not loop.gradient_checkpointing:
        advice.append("set loop.gradient_checkpointing to true")
    for key in MEMORY_KEYS:
        value = getattr(config.trainer, key, 1)
        if value is None or value > 1:
            advice.append(f"set trainer.{key} to a small number (now {'null' if value is None else value})")
    if loop.precision == "no":
        advice.append("set loop.precision to bf16")
    if config.cache is None:
        advice.append("cache latents and text states on disk with 'cache'")
    return "out of memory. To reduce memory use: " + "; ".join(advice)


def save_failed_batch(output: Path, rank: int, step: int, batches: Sequence[Mapping[str, Any]]) -> Path:
    """Saves the prompts of an optimizer step with a non-finite loss or gradient as JSON, and returns the file.

    Args:
        output: the run's folder; the file is ``non-finite/process-<rank>/batch.json`` in it.
        rank: index of this process.
        step: number of the step, counted from 1.
        batches: batches of the step, one for each micro-step.
    """
    path = output / "non-finite" / f"process-{rank}" / "batch.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    prompts = [[str(prompt) for prompt in batch.get("prompt", ())] for batch in batches]
    path.write_text(json.dumps({"step": step, "prompts": prompts}, ensure_ascii=False, indent=1), encoding="utf-8")
    return path
