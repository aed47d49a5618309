"""Reads metric configs from ``--metric`` and ``--reward``, and builds the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longalign.cli.rewards import reward_configs
from longalign.config.checks import check_parts
from longalign.config.parsing import parse_source
from longalign.registry import PartConfig, metrics
from longalign.vlm.config import JudgeConfig


def metric_configs(texts: Sequence[str], rewards: Sequence[str], judge: str | None = None) -> list[PartConfig]:
    """Returns the validated metric configs. A reward is short for the metric ``reward``.

    Raises:
        ValueError: if there are none, and no judge.
    """
    if not texts and not rewards and judge is None:
        raise ValueError("nothing to measure; give --reward, --metric or --judge")
    values = [parse_source(text) for text in texts]
    values += [{"name": "reward", "reward": c, "label": name} for name, c in reward_configs(rewards).items()]
    return [metrics.validate(value) for value in values]


def judge_config(text: str) -> JudgeConfig:
    """Returns the validated config of a judge, with its files checked."""
    return JudgeConfig.parse(parse_source(text))


def build_metrics(configs: Sequence[PartConfig], device: str | None) -> list[Any]:
    """Returns the metrics of configs, in eval mode.

    Raises:
        ValueError: if two metrics have the same label.
    """
    check_parts({str(i): config for i, config in enumerate(configs)})
    from longalign.metrics.base import as_metric
    from longalign.runtime import Runtime

    runtime = Runtime.detect(device=device)
    built = [as_metric(metrics.construct(config, runtime)).eval() for config in configs]
    labels = [metric.label for metric in built]
    if repeated := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(
            f"two metrics are called {', '.join(repeated)}; give each a label, e.g. "
            f"--metric '{{name: {repeated[0]}, label: other}}'"
        )
    return built
