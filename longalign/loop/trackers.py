"""Trackers: additional loggers, TensorBoard and Weights & Biases. A failing tracker does not stop a run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from einops import rearrange
from torch import Tensor

from longalign.checkpoints.redaction import redacted
from longalign.config.changes import flatten
from longalign.config.run import RunConfig, to_dict

log = logging.getLogger("longalign")


class Trackers:
    """The trackers of a run. If a tracker fails, a warning is logged and training continues.

    Args:
        accelerator: accelerate's ``Accelerator``, which starts the trackers.
        config: config of the run; trackers record it without credentials.
    """

    def __init__(self, accelerator: Accelerator, config: RunConfig):
        self.accelerator = accelerator
        if config.loop.trackers:
            values = flatten(redacted(to_dict(config)))
            settings = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in values}
            _attempt("failed to start", lambda: accelerator.init_trackers("longalign", settings))

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        for tracker in self.accelerator.trackers:
            _attempt("failed to log metrics", lambda to=tracker: to.log(metrics, step=step))

    def log_images(self, images: Tensor, step: int) -> None:
        """Logs images ``(b, 3, h, w)`` in [0, 1] after ``step`` completed optimizer steps."""
        for tracker in self.accelerator.trackers:
            _attempt("failed to log images", lambda to=tracker: _log_images(to, images, step))

    def finish(self) -> None:
        for tracker in self.accelerator.trackers:
            _attempt("failed to finish", tracker.finish)


def _attempt(failure: str, action: Callable[[], Any]) -> None:
    try:
        action()
    except Exception as error:
        log.warning("a tracker %s (%s: %s); training continues", failure, type(error).__name__, error)


def _log_images(tracker: Any, images: Tensor, step: int) -> None:
    if tracker.name == "tensorboard":
        tracker.log_images({"monitor": images.numpy()}, step=step)
    elif hasattr(tracker, "log_images"):
        arrays = (rearrange(images, "b c h w -> b h w c") * 255).round().byte().numpy()
        tracker.log_images({"monitor": list(arrays)}, step=step)
