"""Common directions of text embeddings over a corpus: computation, files, and checks against a reward."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from longalign import registry
from longalign.checkpoints.weights import load_tensors, reading, save_tensors
from longalign.functional import preference
from longalign.registry import PartConfig
from longalign.rewards.base import EmbeddingReward
from longalign.rewards.reweighted.config import ReweightedConfig
from longalign.runtime import Runtime, resolve_checkpoint

FORMAT = "longalign-direction-1"
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
NUM_BINS = 20
#: eta's distribution is estimated from a random sample of this many prompts, so that memory use is bounded
NUM_SAMPLED = 20_000
#: probe prompts; their embeddings identify the weights, `segmenter` and `text` setting of a reward
PROBE = (
    "A red fox sleeps on a stone wall, 3.5 m above the road; behind it, the sky is pale green. It is raining.",
    "Three glass bottles and a lemon on a wooden table. Soft light comes from the left. Is the door open?",
)
PROBE_TOLERANCE = 0.05


@dataclass(frozen=True)
class Direction:
    """A common direction and its provenance.

    Attributes:
        vector: ``V``, a unit vector ``(d,)``.
        probe: ``(k, d)`` embeddings of `PROBE` by the reward for which the direction was computed.
        num_prompts: number of prompts of the corpus.
        eta: distribution of ``eta = C_P . V`` over prompts sampled from the corpus: their number ``num_prompts``,
            ``mean``, ``std``, ``quantiles`` (at `QUANTILES`), ``edges`` and ``counts`` of a histogram.
        inner: config of the reward for which the direction was computed; empty if that reward had no config.
    """

    vector: Tensor
    probe: Tensor
    num_prompts: int
    eta: dict[str, Any]
    inner: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Writes a safetensors file with ``V`` and ``probe``, and the other attributes as metadata."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        attributes = {"num_prompts": self.num_prompts, "eta": self.eta, "inner": self.inner}
        metadata = {"format": FORMAT, **{key: json.dumps(value) for key, value in attributes.items()}}
        save_tensors(path, {"V": self.vector.cpu().contiguous(), "probe": self.probe.cpu().contiguous()}, metadata)
        return path

    def vector_for(self, reward: EmbeddingReward, config: PartConfig | None = None) -> Tensor:
        """Returns the direction ``V``, shape ``(d,)``, after checking that it was computed with ``reward``.

        Raises:
            ValueError: if the width differs, or if the reward's embeddings of `PROBE` differ, i.e. the reward has other
                weights, or a different ``segmenter`` or ``text`` setting.
        """
        expected, got = _describe(self.inner), _describe(_dump(config))
        if self.vector.shape != (reward.dim,):
            raise ValueError(
                f"the direction has width {len(self.vector)}, but was computed with {expected}; the reward {got} has "
                f"width {reward.dim}; run `longalign compute-direction` with this reward"
            )
        probe = reward.text_features(PROBE).cpu()
        distance = ((probe - self.probe).norm() / self.probe.norm()).item()
        if not distance <= PROBE_TOLERANCE:
            raise ValueError(
                f"the direction was computed with a different reward: expected {expected}; got {got}. Their embeddings "
                f"of the same texts differ by {distance:.0%}; run `longalign compute-direction` with this reward"
            )
        return self.vector

    def report(self) -> str:
        """Returns a summary of the distribution of eta as text: mean, quantiles and a histogram."""
        sampled = self.eta["num_prompts"]
        lines = [
            f"common direction of {self.num_prompts} prompts, width {len(self.vector)}, by {_describe(self.inner)}",
            f"eta{f' of {sampled} of them' if sampled < self.num_prompts else ''}: "
            f"mean {self.eta['mean']:.4f}, standard deviation {self.eta['std']:.4f}",
            "  ".join(f"{float(q):.0%} {v:.4f}" for q, v in self.eta["quantiles"].items()),
        ]
        edges, counts = self.eta["edges"], self.eta["counts"]
        for low, high, count in zip(edges, edges[1:], counts, strict=False):
            bar = "#" * round(40 * count / max(counts))
            lines.append(f"{low:8.4f} .. {high:8.4f} {count:8d} {bar}".rstrip())
        return "\n".join(lines)


def load_direction(path: str | Path) -> Direction:
    """Reads a file written by `Direction.save`. ``mini/<folder>/<file>`` is a file of the bundled weights.

    Raises:
        ValueError: if the file does not exist or is not a direction file.
    """
    folder, name = Path(path).parent.as_posix(), Path(path).name
    resolved = Path(resolve_checkpoint(folder)) / name
    if not resolved.is_file():
        raise ValueError(
            f"no file '{path}'; expected a direction: 'batch', 'running' or a file written by "
            "`longalign compute-direction`"
        )
    with reading(resolved, "write one with `longalign compute-direction`"):
        with safe_open(resolved, "pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"'{path}' is not a direction file ({FORMAT}); write one with `longalign compute-direction`"
            )
        attributes = {key: json.loads(metadata[key]) for key in ("num_prompts", "eta", "inner")}
        tensors = load_tensors(resolved)
        return Direction(tensors["V"], tensors["probe"], **attributes)


def compute_direction(
    reward: EmbeddingReward, prompts: Iterable[str], batch_size: int = 64, config: PartConfig | None = None
) -> Direction:
    """Computes the common direction of a corpus (LongAlign, paper 3.2) in one pass over its prompts.

    Args:
        reward: reward that computes the text embeddings.
        prompts: the corpus, with at least two different prompts; may be a generator.
        batch_size: number of prompts encoded at a time.
        config: config of the reward, stored in the file.

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
    eta = preference.eta(torch.stack(sample), vector)
    return Direction(vector, reward.text_features(PROBE).cpu(), count, _distribution(eta), _dump(config))


