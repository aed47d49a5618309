"""Base class of trainers of a diffusion model, and functions shared by their losses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from longalign.backbones.base import Backbone
from longalign.backbones.config import LoraConfig
from longalign.encoders.base import Conditioning, Encoder, TruncationWarning
from longalign.functional.diffusion import (
    Guide,
    add_noise,
    guide,
    predict_guided,
    sample_timesteps,
    training_target,
)
from longalign.trainers.base import Trainer, Wrap


class EncodeModule(nn.Module):
    """Wraps an encoder so that its forward pass is `Encoder.encode`: accelerate's wrappers call the forward pass."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, prompts: Sequence[str]) -> Conditioning:
        return self.encoder.encode(prompts)


class DiffusionTrainer(Trainer):
    """Base class of trainers that train a backbone's denoiser and, with ``train_adapter``, an encoder's adapter.

    Args:
        backbone: backbone whose trainable parameters were set by `train_denoiser`.
        encoder: encodes the prompts. Its adapter consists of the layers after the frozen text models, if it has any.
        train_adapter: whether to train the adapter; otherwise it is frozen.
    """

    def __init__(self, backbone: Backbone, encoder: Encoder, train_adapter: bool):
        super().__init__()
        self.backbone, self.encoder = backbone, encoder
        # Tuples keep nn.Module from registering the wrapped modules as submodules.
        self._denoiser: tuple[Any] = (backbone.denoiser,)
        self._encode: tuple[Callable[[Sequence[str]], Conditioning]] = (encoder.encode,)
        encoder.train_adapter(train_adapter)

    def prepare(self, wrap: Wrap) -> list[Any]:
        """Wraps those of denoiser and encoder that have trainable parameters, and returns the wrappers.

        The backbone keeps the unwrapped denoiser, so that wrappers and compilers add no prefix to weight names.
        """
        denoiser, autocast, wrapped = self.backbone.denoiser, nullcontext, []
        if _is_trainable(denoiser):
            denoiser, autocast = wrap(denoiser), self.autocast
            wrapped.append(denoiser)
        self._denoiser = (denoiser,)
        self.backbone.wrap_denoiser(denoiser, autocast)
        if _is_trainable(self.encoder):
            wrapped.append(wrap(EncodeModule(self.encoder)))
            self.wrap_encoder(wrapped[-1])
        return wrapped

    def compile_denoiser(self, compile: Callable[..., Any], blocks: bool = False) -> None:
        if blocks:
            self.backbone.compile_blocks(compile)
        else:
            self.backbone.wrap_denoiser(compile(self._denoiser[0]), self.backbone.autocast)

    def fsdp_module(self, precision: str) -> nn.Module:
        if not _is_trainable(self.backbone.denoiser):
            raise ValueError(
                "FSDP shards the weights of a denoiser, but this denoiser has no trainable parameters; use "
                "accelerate's multi-GPU without FSDP"
            )
        if precision != "no" and self.backbone.prediction == "flow":
            raise ValueError(
                f"FSDP casts the denoiser's inputs to {precision}, which rounds the timesteps of a flow; "
                "set loop.precision to no and, for a LoRA, backbone.dtype to bfloat16"
            )
        return self.backbone.denoiser

    def enable_gradient_checkpointing(self) -> None:
        self.backbone.enable_gradient_checkpointing()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encodes b prompts and moves the conditioning to the denoiser's device.

        A `TruncationWarning` is issued only for the first batch with a truncated prompt. ``self.num_truncated`` counts
        all truncated prompts; it is logged as ``truncated_prompts``.

        Returns:
            The conditioning, with b rows and empty ``reports``.

        Raises:
            ValueError: if the encoder returns no `Conditioning`.
        """
        with warnings.catch_warnings():
            if self.num_truncated:
                warnings.simplefilter("ignore", TruncationWarning)
            conditioning = self._encode[0](prompts)
        if not isinstance(conditioning, Conditioning):
            name = f"{type(self.encoder).__module__}.{type(self.encoder).__name__}"
            raise ValueError(f"the encoder {name} returned a {type(conditioning).__name__}; return a Conditioning")
        self.num_truncated += sum(bool(report.truncated) for report in conditioning.reports)
        # without the reports: selecting rows of these by an index on a GPU waits for the GPU
        return replace(conditioning, reports=()).to(self.backbone.device)

    def wrap_encoder(self, wrapped: Callable[[Sequence[str]], Conditioning]) -> None:
        """Sets the callable that `encode` uses, e.g. the encoder wrapped for distributed training."""
        self._encode = (wrapped,)

    def trainable(self) -> list[nn.Parameter]:
        """Returns the trainable parameters of the denoiser, then of the encoder."""
        parts = (self.backbone.denoiser, self.encoder)
        return [p for part in parts for p in part.parameters() if p.requires_grad]

    def train(self, mode: bool = True) -> DiffusionTrainer:
        """Sets training mode. Frozen modules stay in eval mode, so that their dropout is inactive.

        Call it again after a change of ``requires_grad``.
        """
        super().train(mode)
        for part in (self.backbone, self.encoder):
            _set_training(part, mode)
        return self


def _is_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _set_training(module: nn.Module, mode: bool) -> None:
    parameters = list(module.parameters())
    # Modules without parameters, such as dropout, take the mode of their parent.
    module.training = mode and (not parameters or any(p.requires_grad for p in parameters))
    for child in module.children():
        _set_training(child, module.training)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Context manager: sets eval mode on a module and its submodules, and restores the mode of each on exit."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def train_denoiser(backbone: Backbone, lora: LoraConfig | None, name: str) -> None:
    """Adds a trainable LoRA to the backbone, or makes all weights of the denoiser trainable if ``lora`` is None.

    A former LoRA is merged into the weights. The new LoRA is called ``name``, or ``name-2``, ``name-3`` and so on if
    that name exists.
    """
    if lora is None:
        backbone.train_all()
    else:
        backbone.add_lora(lora, backbone.unused_name(name))


def batch_latents(backbone: Backbone, batch: Mapping[str, Any], caller: str) -> Tensor:
    """Samples scaled latents ``(b, c, h, w)`` of a batch's images from the cached or computed posterior of the VAE.

    Args:
        backbone: backbone with the VAE.
        batch: dict with ``image`` ``(b, 3, h, w)`` in [0, 1], or with ``posterior`` ``(b, 2c, h, w)``, the output of
            `Backbone.posterior`.
        caller: name of the trainer or setting that needs images, for the error message.

    Raises:
        ValueError: if the batch contains neither ``image`` nor ``posterior``.
    """
    if "posterior" in batch:
        return backbone.sample_latents(batch["posterior"])
    if "image" not in batch:
        raise ValueError(f"{caller} needs images, but the data has prompts only; choose data with images")
    return backbone.encode_images(batch["image"])


def guided_prediction(
    denoise: Callable[[Tensor, Tensor, Conditioning], Tensor],
    latents: Tensor,
    timesteps: Tensor,
    conditioning: Conditioning,
    rows: Tensor,
    scale: float | Tensor,
    combine: Guide = guide,
) -> Tensor:
    """Returns predictions ``(b, c, h, w)`` with classifier-free guidance; see `longalign.functional.predict_guided`.

    Args:
        denoise: `Backbone.predict` or `Backbone.predict_reference`.
        latents: ``(b, c, h, w)`` noisy latents.
        timesteps: ``(b,)`` timesteps, indices of the backbone's noise levels.
        conditioning: conditioning of the prompts and, in the last row, of the empty prompt.
        rows: ``(b,)`` for each latent, the index of its prompt's row in ``conditioning``.
        scale: guidance scale, a scalar or ``(b, 1, 1, 1)``; 1 is the conditional prediction.
        combine: combines the conditional and the unconditional prediction; see `Backbone.guide`.
    """
    branches = conditioning[torch.cat([rows, torch.full_like(rows, len(conditioning.states) - 1)])]
    return predict_guided(lambda x, t: denoise(x, t, branches), latents, timesteps, scale, combine)


def noise_loss(backbone: Backbone, latents: Tensor, conditioning: Conditioning, density: str | None = None) -> Tensor:
    """Returns the diffusion loss: the mean squared error of predictions at random timesteps, a tensor ``()``.

    For noise prediction, this is eq. 14 of arXiv 2006.11239. Timestep and noise are sampled for each latent.

    Args:
        backbone: backbone whose denoiser predicts noise, velocity or flow-matching velocity.
        latents: ``(b, c, h, w)`` scaled clean latents of images.
        conditioning: conditioning of the captions of the images.
        density: sampling density of the timesteps, ``"uniform"`` or ``"logit-normal"``; see
            `longalign.functional.sample_timesteps`. None uses ``"logit-normal"`` for flow-matching models and
            ``"uniform"`` for others.
    """
    if density is None:
        density = "logit-normal" if backbone.prediction == "flow" else "uniform"
    noise = torch.randn_like(latents)
    levels = backbone.levels_at(latents.shape[1:])
    timesteps = sample_timesteps(density, levels, len(latents), latents.device)
    noisy = add_noise(levels, latents, noise, timesteps)
    target = training_target(backbone.prediction, levels, latents, noise, timesteps)
    return mse_loss(backbone.predict(noisy, timesteps, conditioning).float(), target.float())
