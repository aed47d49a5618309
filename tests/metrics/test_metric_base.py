import numpy as np
import pytest
import torch

from longalign.metrics.base import Metric, Value, as_metric
from longalign.registry import metrics
from longalign.runtime import Runtime
from longalign.testing import check_metric


def test_value_uses_longest_listed_start():
    metric = Metric()
    metric.values = {"facts": Value("%"), "facts/time": Value("s", "lower"), "fact": Value("other")}
    assert metric.value("facts").unit == "%" and metric.value("facts/colour").unit == "%"
    assert metric.value("facts/time/all") == Value("s", "lower")
    assert metric.value("factsheet") == Value() == Value("", "higher")


def test_finish_returns_observations_per_image():
    observations = {"score": np.zeros(3), "embedding": np.zeros((3, 2))}
    assert list(Metric().finish(observations, ["a"] * 3, [0, 1, 2])) == ["score"]


def test_as_metric_wraps_functions():
    def bright(images, prompts):
        return {"bright": images.mean((1, 2, 3))}

    assert as_metric(bright).label == "bright"
    assert as_metric(bright).observe(torch.ones(1, 3, 2, 2), ["a"])["bright"].tolist() == [1.0]
    with pytest.raises(ValueError, match="got 3;"):
        as_metric(3)


def test_registry_accepts_functions_as_metrics():
    def red(images, prompts):
        return {"red": images[:, 0].mean((1, 2))}

    metrics.register("red", red)
    try:
        check_metric("red")
        assert metrics.build("red", Runtime()) is red
    finally:
        metrics.unregister("red")


def test_check_metric_names_failures():
    def wrong(images, prompts):
        return {"other": torch.full((len(images),), float(len(images)))}

    metrics.register("wrong", wrong)
    try:
        with pytest.raises(AssertionError, match=r"(?s)2 checks.*'other'.*'wrong'.*'other' of a batch"):
            check_metric("wrong")
    finally:
        metrics.unregister("wrong")


def test_check_metric_gauges():
    check_metric("gauges")
