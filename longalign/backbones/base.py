"""The interface of backbones: latents and a conditioning in, the denoiser's answer out; and what of it is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longalign.backbones.configs import LoraConfig
from longalign.backbones.lora import (
    LoraWeights,
    check_same_names,
    inject_lora,
    merge_into_base,
    read_lora,
    without_lora,
    write_lora,
)
from longalign.diffusion import NoiseLevels, check_prediction
from longalign.encoders.base import Conditioning
from longalign.sharding import gather_full


class Backbone(nn.Module):
    """Base of backbones: a denoiser in a latent space, its noise levels, and the stack of LoRAs on it.

    Nothing is trainable until `add_lora` or `train_all` is called. Of several LoRAs only the last is kept apart in the
    network; the earlier ones are merged into its weights, and remembered so that a checkpoint holds them all.

    Args:
        denoiser: a diffusers network.
        prediction: what it answers: ``"epsilon"``, ``"v_prediction"`` or ``"flow"``.
        levels: what there is of signal and noise at each of the timesteps that it was trained with.
        resolution: native width and height of an image in pixels.
    """

    def __init__(self, denoiser: nn.Module, prediction: str, noise_levels: NoiseLevels, resolution: int):
        super().__init__()
        check_prediction(prediction)
        self.denoiser: Any = denoiser.requires_grad_(False)
        self.prediction = prediction
        self.noise_levels = noise_levels
        self.resolution = resolution
        self.full_finetune = False
        self._merged: list[LoraWeights] = []
        self._active: tuple[str, LoraConfig] | None = None
        # In tuples, so that they are no submodules: the wrapped network holds the denoiser itself.
        self._call: tuple[Callable[..., Any]] = (self.denoiser,)
        self._reference: tuple[nn.Module, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """``(c, h, w)`` of the latents of an image of ``height`` by ``width`` pixels (native resolution if None)."""
        raise NotImplementedError

    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images ``(b, 3, h, w)`` in [0, 1] to scaled latents, sampled from the VAE's posterior, without gradient."""
        return self.sample_latents(self.posterior(images), generator)

    def posterior(self, images: Tensor) -> Tensor:
        """What `encode_images` samples from, ``(b, 2c, h, w)`` without gradient: it can be kept in their place."""
        raise NotImplementedError

    def sample_latents(self, posterior: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents ``(b, c, h, w)`` from what `posterior` gave."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents to images ``(b, 3, h, w)`` clamped to [0, 1], with gradient."""
        raise NotImplementedError

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's answer ``(b, c, h, w)`` to latents at ``timesteps`` ``(b,)``, which are places in `levels`."""
        return self.call(self._call[0], latents, timesteps, conditioning)

    def call(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """How ``denoiser`` is asked; concrete backbones say this once for all uses."""
        raise NotImplementedError

    def wrap_denoiser(self, wrapped: Callable[..., Any]) -> None:
        """Makes `predict` go through ``wrapped``, the denoiser prepared for several processes."""
        self._call = (wrapped,)

    def enable_gradient_checkpointing(self) -> None:
        """Trades time for memory in the denoiser's backward pass."""
        self.denoiser.enable_gradient_checkpointing()

    def use_channels_last(self) -> None:
        """Lays the weights of all convolutions out with channels last, as tensor cores and many CPUs like them.

        What is saved has the usual layout. Raises ValueError for a denoiser without convolutions.
        """
        if not any(isinstance(module, nn.Conv2d) for module in self.denoiser.modules()):
            raise ValueError(
                f"channels_last is a layout of convolutions, and {type(self.denoiser).__name__} has none; leave it out"
            )
        for module in (self, *self._reference):
            module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    # What is trained

    def add_lora(self, lora: LoraConfig, name: str) -> list[nn.Parameter]:
        """Puts one more LoRA on top, merging an earlier one, and returns its parameters, which are trainable.

        Raises:
            ValueError: if the name is taken.
        """
        self.merge_lora()
        if name in (stack.name for stack in self._merged):
            raise ValueError(f"there is a LoRA '{name}' already; expected a name other than {self.lora_names}")
        parameters = inject_lora(self.denoiser, lora, name)
        self._active = (name, lora)
        return parameters

    def merge_lora(self) -> None:
        """Merges the LoRA that is apart, if any, into the weights; nothing is trainable afterwards."""
        if self._active is None:
            return
        stack = self._active_lora()
        merge_into_base(self.denoiser, stack.name)
        self._active = None
        # Full weights contain what was merged into them; listing it again would apply it twice.
        self._merged += [] if self.full_finetune else [stack]

    def cast(self, dtype: torch.dtype) -> None:
        """Casts the denoiser."""
        if self.denoiser.dtype != dtype:
            # diffusers' own method warns of any cast, also where no module has to stay in float32
            kept = getattr(self.denoiser, "_keep_in_fp32_modules", None)
            self.denoiser.to(dtype) if kept else nn.Module.to(self.denoiser, dtype)

    def train_all(self) -> list[nn.Parameter]:
        """Makes every weight of the denoiser trainable, in float32, and returns them."""
        self.merge_lora()
        self._merged, self.full_finetune = [], True
        self.denoiser.float().requires_grad_(True)
        return list(self.denoiser.parameters())

    def unused_name(self, name: str) -> str:
        """``name``, or ``name-2``, ``name-3``... where LoRAs of that name are there."""
        names, number = self.lora_names, 1
        while (name if number == 1 else f"{name}-{number}") in names:
            number += 1
        return name if number == 1 else f"{name}-{number}"

    @property
    def lora_names(self) -> list[str]:
        """Names of the LoRAs, the first applied first."""
        return [stack.name for stack in self._merged] + ([self._active[0]] if self._active else [])

    def _active_lora(self) -> LoraWeights:
        assert self._active is not None
        name, config = self._active
        state = {k: gather_full(v).to("cpu", copy=True).contiguous() for k, v in read_lora(self.denoiser, name).items()}
        return LoraWeights(name, config, state)

    def lora_state(self) -> list[LoraWeights]:
        """All LoRAs, merged or not, on the CPU, the first applied first."""
        return self._merged + ([self._active_lora()] if self._active else [])

    def load_lora(self, loras: Sequence[LoraWeights]) -> None:
        """Puts LoRAs on a backbone that has none, in order; the last stays apart, frozen."""
        if self.lora_names:
            raise ValueError(f"expected a backbone without LoRA, this one has {self.lora_names}; build it anew")
        for stack in loras:
            self.add_lora(stack.config, stack.name)
            write_lora(self.denoiser, stack.name, stack.state)
        self.denoiser.requires_grad_(False)

    def set_lora(self, state: Mapping[str, Tensor]) -> None:
        """Copies weights into the LoRA that is apart."""
        if self._active is None:
            raise ValueError("there is no LoRA to copy weights into; call add_lora first")
        write_lora(self.denoiser, self._active[0], state)

    def full_state(self) -> dict[str, Tensor]:
        """The denoiser's own weights on the CPU, without the LoRA that is apart."""
        state = {}
        for key, tensor in self.denoiser.state_dict().items():
            if ".lora_" not in key:
                state[key.replace(".base_layer.", ".")] = gather_full(tensor.detach()).to("cpu", copy=True).contiguous()
        return state

    def load_full(self, state: Mapping[str, Tensor]) -> None:
        """Replaces the denoiser's own weights; what is saved from now on holds them all."""
        if self.lora_names:
            raise ValueError(f"expected a backbone without LoRA, this one has {self.lora_names}; build it anew")
        check_same_names("the denoiser", self.denoiser.state_dict(), state)
        self.denoiser.float().load_state_dict(dict(state))
        self.full_finetune = True

    # The model that training started from

    def keep_reference_model(self) -> None:
        """Keeps a float32 copy of the current weights, LoRAs merged, for `predict_reference` in full fine-tuning."""
        self.merge_lora()
        self._reference = (copy.deepcopy(self.denoiser).float().eval().requires_grad_(False),)

    @torch.no_grad()
    def predict_reference(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """As `predict`, by the model that training started from and without gradient."""
        if self._active is not None:
            with without_lora(self.denoiser, self._active[0]):
                return self.call(self.denoiser, latents, timesteps, conditioning)
        if not self._reference:
            raise ValueError("the start model was not kept; call keep_reference_model before training all weights")
        return self.call(self._reference[0], latents, timesteps, conditioning)
