"""Training of CLIP as a preference model for long texts, encoded in segments (Denscore, LongAlign, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from longalign.files.paths import REWARD
from longalign.functional import preference
from longalign.runtime import Runtime
from longalign.trainers.base import Backward, Trainer, Wrap
from longalign.trainers.denscore.config import DenscoreTrainerConfig

if TYPE_CHECKING:
    from longalign.rewards.towers import TowerReward

#: maximum inverse temperature, as in CLIP (arXiv 2103.00020, section 2.5)
MAX_SCALE = 100.0


class Embed(nn.Module):
    """Computes all embeddings of a CLIP reward in one forward pass, which is what accelerate's wrappers call."""

    def __init__(self, reward: TowerReward):
        super().__init__()
        self.reward = reward

    def forward(self, images: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor, list[list[str]], Tensor]:
        """Embeds images ``(b, 3, h, w)`` in [0, 1] and the segments of all texts, e.g. their sentences.

        Returns:
            Unit embeddings ``(b, d)`` of the images, unit embeddings ``(m, d)`` of the m segments of all texts, the
            segments of each text as strings, and the inverse temperature ``()``.
        """
        embeddings, segments = self.reward.segment_features(texts)
        return self.reward.image_features(images), embeddings, segments, self.reward.towers.logit_scale.exp()


