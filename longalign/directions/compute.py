"""Computes directions in the embedding space of a reward, from a corpus of prompts or from two sets of images."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from longalign import registry
from longalign.data.prompts.sets import prompts_hash
from longalign.directions.file import IMAGES, TEXT, Direction
from longalign.functional import preference
from longalign.image_folder import read_images
from longalign.image_io import load_image
from longalign.registry import PartConfig
from longalign.rewards.base import EmbeddingReward
from longalign.runtime import Runtime

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
NUM_BINS = 20
#: the distribution of components is estimated from a random sample of this many prompts, to bound memory use
NUM_SAMPLED = 20_000
Row = TypeVar("Row")


def compute_direction(
    reward: EmbeddingReward, prompts: Iterable[str], batch_size: int = 64, config: PartConfig | None = None
) -> Direction:
    """Computes the common direction of prompts: their normalized mean text embedding (LongAlign, paper 3.2).

    Args:
        reward: reward that computes the text embeddings.
        prompts: the corpus, with at least two different prompts; may be a generator.
        batch_size: number of prompts encoded at a time.
        config: config of the reward, stored as `Direction.inner`; None if unknown.

    Returns:
        A `Direction` of the kind ``"text"``.

    Raises:
        ValueError: if there are fewer than two different prompts.
    """
    rng = random.Random(0)
    total = torch.zeros(reward.dim, dtype=torch.float64)
    sample: list[Tensor] = []
    count = 0
    for batch in _batches(prompts, batch_size):
        text = reward.text_features(batch).cpu()
        total += text.double().sum(0)
        for row in text:
            if len(sample) < NUM_SAMPLED:
                sample.append(row)
            elif (index := rng.randrange(count + 1)) < NUM_SAMPLED:
                sample[index] = row
            count += 1
    if len(torch.unique(torch.stack(sample), dim=0) if sample else ()) < 2:
        raise ValueError(f"a common direction requires at least 2 different prompts, got {count} prompts; add prompts")
    vector = preference.normalize((total / count).float())
    eta = distribution(preference.eta(torch.stack(sample), vector))
    return Direction.of(reward, vector, config, kind=TEXT, count=count, components=eta)


@torch.no_grad()
def measure_direction(
    reward: EmbeddingReward,
    over: Path | str,
    reference: Path | str,
    batch_size: int = 64,
    config: PartConfig | None = None,
) -> Direction:
    """Computes the direction in which a model's images differ from those of its reference model.

    It is the mean difference of the image embeddings, ``over`` minus ``reference``, scaled to norm 1. The mean is over
    pairs of images of the same prompt and seed.

    Args:
        reward: reward that computes the image embeddings. It is set to eval mode.
        over: folder with images of an over-optimized model, written by ``longalign generate``.
        reference: folder with images of the reference model for the same prompts and seeds.
        batch_size: number of images encoded at a time.
        config: config of the reward, stored as `Direction.inner`; None if unknown.

    Returns:
        A `Direction` of the kind ``"images"``. `Direction.origin` contains the two folders, a hash of the prompts, and
        the cosine of the directions computed from two halves of the pairs.

    Raises:
        ValueError: if the two folders have images of different prompts or seeds, fewer than two pairs, or the same mean
            embedding.
        FileNotFoundError: if a folder has no ``metadata.jsonl``, or an image listed there does not exist.
    """
    prompts, *paths = paired_images(over, reference)
    reward.eval()
    changed, original = (_embed(reward, files, batch_size) for files in paths)
    differences = changed - original
    if not differences.mean(0).norm() > 1e-6:
        raise ValueError(
            f"the images of {over} and {reference} have the same mean embedding, so they differ in no direction; "
            "expected images of two different models: generate one of the folders again"
        )
    vector = preference.normalize(differences.mean(0))
    half = len(prompts) // 2
    cosine = F.cosine_similarity(differences[:half].mean(0), differences[half:].mean(0), dim=0)
    origin = {
        "over": str(over),
        "reference": str(reference),
        "prompts_sha256": prompts_hash(dict.fromkeys(prompts)),
        "halves_cosine": float(cosine),
    }
    shift = distribution(preference.eta(differences, vector))
    return Direction.of(reward, vector, config, kind=IMAGES, count=len(prompts), components=shift, origin=origin)


def paired_images(over: Path | str, reference: Path | str) -> tuple[list[str], list[Path], list[Path]]:
    """Pairs the images of two folders, written by ``longalign generate``, by prompt and seed.

    Args:
        over: folder with images of an over-optimized model.
        reference: folder with images of its reference model.

    Returns:
        The prompts, the image files in ``over`` and the image files in ``reference``: three lists of equal length,
        sorted by prompt and seed.

    Raises:
        ValueError: if the two folders have images of different prompts or seeds, or fewer than two pairs.
        FileNotFoundError: if a folder has no ``metadata.jsonl``, or an image listed there does not exist.
    """
    folders = (Path(over), Path(reference))
    found = [sorted(((p, str(seed)), path) for path, p, seed in read_images(folder)) for folder in folders]
    keys = [[key for key, _ in rows] for rows in found]
    if keys[0] != keys[1]:
        raise ValueError(
            f"expected images of the same prompts and seeds in {over} ({len(keys[0])} images) and {reference} "
            f"({len(keys[1])}), got {len({*keys[0]} & {*keys[1]})} in common; generate both with the same --prompts "
            "and --seed"
        )
    if len(keys[0]) < 2:
        raise ValueError(
            f"a measured direction requires at least 2 pairs of images, got {len(keys[0])}; generate images of "
            "more prompts or seeds"
        )
    changed, original = ([path for _, path in rows] for rows in found)
    return [prompt for prompt, _ in keys[0]], changed, original


def write_direction(
    config: Any,
    output: str | Path,
    *,
    prompts: Iterable[str] = (),
    images: tuple[Path | str, Path | str] | None = None,
    runtime: Runtime | None = None,
    batch_size: int = 64,
) -> Direction:
    """Builds a reward, computes a direction and writes it to a file: ``longalign compute-direction``.

    Args:
        config: the reward, as its name, a mapping or a config. For ``edited`` and ``reweighted``, its inner reward is
            used.
        output: output file, usually ``*.safetensors``; an existing file is replaced.
        prompts: the corpus for `compute_direction`. Not used with ``images``.
        images: the folders ``(over, reference)`` for `measure_direction`; None computes the direction of ``prompts``.
        runtime: device and dtype of the reward; None: the fastest available device and float32.
        batch_size: number of prompts or images encoded at a time.

    Returns:
        The direction that was written; `Direction.report` summarizes it.

    Raises:
        ValueError: if the score of the reward is not a dot product of embeddings, and in the cases of
            `compute_direction` and `measure_direction`.
        FileNotFoundError: if a folder has no ``metadata.jsonl``, or an image listed there does not exist.
    """
    config = registry.rewards.validate(config)
    while isinstance(inner := getattr(config, "inner", None), PartConfig):
        config = inner
    reward = registry.rewards.build(config, runtime)
    if not isinstance(reward, EmbeddingReward):
        raise ValueError(
            f"'{config.name}' has no text embeddings; use a reward such as 'clip' or 'denscore', or a term of a sum"
        )
    if images is None:
        direction = compute_direction(reward, prompts, batch_size, config)
    else:
        direction = measure_direction(reward, *images, batch_size, config)
    direction.save(output)
    return direction


def distribution(components: Tensor) -> dict[str, Any]:
    """Returns statistics of n numbers ``(n,)``: count, mean, standard deviation, quantiles and histogram.

    The keys are those of `Direction.components`.
    """
    values = components.double()
    quantiles = torch.quantile(values, torch.tensor(QUANTILES, dtype=torch.float64))
    low, high = float(values.min()), float(values.max())
    high = high if high > low else low + 1e-6
    bins = min(NUM_BINS, math.ceil(math.sqrt(len(values))))  # avoids mostly empty bins for few prompts
    return {
        "count": len(values),
        "mean": values.mean().item(),
        "std": values.std().item(),
        "quantiles": {str(q): v for q, v in zip(QUANTILES, quantiles.tolist(), strict=True)},
        "edges": torch.linspace(low, high, bins + 1, dtype=torch.float64).tolist(),
        "counts": torch.histc(values, bins, low, high).long().tolist(),
    }


def _embed(reward: EmbeddingReward, paths: Sequence[Path], batch_size: int) -> Tensor:
    """Returns the image embeddings ``(n, d)`` of n image files, on the CPU."""
    rows: list[Tensor] = []
    for batch in _batches(paths, batch_size):
        images = [load_image(path) for path in batch]
        same_size = all(image.shape == images[0].shape for image in images)
        stacks = [torch.stack(images)] if same_size else [image[None] for image in images]
        rows += [reward.image_features(stack).cpu() for stack in stacks]
    return torch.cat(rows)


def _batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
