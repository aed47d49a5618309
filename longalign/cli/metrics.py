"""Reads metric configs from ``--metric`` and ``--reward``, and builds the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longalign.cli.rewards import reward_configs
from longalign.config.checks import check_parts
from longalign.config.parsing import parse_source
from longalign.errors import ConfigError
from longalign.metrics.config import MetricConfig, name_problems
from longalign.registry import PartConfig, metrics
from longalign.vlm.config import JudgeConfig


def metric_configs(texts: Sequence[str], rewards: Sequence[str], *, or_judge: str | None = None) -> list[PartConfig]:
    """Returns validated configs: of the metrics of ``--metric``, then of a metric named ``reward`` per ``--reward``.

    Args:
        texts: values of ``--metric``: names, configs in YAML or config files of metrics.
        rewards: values of ``--reward``: names, configs in YAML or config files of rewards.
        or_judge: value of ``--judge``, or None. With a judge, no metrics are required.

    Raises:
        ValueError: if there is neither a metric nor a reward nor a judge, a config is invalid, or two metrics have the
            same label.
    """
    if not texts and not rewards and or_judge is None:
        raise ValueError("nothing to measure; give --metric or --reward")
    values = [parse_source(text) for text in texts]
    values += [{"name": "reward", "reward": c, "label": name} for name, c in reward_configs(rewards).items()]
    configs = [metrics.validate(value) for value in values]
    if problems := name_problems(config for config in configs if isinstance(config, MetricConfig)):
        raise ConfigError(problems)
    return configs


def judge_config(text: str) -> JudgeConfig:
    """Returns the validated config of the judge in ``--judge``, a vision-language model that compares two images.

    Raises ConfigError if the config is invalid or its files do not exist.
    """
    return JudgeConfig.parse(parse_source(text))


def build_metrics(configs: Sequence[PartConfig], device: str | None) -> list[Any]:
    """Returns metrics (`longalign.metrics.base.Metric`) built from their configs, in eval mode.

    ``device`` is a torch device; the fastest available one if None. Raises ConfigError if files of a config do not
    exist or are invalid.
    """
    check_parts({f"metrics.{i}": config for i, config in enumerate(configs)})
    from longalign.metrics.base import as_metric
    from longalign.runtime import Runtime

    runtime = Runtime.detect(device=device)
    return [as_metric(metrics.construct(config, runtime)).eval() for config in configs]