class DenscoreTrainer(Trainer):
    """Trains a reward to predict which of two images of a prompt is preferred, and which image each segment describes.

    The preference loss compares the scores of the two images. With the reward's setting ``text: segments``, a score is
    the mean over the text's segments of the cosine similarity with the image. The contrastive loss compares segments
    with all images of the batch. Both losses are computed over the batches of all processes together, so the gradient
    of a global batch does not depend on the number of processes.

    Args:
        reward: a reward with a CLIP model, whose trainable parameters are set here.
        runtime: device, and communication between processes.
        train: trainable parameters: ``"all"``, one tower (``"text"`` or ``"vision"``), or only the ``"projections"``.
        preference_weight: factor of ``preference_loss``; 0 disables it.
        contrastive_weight: factor of ``contrastive_loss``; 0 disables it.

    Raises:
        ValueError: if the reward cannot be trained.
    """

    def __init__(
        self,
        reward: TowerReward,
        runtime: Runtime,
        *,
        train: Literal["all", "text", "vision", "projections"],
        preference_weight: float,
        contrastive_weight: float,
    ):
        super().__init__()
        self.reward, self.runtime = reward, runtime
        reward.towers.train_only(train)
        self.preference_weight, self.contrastive_weight = preference_weight, contrastive_weight
        self._embed: tuple[Any] = (Embed(reward),)

    @classmethod
    def from_config(
        cls, config: DenscoreTrainerConfig, runtime: Runtime, *, rewards: Sequence[TowerReward]
    ) -> DenscoreTrainer:
        """Sets the trainable parameters of the run's reward, and builds the trainer.

        Raises:
            ValueError: if ``rewards`` does not contain exactly one reward.
        """
        if len(rewards) != 1:
            raise ValueError(f"'denscore' trains one reward, got {len(rewards)}; set exactly one in rewards")
        return cls(
            rewards[0],
            runtime,
            train=config.train,
            preference_weight=config.preference_weight,
            contrastive_weight=config.contrastive_weight,
        )

    def prepare(self, wrap: Wrap) -> list[Any]:
        self._embed = (wrap(Embed(self.reward)),)
        return list(self._embed)

    def enable_gradient_checkpointing(self) -> None:
        self.reward.towers.enable_gradient_checkpointing()

    def save(self, folder: Path) -> None:
        """Saves the trained reward to ``reward/`` in ``folder``, as a transformers ``CLIPModel`` with processor."""
        self.reward.save(folder / REWARD)

    @torch.no_grad()
    def on_optimizer_step(self) -> None:
        # Clamping in the loss would zero the gradient at the limit, where CLIP's temperature starts.
        self.reward.towers.logit_scale.clamp_(max=math.log(MAX_SCALE))

    def loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Computes losses and metrics over the batches of all processes.

        Metrics:

        - ``agreement``: fraction of pairs whose preferred image scores higher; a tie counts half.
        - ``r_at_1``: fraction of texts whose highest-scoring image is the matching one. For captions, the candidates
          are all images of the batch. For prompts, the candidates are the preferred images, one of each pair.
        - ``segment_r_at_1``: like ``r_at_1``, but for single segments instead of the mean over a text's segments.
        - ``eta``: mean dot product of the prompts' embeddings with their common direction, the normalized mean of these
          embeddings (LongAlign, section 4).
        - ``scale``: inverse temperature.

        The losses are ``preference_loss`` and ``contrastive_loss``, multiplied by their weights.

        Args:
            batch: dict with b texts ``prompt``, images ``image`` ``(b, 2, 3, h, w)`` in [0, 1], and ``preference``
                ``(b,)``, the fraction of annotators who prefer the first image. ``captions`` is optional and contains b
                pairs of texts, one text per image.
        """
        prompts, captions = list(batch["prompt"]), batch.get("captions")
        b, device = len(prompts), self.runtime.device
        captions = [text for pair in captions for text in pair] if captions is not None else []
        image_embeddings, embeddings, segments, scale = self._embed[0](
            rearrange(batch["image"].to(device), "b pair c h w -> (b pair) c h w"), [*prompts, *captions]
        )
        lengths = [len(text_segments) for text_segments in segments]
        images = self.all_gather(rearrange(image_embeddings, "(b pair) d -> b pair d", pair=2))
        all_images = rearrange(images, "b pair d -> (b pair) d")
        preferences = self.all_gather(batch["preference"].to(device))
        means = torch.stack([part.mean(0) for part in embeddings.split(lengths)])
        prompt_means = self.all_gather(means[:b])
        # The contrastive loss is over captions if there are any, else over prompts.
        first_text = b if captions else 0
        text_means = self.all_gather(means[b:]) if captions else prompt_means
        embeddings = self.all_gather(embeddings[sum(lengths[:first_text]) :])
        counts = self.all_gather(torch.tensor(lengths[first_text:], device=device))
        text_index = torch.arange(len(text_means), device=device).repeat_interleave(counts)
        # Each process has the full gradient of the temperature, but only that of its own embeddings.
        scale = scale.detach() + (scale - scale.detach()) / self.runtime.world_size

        out: dict[str, Tensor] = {}
        scores = torch.einsum("bid,bd->bi", images, prompt_means)
        pair_targets = torch.stack([preferences, 1 - preferences], 1)
        if self.preference_weight:
            out["preference_loss"] = self.preference_weight * divergence(scale * scores, pair_targets)
        if self.contrastive_weight:
            logits = scale * embeddings @ all_images.T
            if captions:
                text_targets = torch.eye(len(text_means), device=device)
            else:
                text_targets = torch.block_diag(*pair_targets.split(1))
            # Equal segments share one target over all their images, so that none of these is a negative.
            hashes = self.all_gather(self.segment_hashes([s for text in segments[first_text:] for s in text]))
            same_text = (hashes[:, None] == hashes).float()
            targets = same_text @ text_targets[text_index] / same_text.sum(1, keepdim=True)
            out["contrastive_loss"] = self.contrastive_weight * divergence(logits, targets)
        with torch.no_grad():
            if captions:
                candidates = all_images
            else:
                candidates = images[torch.arange(len(images), device=device), pair_targets.argmax(1)]
            best = (text_means @ candidates.T).argmax(1)
            out["agreement"] = pairwise_accuracy(scores, preferences)
            out["r_at_1"] = (best == torch.arange(len(text_means), device=device)).float().mean()
            out["segment_r_at_1"] = ((embeddings @ candidates.T).argmax(1) == text_index).float().mean()
            out["eta"] = preference.eta(prompt_means, preference.common_direction(prompt_means)).mean()
            out["scale"] = scale.detach()
        return out

    def segment_hashes(self, segments: Sequence[str]) -> Tensor:
        """Returns 64-bit hashes of n texts, int64 ``(n,)``, with which equal segments are found in all processes."""
        hashes = [int.from_bytes(blake2b(s.encode(), digest_size=8).digest(), signed=True) for s in segments]
        return torch.tensor(hashes, device=self.runtime.device)

    def step(self, batch: Mapping[str, Any], backward: Backward) -> dict[str, Tensor]:
        # Gradients are averaged over processes, and each process has only those of its own rows.
        return super().step(batch, lambda total: backward(self.runtime.world_size * total))

    def all_gather(self, local: Tensor) -> Tensor:
        """Concatenates the rows ``(n, ...)`` of all processes; n may differ. Only rows of this process get gradient."""
        counts = self.runtime.gather(torch.tensor([len(local)], device=local.device)).tolist()
        padded = local.new_zeros((max(counts), *local.shape[1:]))
        padded[: len(local)] = local.detach()
        parts = self.runtime.gather(padded).split(max(counts))
        rows = [part[:count] for part, count in zip(parts, counts, strict=True)]
        rows[self.runtime.rank] = local
        return torch.cat(rows)


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Returns the KL divergence from ``target`` to the softmax of ``logits``, averaged over rows.

    With two images per row, this is PickScore's loss (arXiv 2305.01569, section 3).

    Args:
        logits: ``(n, m)``.
        target: ``(n, m)`` probabilities; each row sums to 1.
    """
    return F.kl_div(logits.log_softmax(-1), target, reduction="batchmean")


def pairwise_accuracy(scores: Tensor, preferences: Tensor) -> Tensor:
    """Returns the fraction of pairs whose preferred image has the higher score, a tensor ``()``.

    Args:
        scores: ``(b, 2)`` scores of the two images of each pair.
        preferences: ``(b,)`` fraction of annotators who prefer the first image. 0.5 is a tie, which counts half.
    """
    correct = (scores[:, 0] > scores[:, 1]) == (preferences > 0.5)
    return torch.where(preferences == 0.5, 0.5, correct.float()).mean()