def write_direction(
    config: Any, prompts: Iterable[str], output: str | Path, runtime: Runtime | None = None, batch_size: int = 64
) -> Direction:
    """Builds a reward, computes its common direction and writes it to a file: ``longalign compute-direction``.

    Args:
        config: a reward: name, mapping or config. For ``reweighted``, its inner reward is used.
        prompts: the corpus.
        output: output file, usually ``*.safetensors``.
        runtime: device and dtype of the reward.
        batch_size: number of prompts encoded at a time.

    Returns:
        The direction; see `Direction.report` for a summary.

    Raises:
        ValueError: if the reward has no text embeddings, or if there are fewer than two different prompts.
    """
    config = registry.rewards.validate(config)
    while isinstance(config, ReweightedConfig):
        config = config.inner
    reward = registry.rewards.build(config, runtime)
    if not isinstance(reward, EmbeddingReward):
        raise ValueError(
            f"expected a reward with text embeddings, got '{config.name}'; use e.g. clip, or for a sum one of its terms"
        )
    direction = compute_direction(reward, prompts, batch_size, config)
    direction.save(output)
    return direction


def _distribution(eta: Tensor) -> dict[str, Any]:
    eta = eta.double()
    quantiles = torch.quantile(eta, torch.tensor(QUANTILES, dtype=torch.float64))
    low, high = float(eta.min()), float(eta.max())
    high = high if high > low else low + 1e-6
    bins = min(NUM_BINS, math.ceil(math.sqrt(len(eta))))  # avoids mostly empty bins for few prompts
    return {
        "num_prompts": len(eta),
        "mean": eta.mean().item(),
        "std": eta.std().item(),
        "quantiles": {str(q): v for q, v in zip(QUANTILES, quantiles.tolist(), strict=True)},
        "edges": torch.linspace(low, high, bins + 1, dtype=torch.float64).tolist(),
        "counts": torch.histc(eta, bins, low, high).long().tolist(),
    }


def _batches(prompts: Iterable[str], size: int) -> Iterator[Sequence[str]]:
    iterator = iter(prompts)
    while batch := list(islice(iterator, size)):
        yield batch


def _dump(config: PartConfig | None) -> dict[str, Any]:
    return config.model_dump(mode="json") if config else {}


def _describe(inner: dict[str, Any]) -> str:
    if not inner:
        return "a reward without a config"
    keys = ("name", "checkpoint", "text", "segmenter")
    return ", ".join(f"{key} {inner[key]}" for key in keys if inner.get(key))
