"""Scores image files with rewards, and prints the scores as tab-separated lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from longalign.image_io import load_image
from longalign.rewards.base import as_reward, guarded


@torch.no_grad()
def score_images(
    rewards: Mapping[str, Any], paths: Sequence[Path | str], prompts: Sequence[str], out: TextIO | None = None
) -> list[dict[str, float | str]]:
    """Scores image files and prints one tab-separated line per image, then the means over the images.

    Images are scored one at a time, so their sizes may differ and no score depends on other images. A reward that
    compares the prompts of a batch, to estimate the common direction of their embeddings, raises an error.

    Args:
        rewards: name -> `longalign.rewards.Reward`, or a function ``(images, prompts) -> scores (b,)``.
        paths: paths of image files.
        prompts: one per file, or a single one for all files.
        out: text stream to print to; None prints to the standard output.

    Returns:
        One mapping per image: ``image`` (the path), ``prompt``, and name -> score. The components of a reward's score
        are named ``name.component``.

    Raises:
        ValueError: if there are no images, or the numbers of prompts and images do not match.
        NonFiniteReward: if a score is NaN or infinite.
    """
    prompts = _prompt_per_image(prompts, paths)
    if not paths:
        raise ValueError("no images to score; give at least one image file")
    built = {name: as_reward(reward, name) for name, reward in rewards.items()}
    rows: list[dict[str, float | str]] = []
    for path, prompt in zip(paths, prompts, strict=True):
        image = load_image(path)[None]
        scores: dict[str, float] = {}
        for name, reward in built.items():
            scored = guarded(reward, image, [prompt])
            scores |= {name: float(scored.total[0]), **{f"{name}.{k}": float(v[0]) for k, v in scored.parts.items()}}
        if not rows:
            print("\t".join([*scores, "image"]), file=out)
        print("\t".join([*(f"{v:.4f}" for v in scores.values()), str(path)]), file=out, flush=True)
        rows.append({"image": str(path), "prompt": prompt, **scores})
    names = [k for k in rows[0] if k not in ("image", "prompt")]
    means = [np.mean([float(row[k]) for row in rows]) for k in names]
    print("\t".join([*(f"{m:.4f}" for m in means), f"mean of {len(rows)}"]), file=out)
    return rows


def score_sentences(
    rewards: Mapping[str, Any], paths: Sequence[Path | str], prompts: Sequence[str], out: TextIO | None = None
) -> list[dict[str, float | str]]:
    """Scores image files against each sentence of their prompts and prints one tab-separated line per sentence.

    Args:
        rewards: name -> reward with an image and a text tower, i.e. with `longalign.rewards.TowerReward.by_segment`.
            Of a reward that wraps another one as ``inner``, the inner reward is used.
        paths: paths of image files.
        prompts: one per file, or a single one for all files.
        out: text stream to print to; None prints to the standard output.

    Returns:
        One mapping per sentence: ``score`` (cosine similarity of sentence and image), ``reward`` (its name), ``image``
        (the path) and ``sentence``.

    Raises:
        ValueError: if a reward cannot score sentences, or the numbers of prompts and images do not match.
    """
    prompts = _prompt_per_image(prompts, paths)
    inner = {name: getattr(reward, "inner", reward) for name, reward in rewards.items()}
    unsupported = [name for name, reward in inner.items() if not hasattr(reward, "by_segment")]
    if unsupported:
        raise ValueError(
            f"{', '.join(unsupported)} cannot score sentences; expected a two-tower reward, such as denscore"
        )
    rows: list[dict[str, float | str]] = []
    print("\t".join(["score", "reward", "image", "sentence"]), file=out)
    for path, prompt in zip(paths, prompts, strict=True):
        image = load_image(path)[None]
        for name, reward in inner.items():
            for sentence, score in reward.by_segment(image, [prompt])[0]:
                print("\t".join([f"{score:.4f}", name, str(path), " ".join(sentence.split())]), file=out, flush=True)
                rows.append({"score": score, "reward": name, "image": str(path), "sentence": sentence})
    return rows


def _prompt_per_image(prompts: Sequence[str], paths: Sequence[Path | str]) -> list[str]:
    prompts = list(prompts) * len(paths) if len(prompts) == 1 else list(prompts)
    if len(paths) != len(prompts):
        raise ValueError(
            f"expected one prompt per image or one for all, got {len(prompts)} prompts for {len(paths)} images"
        )
    return prompts
