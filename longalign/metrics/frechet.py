"""Frechet distance between features of generated images and of reference images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from longalign.files.weights import load_pickle
from longalign.image_folder import IMAGE_SUFFIXES
from longalign.image_io import ImageFiles
from longalign.metrics.base import Metric, Statistic, Value
from longalign.metrics.config import FrechetConfig
from longalign.metrics.efficientnet import EfficientNet
from longalign.metrics.embedding import build_embedding_reward
from longalign.rewards.base import EmbeddingReward
from longalign.runtime import Runtime


class Embeddings(nn.Module):
    """Feature extractor that maps images ``(b, 3, h, w)`` in [0, 1] to their embeddings ``(b, d)`` by a reward."""

    def __init__(self, reward: EmbeddingReward):
        super().__init__()
        self.reward = reward

    def forward(self, images: Tensor) -> Tensor:
        return self.reward.image_features(images)


class Inception(nn.Module):
    """Maps images ``(b, 3, h, w)`` in [0, 1] to the 2048 activations of Inception v3 after the last pooling.

    The network is TensorFlow's version, as for published FID values.

    Args:
        model: torch-fidelity's ``FeatureExtractorInceptionV3``, which takes 8-bit images.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.requires_grad_(False).eval()

    @classmethod
    def load(cls, weights: str) -> Inception:
        """Builds the model from the path of a file with torch-fidelity's weights. Requires torch-fidelity.

        Raises:
            ValueError: if the file is damaged or contains anything but tensors and plain values.
            FileNotFoundError: if the file does not exist.
        """
        load_pickle(weights)  # raises if the file contains code, which torch-fidelity would run
        module = import_module("torch_fidelity.feature_extractor_inceptionv3")
        return cls(module.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=weights))

    def forward(self, images: Tensor) -> Tensor:
        device = next(self.model.parameters()).device
        return self.model((images * 255).round().byte().to(device))[0]


class Frechet(Metric):
    """Squared Frechet distance between features of generated and reference images, one value for the whole set.

    It is the distance of the Gaussians with the means ``m1``, ``m2`` and covariances ``S1``, ``S2`` of the two sets of
    features: ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` (FID, arXiv 1706.08500). Lower is better. The distance
    decreases with the number of images, so compare only sets of equal size. Distances by different extractors have
    different scales.

    Args:
        label: name of the value in the table of metrics.
        extractor: module or function that returns features ``(b, d)`` of images ``(b, 3, h, w)`` in [0, 1].
        reference: features ``(n, d)`` of the reference images, ``n >= 2``.
    """

    def __init__(self, label: str, extractor: Callable[[Tensor], Tensor], reference: np.ndarray):
        super().__init__()
        self.label, self.extractor = label, extractor
        self.values = {label: Value("", "lower")}
        self.mean, covariance = reference.mean(0, dtype=np.float64), np.cov(reference, rowvar=False, dtype=np.float64)
        self.trace = float(np.trace(covariance))
        eigenvalues, vectors = np.linalg.eigh(covariance)
        self.root = vectors * np.sqrt(eigenvalues.clip(min=0))  # root @ root.T is the covariance

    @classmethod
    def from_config(cls, config: FrechetConfig, runtime: Runtime) -> Frechet:
        files = sorted(p for p in Path(config.reference).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if len(files) < 2:
            raise ValueError(
                f"expected at least two reference images, got {len(files)} in {config.reference}; add images to this "
                "folder, or set `reference` to a different one"
            )
        extractor: nn.Module
        if config.inception is not None:
            extractor = Inception.load(config.inception).to(runtime.device)
        elif config.reward is not None:
            extractor = Embeddings(build_embedding_reward(config.reward, runtime))
        else:
            extractor = EfficientNet.load().to(runtime.device)
        with torch.no_grad():
            rows = [extractor(image[None].to(runtime.device)).float().cpu() for image in ImageFiles(files)]
        return cls(config.prefix(), extractor, torch.cat(rows).numpy())

    def observe(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"features": self.extractor(images)}

    def statistics(self) -> Mapping[str, Statistic]:
        return {self.label: lambda observations: self.distance(observations["features"])}

    def distance(self, features: np.ndarray) -> float:
        """Returns the squared distance of features ``(n, d)`` to those of the reference images; NaN for n < 2."""
        if len(features) < 2:
            return float("nan")
        features = features.astype(np.float64)
        mean = features.mean(0)
        centred = (features - mean) / np.sqrt(len(features) - 1)
        # the trace of (S1 S2)^(1/2) is the sum of the singular values of A B, with S1 = A^T A and S2 = B B^T
        cross = np.linalg.svd(centred @ self.root, compute_uv=False).sum()
        return float(((mean - self.mean) ** 2).sum() + (centred**2).sum() + self.trace - 2 * cross)
