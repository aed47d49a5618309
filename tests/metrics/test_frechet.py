import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from longalign.config.checks import check_parts
from longalign.errors import ConfigError
from longalign.evaluation.measure import evaluate
from longalign.image_io import write_png
from longalign.metrics import Frechet
from longalign.metrics.frechet import Inception
from longalign.registry import metrics
from longalign.testing import check_metric
from longalign.testing.tiny import tiny_clip


def corners(*scales):
    """Points with mean zero and covariance ``diag(scales ** 2)``."""
    signs = np.array(np.meshgrid(*[[-1, 1]] * len(scales))).reshape(len(scales), -1).T
    return signs * np.array(scales) * np.sqrt((len(signs) - 1) / len(signs))


def test_frechet_distance_of_diagonal_gaussians():
    metric = Frechet("fid", nn.Flatten(), corners(1.0, 2.0))
    # the means differ by (3, 4); the scales by 1 and 0.5
    assert metric.distance(corners(2.0, 2.5) + np.array([3, 4])) == pytest.approx(25 + 1 + 0.25)
    assert metric.distance(corners(1.0, 2.0)) == pytest.approx(0, abs=1e-9)
    assert np.isnan(metric.distance(np.zeros((1, 2))))


def test_frechet_distance_of_correlated_gaussians():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 4)) @ rng.normal(size=(4, 4)), rng.normal(size=(60, 4)) @ rng.normal(size=(4, 4))
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.sqrt(np.linalg.eigvals(first @ second).real).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * cross
    assert Frechet("fid", nn.Flatten(), b).distance(a) == pytest.approx(expected)


def test_frechet_in_a_table_is_lower_for_images_of_the_reference():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(24, 3, 1, 1, generator=generator)
    metric = Frechet("fid", nn.Flatten(), torch.rand(40, 3, generator=generator).numpy())
    table = evaluate({"dark": images / 4, "like": images}, [str(i) for i in range(24)], [metric])
    assert table.interval("like", "fid").mean < table.interval("dark", "fid").mean
    assert list(table.significant("like")[0]) == ["fid"]
    assert "fid (lower is better)" in table.text()


@pytest.fixture
def reference(tmp_path):
    for i in range(3):
        path = tmp_path / "reference" / "deep" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, torch.rand(3, 32, 32))
    return str(tmp_path / "reference")


def test_check_metric_frechet(tmp_path, reference):
    inner = {"name": "clip", "checkpoint": str(tiny_clip(tmp_path / "clip"))}
    check_metric({"name": "frechet", "reference": reference, "reward": inner})


def test_frechet_config_reports_extractor_and_files(tmp_path, reference):
    with pytest.raises(ConfigError, match=r"one of reward, efficientnet, inception .* got none"):
        metrics.validate({"name": "frechet", "reference": reference})
    with pytest.raises(ConfigError, match="got efficientnet and inception; set exactly one"):
        metrics.validate({"name": "frechet", "reference": reference, "efficientnet": True, "inception": "a.pth"})
    config = metrics.validate({"name": "frechet", "reference": str(tmp_path / "none"), "inception": "no.pth"})
    with pytest.raises(ConfigError, match=r"(?s)no folder .*none.*no file no\.pth"):
        check_parts({"metric": config})


class FakeInception(nn.Module):
    def __init__(self, name, features, feature_extractor_weights_path):
        super().__init__()
        self.features = features
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        assert images.dtype == torch.uint8 and self.features == ["2048"]
        return (images.float().mean((2, 3)),)


def test_inception_gets_8_bit_images_and_rejects_code(monkeypatch, tmp_path):
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "good.pth")
    features = Inception.load(str(tmp_path / "good.pth"))(torch.full((1, 3, 2, 2), 0.5))
    assert features.tolist() == [[128.0, 128.0, 128.0]]
    torch.save(FakeInception("", [], ""), tmp_path / "code.pth")
    with pytest.raises(ValueError, match=r"code\.pth .*FakeInception"):
        Inception.load(str(tmp_path / "code.pth"))
