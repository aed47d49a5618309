"""Scores image files, and prints the scores line by line."""

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
    """Scores image files and prints one tab-separated line per image, then the means.

    Images are scored one at a time, so sizes may differ and no score depends on other images. A reward that
    estimates its direction from the batch raises an error.

    Args:
        rewards: name -> `Reward` or plain callable.
        paths: image files.
        prompts: one per file, or one for all files.
        out: output stream; standard output if None.

    Returns:
        One dict per image: ``image``, ``prompt`` and each score.

    Raises:
        ValueError: if there are no images, or the numbers of prompts and images do not match.
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
        rewards: name -> `Reward` with ``by_segment``. If a reward wraps another (``inner``), the inner reward is used.
        paths: image files.
        prompts: one per file, or one for all files.
        out: output stream; standard output if None.

    Returns:
        One dict per sentence: ``score``, ``reward``, ``image`` and ``sentence``.

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
        raise ValueError(f"expected one prompt per image or one for all, got {len(prompts)} for {len(paths)} images")
    return prompts
