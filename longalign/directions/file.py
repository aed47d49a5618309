"""A direction in the embedding space of a reward, saved in a file with its origin, and its check against a reward."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from safetensors import safe_open
from torch import Tensor

from longalign.files.weights import load_tensors, reading, save_tensors
from longalign.functional.preference import normalize
from longalign.registry import PartConfig
from longalign.rewards.base import EmbeddingReward

FORMAT = "longalign-direction-2"
#: kind of a common direction of text embeddings, and of a difference of image embeddings
TEXT, IMAGES = "text", "images"
#: probe prompts; their embeddings identify the weights, `segmenter` and `text` setting of a reward
PROBE = (
    "A red fox sleeps on a stone wall, 3.5 m above the road; behind it, the sky is pale green. It is raining.",
    "Three glass bottles and a lemon on a wooden table. Soft light comes from the left. Is the door open?",
)
PROBE_TOLERANCE = 0.05
_ATTRIBUTES = ("kind", "count", "components", "inner", "origin")


@dataclass(frozen=True)
class Direction:
    """A unit vector in the embedding space of a reward, and how it was computed.

    Attributes:
        vector: the vector ``(d,)``, of norm 1.
        probe: ``(k, d)`` embeddings of the k fixed texts `PROBE` by the reward for which the direction was computed. A
            reward with different embeddings of these texts cannot use the direction.
        kind: ``"text"`` for the normalized mean of text embeddings (the common direction ``V``), ``"images"`` for the
            normalized mean difference of image embeddings of two models, or another name for a vector that was computed
            in another way.
        count: number of prompts, or of pairs of images, from which the direction was computed; 0 if unknown.
        components: statistics of the components along the direction: of the text embeddings (``eta``), or for the kind
            ``"images"`` of the differences of image embeddings. Keys: ``count`` (number of components), ``mean``,
            ``std``, ``quantiles`` (probability as text -> value), ``edges`` and ``counts`` (of the bins of a
            histogram). Empty if unknown.
        inner: config of the reward for which the direction was computed; empty if unknown.
        origin: further information on the computation, e.g. the image folders.
    """

    vector: Tensor
    probe: Tensor
    kind: str
    count: int = 0
    components: dict[str, Any] = field(default_factory=dict)
    inner: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, reward: EmbeddingReward, vector: Tensor, config: PartConfig | None = None, **attributes: Any) -> Self:
        """Returns the direction of a vector in the embedding space of a reward.

        Args:
            reward: the reward. Its text embeddings of `PROBE` are stored as ``probe``.
            vector: ``(d,)`` vector of any norm, which is normalized.
            config: config of the reward, stored as ``inner``; None if unknown.
            **attributes: the attributes ``kind`` and, optionally, ``count``, ``components`` and ``origin``.

        Raises:
            ValueError: if the vector's norm is 0 or NaN.
        """
        probe = reward.text_features(PROBE).cpu()
        return cls(normalize(vector.float()).cpu(), probe, inner=_dump(config), **attributes)

    def save(self, path: str | Path) -> Path:
        """Writes a safetensors file with ``vector`` and ``probe``, and the other attributes as metadata.

        Creates the folder if needed, replaces an existing file, and returns the path.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"format": FORMAT, **{name: json.dumps(getattr(self, name)) for name in _ATTRIBUTES}}
        # copies, because a file cannot hold tensors that share memory
        tensors = {"vector": self.vector.detach().cpu().clone(), "probe": self.probe.detach().cpu().clone()}
        save_tensors(path, tensors, metadata)
        return path

    def vector_for(self, reward: EmbeddingReward, config: PartConfig | None = None) -> Tensor:
        """Returns ``vector`` ``(d,)``, after checking that the direction was computed with ``reward``.

        Args:
            reward: the reward.
            config: config of ``reward``, for messages; None if unknown.

        Raises:
            ValueError: if ``reward`` has embeddings of a different width, or its text embeddings of `PROBE` differ by
                more than 5% from ``probe``: its weights, or its config keys ``segmenter`` or ``text``, are different.
        """
        expected, got = _describe(self.inner), _describe(_dump(config))
        if self.vector.shape != (reward.dim,):
            raise ValueError(
                f"the direction was computed with {expected} and has width {len(self.vector)}, but the reward {got} "
                f"has width {reward.dim}; compute a direction for this reward with `longalign compute-direction`"
            )
        probe = reward.text_features(PROBE).cpu()
        distance = ((probe - self.probe).norm() / self.probe.norm()).item()
        if not distance <= PROBE_TOLERANCE:
            raise ValueError(
                f"the direction was computed with a different reward: expected {expected}; got {got}. Their embeddings "
                f"of the same texts differ by {distance:.0%}; run `longalign compute-direction` with this reward"
            )
        return self.vector

    def common_for(self, reward: EmbeddingReward, config: PartConfig | None = None) -> Tensor:
        """Returns ``vector`` ``(d,)``, after checking that ``kind`` is ``"text"`` and checking as `vector_for` does.

        Args:
            reward: the reward.
            config: config of ``reward``, for messages; None if unknown.

        Raises:
            ValueError: if ``kind`` is not ``"text"``, or the direction was not computed with ``reward``.
        """
        if self.kind != TEXT:
            raise ValueError(
                f"expected a common direction of text embeddings (kind '{TEXT}'), got one of kind '{self.kind}'; use "
                "it in the edit 'measured' of the reward 'edited'"
            )
        return self.vector_for(reward, config)

    def report(self) -> str:
        """Returns a summary as text of several lines: origin of the direction, and statistics of ``components``."""
        names = {TEXT: ("common direction of", "prompts", "eta"), IMAGES: ("measured direction of", "pairs", "shift")}
        of, rows, name = names.get(self.kind, (f"direction ({self.kind}) of", "rows", "component"))
        lines = [f"{of} {self.count} {rows}, width {len(self.vector)}, by {_describe(self.inner)}"]
        if not (found := self.components):
            return lines[0]
        sampled = found["count"]
        lines += [
            f"{name}{f' of {sampled} of them' if sampled < self.count else ''}: "
            f"mean {found['mean']:.4f}, standard deviation {found['std']:.4f}",
            "  ".join(f"{float(q):.0%} {v:.4f}" for q, v in found["quantiles"].items()),
        ]
        for low, high, count in zip(found["edges"], found["edges"][1:], found["counts"], strict=False):
            bar = "#" * round(40 * count / max(found["counts"]))
            lines.append(f"{low:8.4f} .. {high:8.4f} {count:8d} {bar}".rstrip())
        if "halves_cosine" in self.origin:
            cosine = self.origin["halves_cosine"]
            lines.append(f"cosine of the directions of two halves of the prompts: {cosine:.3f}")
        return "\n".join(lines)


def load_direction(path: str | Path) -> Direction:
    """Reads a file written by `Direction.save`; the tensors are on the CPU.

    Raises:
        ValueError: if the file does not exist, is damaged or was not written by `Direction.save`.
    """
    if not Path(path).is_file():
        raise ValueError(
            f"no file '{path}'; expected a direction: a file written by `longalign compute-direction` or, for a "
            "common direction, 'batch' or 'running'"
        )
    with reading(path, "write one with `longalign compute-direction`"):
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"'{path}' is not a direction file ({FORMAT}); write one with `longalign compute-direction`"
            )
        tensors = load_tensors(path)
        attributes = {name: json.loads(metadata[name]) for name in _ATTRIBUTES}
        return Direction(tensors["vector"], tensors["probe"], **attributes)


def _dump(config: PartConfig | None) -> dict[str, Any]:
    return config.model_dump(mode="json") if config else {}


def _describe(inner: dict[str, Any]) -> str:
    if not inner:
        return "a reward without a config"
    keys = ("name", "checkpoint", "text", "segmenter")
    return ", ".join(f"{key} {inner[key]}" for key in keys if inner.get(key))
