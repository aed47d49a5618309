"""The metric `my-part`."""

from __future__ import annotations

from collections.abc import Sequence

from my_plugin.config import MyPartConfig
from torch import Tensor

from longalign.metrics import Metric, Value
from longalign.runtime import Runtime


class MyPart(Metric):
    """Fraction of pixels with at least a given brightness, one value per image.

    Args:
        label: name of the value in tables.
        threshold: minimum brightness of a pixel that counts: the mean of its channels, in [0, 1].
    """

    def __init__(self, label: str, *, threshold: float):
        super().__init__()
        self.label, self.threshold = label, threshold
        # fractions shown in percent; use "lower" if less is better, None for a gauge that is only watched
        self.values = {label: Value("%", "higher")}

    @classmethod
    def from_config(cls, config: MyPartConfig, runtime: Runtime) -> MyPart:
        """Builds the metric. Load weights here, onto ``runtime.device``."""
        return cls(config.prefix(), threshold=config.threshold)

    def observe(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Measures images ``(b, 3, h, w)`` in [0, 1] and returns name -> ``(b,)``, NaN where an image has no value.

        Names start with the label: ``label.part`` is a further column of a table, ``label/group/name`` is shown in a
        breakdown.
        """
        return {self.label: (images.mean(1) >= self.threshold).float().mean((1, 2))}
