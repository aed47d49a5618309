"""Statistics of images, such as the share of dark pixels, without a learned model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longalign.metrics.base import Metric, Value
from longalign.metrics.config import GaugesConfig
from longalign.runtime import Runtime

DARK = 0.2
"""Luminance in [0, 1] below which a pixel is dark."""
EDGE = 0.1
"""Change of luminance per pixel from which a pixel is an edge."""
LEVELS = 8
"""Number of bins per colour channel in the histogram of colours."""


class Gauges(Metric):
    """Image statistics that show a change of style, e.g. from over-optimization. They do not measure quality.

    ``R``, ``G`` and ``B`` are pixel values in [0, 1], and ``Y = 0.2126 R + 0.7152 G + 0.0722 B`` is the luminance
    (weights of Rec. 709, applied to the gamma-encoded values). The values of an image, named ``<label>.<name>``:

    - ``dark``: fraction of pixels with ``Y < 0.2``.
    - ``saturation``: mean over the pixels of ``(max - min) / max`` of the three channels, 0 for black pixels.
    - ``edges``: fraction of pixels with ``|grad Y| >= 0.1``, from differences to the next pixel right and below.
    - ``entropy``: entropy of the histogram of colours with 8 bins per channel, in bits, at most 9.
    - ``sharpness``: standard deviation of the 4-neighbour Laplacian of ``Y``.
    - ``warmth``: mean of ``R - B``, in [-1, 1].
    - ``corners``: mean ``Y`` of the four corners divided by the mean ``Y`` of the image; below 1 for a vignette. A
      corner is an eighth of the height by an eighth of the width.

    ``edges`` and ``sharpness`` depend on the resolution, the others do not.

    Args:
        label: start of the names of the values in the table.
    """

    def __init__(self, label: str):
        super().__init__()
        self.label = label
        gauge, share = Value(direction=None), Value("%", None)
        self.values = {label: gauge, f"{label}.dark": share, f"{label}.edges": share}
        self.values |= {f"{label}.saturation": share, f"{label}.entropy": Value("bits", None)}

    @classmethod
    def from_config(cls, config: GaugesConfig, runtime: Runtime) -> Gauges:
        return cls(config.prefix())

    def observe(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        images = images.float()
        red, green, blue = images.unbind(1)
        luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        low, high = images.aminmax(dim=1)
        right = luma[:, :-1, 1:] - luma[:, :-1, :-1]
        below = luma[:, 1:, :-1] - luma[:, :-1, :-1]
        centre = luma[:, 1:-1, 1:-1]
        laplacian = luma[:, 2:, 1:-1] + luma[:, :-2, 1:-1] + luma[:, 1:-1, 2:] + luma[:, 1:-1, :-2] - 4 * centre
        gauges = {
            "dark": (luma < DARK).float().mean((1, 2)),
            "saturation": ((high - low) / high.clamp(min=1e-6)).mean((1, 2)),
            "edges": (torch.hypot(right, below) >= EDGE).float().mean((1, 2)),
            "entropy": _colour_entropy(images),
            "sharpness": laplacian.flatten(1).std(1, correction=0),
            "warmth": (red - blue).mean((1, 2)),
            "corners": _corners(luma).mean((1, 2)) / luma.mean((1, 2)).clamp(min=1e-6),
        }
        return {f"{self.label}.{name}": values for name, values in gauges.items()}


def _corners(luma: Tensor) -> Tensor:
    """Returns the four corners of images ``(b, h, w)``, joined to one image ``(b, 2 h / 8, 2 w / 8)`` each."""
    rows, columns = (
        torch.cat([torch.arange(side)[:n], torch.arange(side)[-n:]]).to(luma.device)
        for side, n in ((side, max(side // 8, 1)) for side in luma.shape[1:])
    )
    return luma[:, rows][:, :, columns]


def _colour_entropy(images: Tensor) -> Tensor:
    """Returns the entropies ``(b,)``, in bits, of the images' colour histograms with `LEVELS` bins per channel."""
    red, green, blue = (images * LEVELS).long().clamp(0, LEVELS - 1).unbind(1)
    bins = ((red * LEVELS + green) * LEVELS + blue).flatten(1)
    counts = torch.stack([torch.bincount(row, minlength=LEVELS**3) for row in bins])
    shares = counts / counts.sum(1, keepdim=True)
    return -torch.xlogy(shares, shares).sum(1) / torch.log(torch.tensor(2.0))
