"""The interface of trainers: a batch in, losses out. How they are run is the loop's business."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from longalign.backbones.base import Backbone
from longalign.backbones.configs import LoraConfig
from longalign.diffusion import add_noise, guide, sample_timesteps, training_target
from longalign.encoders.base import Conditioning, Encoder, TruncationWarning

Backward = Callable[[Tensor], None]


Wrap = Callable[[nn.Module], Any]


class Trainer(nn.Module):
    """Base of trainers: says what is optimised, and of which parameters."""

    #: whether a batch must have images; prompts alone are loaded otherwise
    needs_images: bool = True
    #: whether `step` goes backward several times, after which processes exchange their gradients once
    multiple_backward: bool = False

    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Losses and metrics of a batch ``{"prompt": list[str], "image": (b, 3, h, w) in [0, 1]}``; a run with a cache
        has ``posterior`` ``(b, 2c, h, w)`` for ``image``, see `latents_of`.

        Values whose key ends in ``_loss`` are summed and minimised, the others are logged.
        """
        raise NotImplementedError

    def step(self, batch: Mapping[str, Any], backward: Backward) -> dict[str, Tensor]:
        """Computes a batch's gradient by calling ``backward`` on scalars, whose gradients add up; returns `losses`."""
        losses = self.losses(batch)
        if not any(key.endswith("_loss") for key in losses):
            got = ", ".join(losses) or "nothing"
            raise ValueError(f"{type(self).__name__}.losses must give a value whose key ends in '_loss'; got {got}")
        backward(torch.stack([v for k, v in losses.items() if k.endswith("_loss")]).sum())
        return {key: value.detach() for key, value in losses.items()}

    def on_optimizer_step(self) -> None:
        """Told after each step of the optimiser; for what follows the trained weights."""

    def trainable(self) -> list[nn.Parameter]:
        """What is optimised."""
        return [p for p in self.parameters() if p.requires_grad]

    def prepare(self, wrap: Wrap) -> list[Any]:
        """Makes calls that carry gradient go through ``wrap(module)``, which readies a module for several processes and
        for mixed precision; returns what it gave. Once more, with the identity, when the run ends.

        The denoiser and the encoder of a `DiffusionTrainer` are the loop's business.
        """
        return []

    def check_fsdp_support(self) -> None:
        """Raises ValueError unless the denoiser's weights may be split over processes, as FSDP does."""
        raise ValueError(
            f"FSDP splits a denoiser's weights over processes, and {type(self).__name__} trains none; use accelerate's "
            "multi-GPU without FSDP"
        )

    def enable_gradient_checkpointing(self) -> None:
        """Trades time for memory in the backward pass."""
        raise ValueError(f"{type(self).__name__} recomputes no activations; set loop.gradient_checkpointing to false")

    def save(self, folder: Path) -> None:
        """Adds to the checkpoint in ``folder`` what its file does not hold; nothing by default."""


class DiffusionTrainer(Trainer):
    """Base of trainers of a backbone.

    Args:
        backbone: with what is trained of it already set, by `train_denoiser`.
        encoder: its parameters with ``requires_grad`` are its adapter.
        train_adapter: whether the adapter is trained; it is frozen otherwise.
    """

    def __init__(self, backbone: Backbone, encoder: Encoder, train_adapter: bool):
        super().__init__()
        self.backbone, self.encoder = backbone, encoder
        self._encode: tuple[Callable[[Sequence[str]], Conditioning]] = (encoder.encode,)
        self.num_truncated = 0
        for parameter in adapter(encoder).values():
            parameter.requires_grad_(train_adapter)

    def check_fsdp_support(self) -> None:
        if not any(p.requires_grad for p in self.backbone.denoiser.parameters()):
            raise ValueError(
                "FSDP splits a denoiser's weights over processes, and nothing of this one is trained; use accelerate's "
                "multi-GPU without FSDP"
            )

    def enable_gradient_checkpointing(self) -> None:
        self.backbone.enable_gradient_checkpointing()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """The encoder's conditioning, through the wrapper that the loop set, on the denoiser's device.

        The first prompt that is cut is warned of; from then on they are counted, in ``num_truncated``, which is logged.
        """
        with warnings.catch_warnings():
            if self.num_truncated:
                warnings.simplefilter("ignore", TruncationWarning)
            conditioning = self._encode[0](prompts)
        if not isinstance(conditioning, Conditioning):
            who = f"{type(self.encoder).__module__}.{type(self.encoder).__name__}"
            raise ValueError(f"the encoder {who} must return a Conditioning, not a {type(conditioning).__name__}")
        self.num_truncated += sum(bool(report.truncated) for report in conditioning.reports)
        return conditioning.to(self.backbone.device)

    def wrap_encoder(self, wrapped: Callable[[Sequence[str]], Conditioning]) -> None:
        """Makes `encode` go through ``wrapped``, the encoder prepared for several processes."""
        self._encode = (wrapped,)

    def trainable(self) -> list[nn.Parameter]:
        """Of the denoiser, then of the encoder."""
        parts = (self.backbone.denoiser, self.encoder)
        return [p for part in parts for p in part.parameters() if p.requires_grad]

    def train(self, mode: bool = True) -> DiffusionTrainer:
        """As for any module, but what is frozen stays in eval mode, so that its dropout stays off."""
        super().train(mode)
        for part in (self.backbone, self.encoder):
            _train(part, mode)
        return self


