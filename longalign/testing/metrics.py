"""The conformance check of a metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longalign.evaluation.measure import observe
from longalign.metrics.base import Observations, as_metric
from longalign.metrics.config import MetricConfig
from longalign.registry import metrics
from longalign.runtime import Runtime
from longalign.testing.common import (
    CPU,
    EMOJI,
    LONG,
    SHORT,
    checked_config,
    config_checks,
    expect,
    expect_close,
    run_checks,
)


def check_metric(
    config: Any, *, prompts: Sequence[str] = (SHORT, LONG, EMOJI), runtime: Runtime = CPU, size: int = 64
) -> None:
    """Checks that a metric can be used in every table.

    It checks the config (see `longalign.testing.common.config_checks`). Values must have shape ``(n,)`` for n images
    and be finite or NaN. Statistics must not be infinite, even if images are repeated. Observations must be the same in
    a repeated call, and values must not depend on the batch size. The names of values must start with the metric's
    label. The direction of each value must be ``"higher"`` or ``"lower"`` (which is better), or None.

    Args:
        config: name, mapping or config of the metric.
        prompts: prompts for which the metric has values. For each prompt, two random images are measured.
        runtime: device and dtype.
        size: side of the square test images in pixels.

    Raises:
        AssertionError: listing all failed checks.
    """
    checked = checked_config("metrics", config, MetricConfig)
    metric = as_metric(metrics.construct(checked, runtime)).eval()
    texts, seeds = [prompt for prompt in prompts for _ in range(2)], [0, 1] * len(prompts)
    images = torch.rand(len(texts), 3, size, size, generator=torch.Generator().manual_seed(0)).to(runtime.device)

    def names_start_with_the_label() -> None:
        names = [*values(), *metric.statistics()]
        wrong = [n for n in names if not n.startswith(metric.label)]
        expect(bool(names), "the metric has no values and no statistics")
        expect(not wrong, f"{wrong} do not start with the label '{metric.label}'")
        directions = [n for n in names if metric.value(n).direction not in ("higher", "lower", None)]
        expect(not directions, f"the direction of {directions} is not higher, lower or None")

    def batched(step: int) -> Observations:
        return observe(images, texts, [metric], step)[0]

    def values(step: int = len(texts)) -> dict[str, np.ndarray]:
        return {k: np.asarray(v, np.float64) for k, v in metric.finish(batched(step), texts, seeds).items()}

    def values_have_one_number_per_image() -> None:
        for name, rows in values().items():
            expect(rows.shape == (len(texts),), f"'{name}' has shape {rows.shape}, expected ({len(texts)},)")
            expect(not np.isinf(rows).any(), f"'{name}' has infinite values; return NaN where an image has no value")

    def observations_repeat() -> None:
        first, second = batched(len(texts)), batched(len(texts))
        for name in first:
            expect_close(f"'{name}' of the same call twice", _tensor(second[name]), _tensor(first[name]), 0, 0)

    def a_batch_equals_singles() -> None:
        together, singles = values(), values(1)
        expect(together.keys() == singles.keys(), f"{sorted(together)} in a batch, {sorted(singles)} one by one")
        for name in together:
            expect_close(f"'{name}' of a batch and one by one", _tensor(singles[name]), _tensor(together[name]))

    def statistics_accept_repeated_images() -> None:
        observations, rows = batched(len(texts)), np.arange(len(texts))
        for name, function in metric.statistics().items():
            for chosen in (rows, rows // 2):
                value = float(function({k: v[chosen] for k, v in observations.items()}))
                expect(not np.isinf(value), f"'{name}' is infinite")

    checks = [
        *config_checks("metrics", checked),
        names_start_with_the_label,
        values_have_one_number_per_image,
        observations_repeat,
        a_batch_equals_singles,
        statistics_accept_repeated_images,
    ]
    run_checks("metrics", config, checks)


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.nan_to_num(values, nan=-12345.0))
