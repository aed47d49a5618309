import numpy as np
import pytest
import torch
from toys import Compass, colours

from longalign.evaluation.measure import evaluate, measure
from longalign.metrics import Diversity
from longalign.testing import check_metric
from longalign.testing.tiny import tiny_clip


def test_diversity_of_pixels():
    images = colours((0, 0, 0), (0.5, 0.5, 0.5), (1, 1, 1), (1, 0, 0))
    values = measure(images, ["a", "a", "a", "b"], [Diversity("d", None)])["d"]
    assert values[:3] == pytest.approx([0.75, 0.5, 0.75])  # distances 0.5, 0.5 and 1
    assert np.isnan(values[3])


def test_diversity_of_embeddings():
    images = colours((1, 0, 0), (0, 1, 0), (0, 1, 0), (0, 1, 0))
    table = evaluate({"base": images}, ["a", "a", "b", "b"], [Diversity("d", Compass())], [0, 1, 0, 1])
    assert table.row("base", "d") == pytest.approx([1, 1, 0, 0], abs=1e-6)
    assert table.interval("base", "d").mean == pytest.approx(0.5)


def test_check_metric_diversity(tmp_path):
    check_metric("diversity")
    check_metric({"name": "diversity", "reward": {"name": "clip", "checkpoint": str(tiny_clip(tmp_path))}})
    assert torch.equal(Diversity("d", None).observe(torch.ones(1, 3, 64, 64), ["a"])["features"], torch.ones(1, 3072))
