"""Interface of backbones: predictions from latents and a conditioning, LoRAs and full fine-tuning."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from longalign.backbones.config import LoraConfig
from longalign.backbones.flops import FlopCount
from longalign.backbones.graphs import GraphedCall
from longalign.backbones.lora import (
    LoraWeights,
    check_same_names,
    inject_lora,
    is_part_of,
    merge_into_base,
    read_lora,
    temporarily_merged,
    without_lora,
    write_lora,
)
from longalign.encoders.base import Conditioning
from longalign.functional.diffusion import NoiseLevels, check_prediction, guide
from longalign.names import unique_name
from longalign.sharding import gather_full, is_sharded

Autocast = Callable[[], AbstractContextManager[Any]]


class Backbone(nn.Module):
    """Base class of backbones: a denoiser in a latent space, its noise levels and its LoRAs.

    Nothing is trainable until `add_lora` or `train_all` is called. Only the last LoRA stays unmerged; this is the
    active LoRA. Earlier LoRAs are merged into the base weights and also stored, so that checkpoints contain all LoRAs.

    Args:
        denoiser: a diffusers network.
        prediction: prediction type: ``"epsilon"``, ``"v_prediction"`` or ``"flow"``.
        noise_levels: scales of signal and noise at each training timestep.
        resolution: native width and height of an image in pixels.
    """

    #: regular expression of the names of the layers with a LoRA if `LoraConfig.targets` is None; None selects those of
    #: `longalign.backbones.lora.lora_targets`
    default_targets: str | None = None
    #: regular expression of the names of modules whose weights cannot change the prediction, such as text layers of the
    #: last block. They get no LoRA and stay frozen in full fine-tuning: distributed training rejects weights without
    #: gradient.
    unused_modules: str | None = None

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
        # Tuples keep nn.Module from registering these as submodules; a wrapper already contains the denoiser.
        self._call: tuple[Callable[..., Any]] = (self.denoiser,)
        self._reference: tuple[nn.Module, ...] = ()
        self._graphed: GraphedCall | None = None
        self._merge_buffers: dict[str, Tensor] | None = None
        self._is_merged = False
        self._flops: FlopCount | None = None
        self._compiled: list[nn.Module] = []
        self.autocast: Autocast = nullcontext

    @property
    def device(self) -> torch.device:
        """Device of the denoiser."""
        return next(self.denoiser.parameters()).device

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Returns the latent shape ``(c, h, w)`` of an image of ``height`` by ``width`` pixels.

        None uses the native resolution.
        """
        raise NotImplementedError

    def levels_at(self, shape: Sequence[int]) -> NoiseLevels:
        """Returns the noise levels for latents of shape ``(c, h, w)``; `noise_levels` unless they depend on the size.

        Override it together with `call`, which conditions the denoiser on them.
        """
        return self.noise_levels

    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Samples scaled latents ``(b, c, h', w')`` of images ``(b, 3, h, w)`` in [0, 1] from the VAE's posterior.

        The latents have no gradient. A ``generator`` makes the sample reproducible.
        """
        return self.sample_latents(self.posterior(images), generator)

    def posterior(self, images: Tensor) -> Tensor:
        """Returns the mean and standard deviation ``(b, 2c, h, w)`` of the VAE's posterior, without gradient.

        The result can be cached.
        """
        raise NotImplementedError

    def sample_latents(self, posterior: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Samples scaled latents ``(b, c, h, w)`` from the output of `posterior`."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes scaled latents to images ``(b, 3, h, w)`` clamped to [0, 1], with gradient."""
        raise NotImplementedError

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the denoiser's prediction ``(b, c, h, w)``, of the backbone's prediction type.

        Args:
            latents: ``(b, c, h, w)`` noisy latents.
            timesteps: ``(b,)`` integer timesteps, indices of the noise levels from `levels_at`.
            conditioning: conditioning of the b prompts.
        """
        return conditioning.predict(self._counted_call, latents, timesteps)

    def predict_with(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the prediction like `predict`, but of ``denoiser``, which has the interface of the backbone's own."""
        return conditioning.predict(partial(self.call, denoiser), latents, timesteps)

    def _counted_call(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        if self._flops is not None:
            self._flops.add(latents, conditioning)
        call = self._graphed or self._ungraphed_call
        return call(latents, timesteps, conditioning)

    def _ungraphed_call(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return self.call(self._call[0], latents, timesteps, conditioning)

    def call(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Calls ``denoiser`` with the model-specific arguments; implemented by subclasses.

        Called for each prediction by `Conditioning.predict`; ``conditioning`` depends on no timestep.
        """
        raise NotImplementedError

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
        """Combines predictions ``(b, c, h, w)`` by classifier-free guidance; see `longalign.functional.guide`.

        Override it if the model's pipeline combines them differently.
        """
        return guide(conditional, unconditional, scale)

    def project_text(self, conditioning: Conditioning) -> Conditioning:
        """Precomputes the projections of the text, which saves time if `predict` is called several times.

        The result is valid while the weights and the training mode do not change, and with gradient for one backward
        pass. By default, the conditioning is returned unchanged.
        """
        return conditioning

    @contextmanager
    def merged_lora(self) -> Iterator[None]:
        """Context manager: calls without gradient and active dropout use weights that contain the active LoRA.

        This saves the time of the LoRA branch, and needs memory for a copy of the weights of all LoRA layers. The
        weights must not change within the context. Does nothing if the weights are sharded.
        """
        if self._active is None or is_sharded(self.denoiser):
            yield
            return
        kind = self.device.type
        with self.autocast():
            enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
            dtype = torch.get_autocast_dtype(kind) if enabled else None
        with temporarily_merged(self.denoiser, self._active[0], dtype, self._merge_buffers):
            self._is_merged = True
            try:
                yield
            finally:
                self._is_merged = False

    def count_flops(self) -> FlopCount:
        """Returns a count of the operations of all calls of `predict` from now on."""
        self._flops = FlopCount(self.denoiser, self.call, self.full_finetune)
        return self._flops

    def wrap_denoiser(self, wrapped: Callable[..., Any], autocast: Autocast = nullcontext) -> None:
        """Makes `predict` call ``wrapped``, the denoiser wrapped for distributed training, without CUDA graphs.

        Args:
            wrapped: the wrapped denoiser.
            autocast: context of mixed precision in which ``wrapped`` calls the denoiser.
        """
        self._call, self._graphed, self._merge_buffers, self.autocast = (wrapped,), None, None, autocast
        for block in self._compiled:
            del block.forward
        self._compiled = []

    def use_cuda_graphs(self) -> None:
        """Makes `predict` replay calls without gradient as CUDA graphs; see `longalign.backbones.graphs`.

        Must be called last, on a CUDA device: a graph keeps the addresses of the weights.

        Raises:
            ValueError: if the denoiser is not on a CUDA device.
        """
        if self.device.type != "cuda":
            raise ValueError(
                f"CUDA graphs need a denoiser on a CUDA device, got one on {self.device.type}; set loop.cuda_graphs to "
                "false"
            )
        self._merge_buffers = {}
        self._graphed = GraphedCall(self._ungraphed_call, lambda: (self.denoiser.training, self._is_merged))

    def compile_blocks(self, compile: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Compiles the forward pass of each transformer and residual block, instead of the denoiser.

        Blocks of equal shape share their compiled code. The blocks are those that diffusers lists in the denoiser's
        ``_no_split_modules``, without any that contain others. `wrap_denoiser` undoes it.

        Raises:
            ValueError: if the denoiser has no such blocks.
        """
        names = getattr(self.denoiser, "_no_split_modules", None) or []

        def named(module: nn.Module) -> list[nn.Module]:
            return [part for part in module.modules() if type(part).__name__ in names]

        self._compiled = [block for block in named(self.denoiser) if named(block) == [block]]
        if not self._compiled:
            raise ValueError(
                f"loop.compile 'regional' compiles the blocks in _no_split_modules, but {type(self.denoiser).__name__} "
                "has none of them; set loop.compile to true or false"
            )
        for block in self._compiled:
            block.forward = compile(block.forward)

    def enable_gradient_checkpointing(self) -> None:
        """Enables gradient checkpointing: the denoiser's activations are recomputed in the backward pass."""
        self.denoiser.enable_gradient_checkpointing()

    def use_channels_last(self) -> None:
        """Stores convolution weights in the channels-last format, which is faster on tensor cores and many CPUs.

        Checkpoints keep the default layout.

        Raises:
            ValueError: if the denoiser has no convolutions.
        """
        if not any(isinstance(module, nn.Conv2d) for module in self.denoiser.modules()):
            raise ValueError(
                f"channels_last requires convolutions, but {type(self.denoiser).__name__} has none; "
                "set loop.channels_last to false"
            )
        modules: tuple[Any, ...] = (self, *self._reference)
        for module in modules:
            module.to(memory_format=torch.channels_last)

    # Trainable parameters

    def add_lora(self, config: LoraConfig, name: str) -> list[nn.Parameter]:
        """Merges the active LoRA, adds a new one and returns its trainable parameters.

        Raises:
            ValueError: if a LoRA with this name already exists.
        """
        self.merge_lora()
        if name in (lora.name for lora in self._merged):
            raise ValueError(f"the backbone already has a LoRA '{name}'; choose a name not in {self.lora_names}")
        targets = self.default_targets if config.targets is None else config.targets
        settings = config.model_copy(update={"targets": targets})
        parameters = inject_lora(self.denoiser, settings, name, self.unused_modules)
        self._active = (name, config)
        return parameters

    def merge_lora(self) -> None:
        """Merges the active LoRA, if any, into the base weights. Afterward no parameter is trainable."""
        if self._active is None:
            return
        lora = self._active_lora()
        merge_into_base(self.denoiser, lora.name)
        self._active = None
        # A full state already contains the merged LoRA; storing it too would apply it twice.
        self._merged += [] if self.full_finetune else [lora]

    def cast(self, dtype: torch.dtype) -> None:
        """Casts the denoiser to ``dtype``."""
        if self.denoiser.dtype != dtype:
            # diffusers' `to` warns at every cast, even if no module must stay in float32
            keeps_float32 = getattr(self.denoiser, "_keep_in_fp32_modules", None)
            self.denoiser.to(dtype) if keeps_float32 else nn.Module.to(self.denoiser, dtype)

    def train_all(self) -> list[nn.Parameter]:
        """Makes all weights of the denoiser trainable, except `unused_weights`, in float32, and returns them."""
        self.merge_lora()
        self._merged, self.full_finetune = [], True
        self.denoiser.float().requires_grad_(True)
        for parameter in self.unused_weights().values():
            parameter.requires_grad_(False)
        return [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]

    def unused_weights(self) -> dict[str, nn.Parameter]:
        """Returns the weights of the `unused_modules` by name."""
        parameters = self.denoiser.named_parameters()
        return {name: parameter for name, parameter in parameters if is_part_of(name, self.unused_modules)}

    def unused_name(self, name: str) -> str:
        """Returns ``name``, or the first of ``name-2``, ``name-3``... that is not the name of a LoRA."""
        return unique_name(name, self.lora_names)

    @property
    def lora_names(self) -> list[str]:
        """Names of all LoRAs, merged or active, in the order in which they were added."""
        return [lora.name for lora in self._merged] + ([self._active[0]] if self._active else [])

    def _active_lora(self) -> LoraWeights:
        assert self._active is not None
        name, config = self._active
        state = {k: gather_full(v).to("cpu", copy=True).contiguous() for k, v in read_lora(self.denoiser, name).items()}
        return LoraWeights(name, config, state)

    def lora_state(self) -> list[LoraWeights]:
        """Returns all LoRAs, merged or active, on the CPU, in the order in which they were added."""
        return self._merged + ([self._active_lora()] if self._active else [])

    def load_lora(self, loras: Sequence[LoraWeights]) -> None:
        """Adds LoRAs, in order, to a backbone without LoRAs. The last one stays active; all are frozen."""
        self._require_no_lora()
        for lora in loras:
            self.add_lora(lora.config, lora.name)
            write_lora(self.denoiser, lora.name, lora.state)
        self.denoiser.requires_grad_(False)

    def full_state(self) -> dict[str, Tensor]:
        """Returns the denoiser's base weights on the CPU, without the active LoRA."""
        state = {}
        for key, tensor in self.denoiser.state_dict().items():
            if ".lora_" not in key:
                state[key.replace(".base_layer.", ".")] = gather_full(tensor.detach()).to("cpu", copy=True).contiguous()
        return state

    def load_full(self, state: Mapping[str, Tensor]) -> None:
        """Replaces all weights of the denoiser by a full state dict. Checkpoints saved later contain all weights.

        Raises:
            ValueError: if the backbone has LoRAs, or names or shapes of the weights do not match.
        """
        self._require_no_lora()
        check_same_names("the denoiser", self.denoiser.state_dict(), state)
        self.denoiser.float().load_state_dict(dict(state))
        self.full_finetune = True

    def _require_no_lora(self) -> None:
        if self.lora_names:
            raise ValueError(f"expected a backbone without LoRAs, got LoRAs {self.lora_names}; build a new backbone")

    # The reference model: the weights at the start of training

    def keep_reference_model(self) -> None:
        """Keeps a float32 copy of the current weights, with LoRAs merged, for `predict_reference`.

        Required for full fine-tuning only.
        """
        self.merge_lora()
        self._reference = (copy.deepcopy(self.denoiser).float().eval().requires_grad_(False),)

    @torch.no_grad()
    def predict_reference(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the reference model's prediction without gradient; otherwise like `predict`."""
        if self._active is not None:
            with without_lora(self.denoiser, self._active[0]):
                return self.predict_with(self.denoiser, latents, timesteps, conditioning)
        if not self._reference:
            raise ValueError(
                "expected a reference model, but none was kept; call keep_reference_model before train_all"
            )
        return self.predict_with(self._reference[0], latents, timesteps, conditioning)
