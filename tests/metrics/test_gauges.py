import pytest
import torch

from longalign.registry import metrics
from longalign.runtime import Runtime


def gauges(image):
    metric = metrics.build("gauges", Runtime())
    return {name.removeprefix("gauges."): float(v[0]) for name, v in metric.observe(image[None], ["a"]).items()}


def test_gauges_of_half_black_half_orange():
    image = torch.zeros(3, 8, 8)
    image[:, :, 4:] = torch.tensor([1.0, 0.5, 0.0])[:, None, None]
    values = gauges(image)
    assert values["dark"] == 0.5 and values["saturation"] == 0.5
    assert values["edges"] == pytest.approx(1 / 7)  # one column of 7 x 7 differences
    assert values["entropy"] == pytest.approx(1.0) and values["warmth"] == 0.5
    # the luminance 0.5702 gives +-0.5702 in two of six columns of the Laplacian
    assert values["sharpness"] == pytest.approx(0.5702 / 3**0.5, rel=1e-4)


def test_gauges_of_a_grey_image():
    values = gauges(torch.full((3, 8, 8), 0.5))
    assert values.pop("corners") == pytest.approx(1.0)
    assert values == pytest.approx(dict.fromkeys(values, 0.0), abs=1e-6)


def test_gauge_of_dark_corners():
    image = torch.full((3, 16, 8), 0.4)
    for rows in (slice(0, 2), slice(14, 16)):
        image[:, rows, 0], image[:, rows, -1] = 0.2, 0.2
    # eight of 128 pixels are half as bright
    assert gauges(image)["corners"] == pytest.approx(0.2 / (0.4 - 0.2 * 8 / 128), rel=1e-5)


def test_gauges_are_watched_only():
    metric = metrics.build({"name": "gauges", "label": "look"}, Runtime())
    assert metric.value("look.dark").unit == "%" and metric.value("look.warmth").unit == ""
    assert all(metric.value(name).direction is None for name in metric.observe(torch.rand(1, 3, 8, 8), ["a"]))
