"""Training a CLIP into a preference model of long texts, read segment by segment (Denscore, LongAlign, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longalign import preference
from longalign.files import REWARD
from longalign.runtime import Runtime
from longalign.trainers.base import Backward, Trainer, Wrap

if TYPE_CHECKING:
    from longalign.rewards.towers import TowerReward

#: the largest inverse temperature, as in CLIP (arXiv 2103.00020, section 2.5)
MAX_SCALE = 100.0


class Embed(nn.Module):
    """All calls of a reward that carry gradient, as one forward pass, which wrappers of accelerate expect."""

    def __init__(self, reward: TowerReward):
        super().__init__()
        self.reward = reward

    def forward(self, images: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor, list[list[str]], Tensor]:
        """Unit embeddings of the images and of the texts' segments, the segments of each text, and the inverse
        temperature."""
        segments, split = self.reward.segment_features(texts)
        return self.reward.image_features(images), segments, split, self.reward.towers.logit_scale.exp()


class DenscoreTrainer(Trainer):
    """Teaches a reward which of two images of a prompt people prefer, and which image each segment of a text tells of.

    The scores that are compared are the reward's own: with ``text: segments`` the mean over segments of their cosine
    with the image. Both losses are over the batches of all processes together, so several processes train as one does
    with the same global batch.

    Args:
        reward: a CLIP; what is trained of it is set here.
        runtime: how processes talk.
        train: what is trained: ``"all"``, one tower (``"text"`` or ``"vision"``), or the ``"projections"`` alone.
        preference_weight: factor of `preference_loss`; 0 leaves it out.
        contrastive_weight: factor of `contrastive_loss`; 0 leaves it out.

    Raises:
        ValueError: if the reward cannot be trained.
    """

    def __init__(
        self,
        reward: TowerReward,
        runtime: Runtime | None = None,
        *,
        train: Literal["all", "text", "vision", "projections"] = "all",
        preference_weight: float = 1.0,
        contrastive_weight: float = 0.5,
    ):
        super().__init__()
        self.reward, self.runtime = reward, runtime or Runtime()
        reward.towers.train_only(train)
        self.preference_weight, self.contrastive_weight = preference_weight, contrastive_weight
        self._embed: tuple[Any] = (Embed(reward),)

    def prepare(self, wrap: Wrap) -> list[Any]:
        self._embed = (wrap(Embed(self.reward)),)
        return list(self._embed)

    def enable_gradient_checkpointing(self) -> None:
        self.reward.towers.enable_gradient_checkpointing()

    def save(self, folder: Path) -> None:
        """Writes ``reward/``, a transformers ``CLIPModel`` with its processor, which rewards are loaded from."""
        self.reward.save(folder / REWARD)

    @torch.no_grad()
    def on_optimizer_step(self) -> None:
        # Not in the loss, where a clamp would stop the gradient of a temperature at its limit, where CLIP's start.
        self.reward.towers.logit_scale.clamp_(max=math.log(MAX_SCALE))

    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses and metrics of a batch of all processes.

        ``agreement``: share of pairs whose preferred image scores higher; a pair without preference counts half.
        ``r_at_1``: share of texts whose own image scores highest among those of the batch, with the mean over segments;
        ``segment_r_at_1``: the same for single segments. The texts are the images' captions, or, where there are none,
        the prompts, among the preferred images. ``eta``: mean length of the prompts' embeddings along their common
        direction. ``scale``: the inverse temperature.

        Args:
            batch: ``prompt``, b texts; ``image`` ``(b, 2, 3, h, w)`` in [0, 1]; ``preference`` ``(b,)``, the share of
                people who prefer the first image; ``captions``, b pairs of texts, one for each image, or absent.
        """
        prompts, captions = list(batch["prompt"]), batch.get("captions")
        b, device = len(prompts), self.runtime.device
        conditioning = [text for pair in captions for text in pair] if captions is not None else []
        found, segments, split, scale = self._embed[0](
            batch["image"].to(device).flatten(0, 1), [*prompts, *conditioning]
        )
        lengths = [len(of) for of in split]
        images = self.all_gather(found.view(b, 2, -1))
        first = self.all_gather(batch["preference"].to(device))
        means = torch.stack([part.mean(0) for part in segments.split(lengths)])
        prompt = self.all_gather(means[:b])
        own = sum(lengths[:b]) if conditioning else 0
        texts = self.all_gather(means[b:]) if conditioning else prompt
        segments = self.all_gather(segments[own:])
        counts = self.all_gather(torch.tensor(lengths[b if conditioning else 0 :], device=device))
        owner = torch.arange(len(texts), device=device).repeat_interleave(counts)
        # Each process has the whole gradient of the temperature, and of the embeddings that of its own ones.
        scale = scale.detach() + (scale - scale.detach()) / self.runtime.processes

        out: dict[str, Tensor] = {}
        scores = torch.einsum("bid,bd->bi", images, prompt)
        target = torch.stack([first, 1 - first], 1)
        if self.preference_weight:
            out["preference_loss"] = self.preference_weight * divergence(scale * scores, target)
        if self.contrastive_weight:
            logits = scale * segments @ images.flatten(0, 1).T
            whose = torch.eye(len(texts), device=device) if conditioning else torch.block_diag(*target.split(1))
            # The same words tell of all their images alike; no image of theirs is a negative of another.
            keys = self.all_gather(self.keys([segment for of in split[b if conditioning else 0 :] for segment in of]))
            alike = (keys[:, None] == keys).float()
            wanted = alike @ whose[owner] / alike.sum(1, keepdim=True)
            out["contrastive_loss"] = self.contrastive_weight * divergence(logits, wanted)
        with torch.no_grad():
            shown = (
                images.flatten(0, 1)
                if conditioning
                else images[torch.arange(len(images), device=device), target.argmax(1)]
            )
            out["agreement"] = pairwise_accuracy(scores, first)
            out["r_at_1"] = ((texts @ shown.T).argmax(1) == torch.arange(len(texts), device=device)).float().mean()
            out["segment_r_at_1"] = ((segments @ shown.T).argmax(1) == owner).float().mean()
            out["eta"] = preference.eta(prompt, preference.common_direction(prompt)).mean()
            out["scale"] = scale.detach()
        return out

    def keys(self, segments: Sequence[str]) -> Tensor:
        """A number ``(n,)`` for each segment, equal for equal words."""
        digests = [int.from_bytes(blake2b(s.encode(), digest_size=8).digest(), signed=True) for s in segments]
        return torch.tensor(digests, device=self.runtime.device)

    def step(self, batch: Mapping[str, Any], backward: Backward) -> dict[str, Tensor]:
        losses = self.losses(batch)
        # Processes take the mean of their gradients, each of which is that of its own rows.
        total = torch.stack([value for key, value in losses.items() if key.endswith("_loss")]).sum()
        backward(self.runtime.processes * total)
        return {key: value.detach() for key, value in losses.items()}

    def all_gather(self, local: Tensor) -> Tensor:
        """The rows ``(n, ...)`` of all processes, whose n may differ; with gradient through this process's own."""
        counts = self.runtime.gather(torch.tensor([len(local)], device=local.device)).tolist()
        padded = local.new_zeros((max(counts), *local.shape[1:]))
        padded[: len(local)] = local.detach()
        parts = self.runtime.gather(padded).split(max(counts))
        rows = [part[:count] for part, count in zip(parts, counts, strict=True)]
        rows[self.runtime.rank] = local
        return torch.cat(rows)


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over rows of the KL divergence from ``target`` ``(n, m)``, rows of which sum to 1, to the softmax of
    ``logits`` ``(n, m)``; a scalar. With two images a row it is PickScore's loss (arXiv 2305.01569, section 3)."""
    return F.kl_div(logits.log_softmax(-1), target, reduction="batchmean")


def pairwise_accuracy(scores: Tensor, first: Tensor) -> Tensor:
    """Share of pairs whose scores ``(b, 2)`` are ordered as the preferences ``first`` ``(b,)`` for the first image are;
    pairs without preference count half."""
    right = (scores[:, 0] > scores[:, 1]) == (first > 0.5)
    return torch.where(first == 0.5, 0.5, right.float()).mean()
