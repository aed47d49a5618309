"""Trains and samples one run of an ablation.

``python -m longalign.ablation.worker FOLDER`` executes the run in a folder. It reads the job (see `execute`) from the
standard input, since the file ``job.json`` in the folder has no credentials.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longalign.config.run import load_config
from longalign.errors import full_message, redact_url
from longalign.files.paths import best_checkpoint
from longalign.loop.fit import fit

JOB, RESULT, IMAGES = "job.json", "result.json", "images"
FINISHED, FAILED, INTERRUPTED = "finished", "failed", "interrupted"


def execute(folder: Path, job: Mapping[str, Any]) -> str:
    """Trains the model of a run, generates its images, and writes ``result.json``. Training resumes where it stopped.

    The images are generated with the best checkpoint if the config has ``monitor.keep_best``, else with the last one.

    Args:
        folder: folder of the run, for the images and ``result.json``. Training writes to the config's ``output``.
        job: ``config`` (plain values), ``train`` (whether to train), ``prompts``, ``sampling`` (keyword arguments of
            `longalign.inference.sampling.generate`) and ``device`` (a torch device, or None for the default).

    Returns:
        "finished", "failed" or "interrupted". An interrupted run writes no result.
    """
    start = time.perf_counter()
    try:
        source, checkpoint = load_config(job["config"]), None
        output = Path(source.output)
        if job["train"]:
            result = fit(source, device=job["device"], resume=output if output.exists() else None)
            if result.interrupted:
                return INTERRUPTED
            # the checkpoint that the config keeps, rather than the last one
            source = best_checkpoint(output) or result.checkpoint
            checkpoint = str(source.relative_to(folder))
        from longalign.inference.sampling import generate

        generate(
            source, job["prompts"], folder / IMAGES, **job["sampling"], device=job["device"], progress=True,
            overwrite=True,
        )  # fmt: skip
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        fail(folder, f"{kind}{full_message(error)}", redact_url(traceback.format_exc()))
        return FAILED
    write_json(
        folder / RESULT,
        {"status": FINISHED, "seconds": round(time.perf_counter() - start, 1), "checkpoint": checkpoint},
    )
    return FINISHED


def fail(folder: Path, error: str, details: str = "") -> None:
    """Writes ``result.json`` of a failed run, with the message ``error`` and the traceback ``details``."""
    write_json(folder / RESULT, {"status": FAILED, "error": error, "traceback": details})


def read_result(folder: Path) -> dict[str, Any]:
    """Returns the content of ``result.json`` in the folder of a run, or ``{"status": "pending"}`` without this file.

    In the file, ``status`` is "finished", with the duration ``seconds`` and the path ``checkpoint`` (relative to the
    folder; None without training), or "failed", with the texts ``error`` and ``traceback``.
    """
    path = folder / RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"status": "pending"}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically, so that an interruption leaves the old file or the new one."""
    from longalign.files.atomic import atomic_write

    with atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit({FINISHED: 0, FAILED: 1, INTERRUPTED: 130}[execute(Path(sys.argv[1]), json.load(sys.stdin))])