def _train(module: nn.Module, mode: bool) -> None:
    parameters = list(module.parameters())
    # A module without parameters, such as dropout, follows the one that it is part of.
    module.training = mode and (not parameters or any(p.requires_grad for p in parameters))
    for child in module.children():
        _train(child, module.training)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, a module and all that it holds is in eval mode; outside, each is as it was."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes:
            m.training = mode


def adapter(encoder: Encoder) -> dict[str, nn.Parameter]:
    """The encoder's adapter by name: what could be trained when the encoder was built, also if it is frozen now."""
    names = encoder.__dict__.setdefault(
        "_adapter_names", tuple(name for name, p in encoder.named_parameters() if p.requires_grad)
    )
    parameters = dict(encoder.named_parameters())
    return {name: parameters[name] for name in names}


def train_denoiser(backbone: Backbone, lora: LoraConfig | None, name: str) -> None:
    """Makes a new LoRA trainable, named ``name`` or ``name-2``, ``name-3``... where that is taken; or all weights."""
    if lora is None:
        backbone.train_all()
    else:
        backbone.add_lora(lora, backbone.unused_name(name))


def latents_of(backbone: Backbone, batch: Mapping[str, Any], what: str) -> Tensor:
    """Latents ``(b, c, h, w)`` of the batch's images, sampled from the posterior that the autoencoder gives them, or
    gave them when they were cached.

    Args:
        backbone: has the autoencoder.
        batch: with ``image`` ``(b, 3, h, w)`` in [0, 1], or ``posterior`` ``(b, 2c, h, w)``.
        what: who needs them, for the ValueError where there are neither.
    """
    if "posterior" in batch:
        return backbone.sample_latents(batch["posterior"])
    if "image" not in batch:
        raise ValueError(f"{what} needs images, and the data has prompts only; choose data with images")
    return backbone.encode_images(batch["image"])


def guided(
    denoise: Callable[[Tensor, Tensor, Conditioning], Tensor],
    latents: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    rows: Tensor,
    scale: float | Tensor,
) -> Tensor:
    """The answer ``(b, c, h, w)`` under classifier-free guidance, both branches in one call.

    Args:
        denoise: `Backbone.predict` or `Backbone.predict_reference`.
        latents: ``(b, c, h, w)``.
        timesteps: ``(b,)``.
        told: conditioning of prompts and, as its last row, of the empty prompt, so that both have the same length.
        rows: ``(b,)`` which of ``told`` belongs to each of the latents.
        scale: of guidance, one or ``(b, 1, 1, 1)``.
    """
    branches = conditioning[torch.cat([rows, torch.full_like(rows, len(conditioning.states) - 1)])]
    conditional, unconditional = denoise(torch.cat([latents] * 2), torch.cat([timesteps] * 2), branches).chunk(2)
    return guide(conditional, unconditional, scale)


def noise_loss(backbone: Backbone, latents: Tensor, conditioning: Conditioning, density: str | None = None) -> Tensor:
    """Mean squared error of the denoiser's answer at random timesteps (arXiv 2006.11239, eq. 14); a scalar.

    Args:
        backbone: whose denoiser answers, noise, velocity or flow as it was trained.
        latents: ``(b, c, h, w)`` of images.
        conditioning: of their captions.
        density: of the timesteps, see `sample_timesteps`; None is ``"logit-normal"`` for flows, else ``"uniform"``.
    """
    if density is None:
        density = "logit-normal" if backbone.prediction == "flow" else "uniform"
    noise = torch.randn_like(latents)
    timesteps = sample_timesteps(density, backbone.noise_levels, len(latents), latents.device)
    noisy = add_noise(backbone.noise_levels, latents, noise, timesteps)
    target = training_target(backbone.prediction, backbone.noise_levels, latents, noise, timesteps)
    return mse_loss(backbone.predict(noisy, timesteps, conditioning).float(), target.float())
