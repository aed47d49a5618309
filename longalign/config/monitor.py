"""Config of the key `monitor` of a run: sampling and measuring held-out prompts during training. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from longalign.config.solvers import Solver
from longalign.errors import ConfigProblem, nested, redact_url
from longalign.metrics.config import name_problems
from longalign.registry import Part, Section, data
from longalign.runtime import Runtime
from longalign.sizes import ImageSize

Text = Annotated[str, Field(min_length=1)]
#: keys on which the measured values depend
MEASURED = {"prompts", "data", "limit", "seeds", "num_steps", "guidance", "size", "solver", "metrics"}


class GuardConfig(Section):
    """Limits how much worse a metric on the held-out prompts may be than at the start of the run."""

    metric: Text
    """name of a value that the monitor measures, e.g. "facts" or "denscore.text_relevant"."""
    at_most_worse: NonNegativeFloat
    """by how much the value may be worse than in the first measurement of the run, in the unit of the metric. For a
    percentage, 0.05 is five percentage points.
    """


class KeepBestConfig(Section):
    """Selects the best checkpoint by a metric on the held-out prompts.

    The best checkpoint is kept, and the link ``best`` in the output folder points to it.
    """

    metric: Text
    """name of a value that the monitor measures, e.g. "denscore". The metric defines whether higher or lower is better.
    """
    guard: GuardConfig | None = None
    """a limit on another metric: a measurement beyond the limit is never the best one. null: no limit."""


class EarlyStopConfig(KeepBestConfig):
    """Ends a run before the last step if a metric on the held-out prompts no longer improves."""

    patience: PositiveInt
    """number of successive measurements without a new best value after which the run ends."""


class MonitorConfig(Section):
    """Samples images of held-out prompts from fixed noise during training, and measures them with metrics."""

    prompts: Annotated[tuple[str, ...], Field(min_length=1)] | Text | None = None
    """a list of prompts, or a text ``PATH`` or ``SET:PATH`` that names a file or prompt set, as for
    ``longalign generate --prompts``. Set either this key or `data`.
    """
    data: Part("data") | None = None
    """data whose prompts are used, such as `scenes` with a seed that differs from that of the training data."""
    limit: PositiveInt | None = None
    """maximum number of prompts, of which the first are used; null: all."""
    every: PositiveInt = 500
    """optimizer steps between two measurements; the monitor also measures at the start and at the end."""
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0,)
    """seeds of the noise; one image is sampled per prompt and seed."""
    num_steps: PositiveInt = 25
    """number of sampling steps per image."""
    guidance: Annotated[float, Field(ge=1)] = 7.5
    """classifier-free guidance scale; 1 disables it."""
    size: ImageSize | None = None
    """size of the images in pixels: the side of a square, or ``WIDTHxHEIGHT``; null: the backbone's native resolution.
    """
    solver: Solver = "unipc"
    """"unipc", "ddim", "dpm++", or "lcm" for a consistency-distilled model, with 4 steps and guidance 1."""
    batch_size: PositiveInt = 8
    """number of images sampled or measured at a time."""
    metrics: tuple[Part("metrics"), ...] = ()
    """metrics to measure the images with; empty: images are only written to the output folder."""
    window: PositiveInt = 3
    """a warning is logged if a metric became worse over this number of measurements, by more than twice its standard
    error, while the training reward rose.
    """
    keep_best: KeepBestConfig | None = None
    """keep the checkpoint with the best measurement, besides the newest ones; the link ``best`` in the output folder
    points to it. null: only the newest ones.
    """
    early_stop: EarlyStopConfig | None = None
    """end the run when a metric no longer improves; null: never."""

    @model_validator(mode="after")
    def _check(self) -> MonitorConfig:
        if found := list(self._problems()):
            raise nested(found)
        return self

    def _problems(self) -> Iterator[ConfigProblem]:
        if (self.prompts is None) == (self.data is None):
            given = "neither" if self.prompts is None else "both"
            yield "prompts", f"expected either prompts or data, got {given}; set exactly one"
        if repeated := [seed for seed, count in Counter(self.seeds).items() if count > 1]:
            yield "seeds", f"expected different seeds, got {repeated[0]} more than once; remove it"
        yield from name_problems(self.metrics)
        prefixes = [metric.prefix() for metric in self.metrics]
        for path, name in self.names().items():
            if not any(name == prefix or name.startswith(tuple(prefix + c for c in "./-")) for prefix in prefixes):
                known = ", ".join(prefixes) or "nothing"
                yield path, f"the monitor does not measure '{name}', only {known}; add its metric to monitor.metrics"

    def names(self) -> dict[str, str]:
        """Returns the names of the measured values that `keep_best` and `early_stop` use.

        A mapping: dotted path of the key in this config -> name, e.g. ``{"keep_best.metric": "facts"}``.
        """
        out = {}
        for key in ("keep_best", "early_stop"):
            if (choice := getattr(self, key)) is not None:
                out[f"{key}.metric"] = choice.metric
                if choice.guard is not None:
                    out[f"{key}.guard.metric"] = choice.guard.metric
        return out

    def texts(self, runtime: Runtime) -> list[str]:
        """Returns the prompts that the key `prompts` or `data` defines, the first `limit` of them.

        Args:
            runtime: device, dtype and processes that the data is built for.

        Raises:
            FileNotFoundError: if ``prompts`` names a file that does not exist.
            ValueError: if that file contains no prompts, or ``data`` is a stream, whose items cannot be read by index.
        """
        if self.data is not None:
            source = data.construct(self.data, runtime)
            if not hasattr(source, "prompt"):
                raise ValueError(f"monitor.data: '{self.data.name}' is a stream; use data that is read by index")
            return [source.prompt(i) for i in range(len(source))[: self.limit]]
        if isinstance(self.prompts, str):
            from longalign.data.prompts.sets import read_prompt_set

            return read_prompt_set(self.prompts).texts[: self.limit]
        return list(self.prompts or ())[: self.limit]

    def fingerprint(self) -> str:
        """Returns the SHA-256 hash, in hexadecimal, of those keys of this config on which the measured values depend.

        Credentials in URLs are not part of the hash.
        """
        settings: dict[str, Any] = self.model_dump(mode="json", include=MEASURED)
        return hashlib.sha256(redact_url(json.dumps(settings, sort_keys=True)).encode()).hexdigest()
