"""Base class of backbones: the denoiser's predictions, encoding and decoding of images, LoRAs and full fine-tuning."""

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
        denoiser: a UNet or transformer of diffusers; frozen by this class.
        prediction: prediction type: ``"epsilon"``, ``"v_prediction"`` or ``"flow"``.
        noise_levels: scales of signal and noise at each training timestep.
        resolution: native side of square images in pixels.

    Attributes:
        full_finetune: whether checkpoints contain all weights of the denoiser instead of its LoRAs.
        autocast: function that returns a context of mixed precision; see `wrap_denoiser`.

    Raises:
        ValueError: if the prediction type is unknown.
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
        """Returns the shape ``(c, h', w')`` of the latents of one image.

        Args:
            height: height of the image in pixels; None uses the native resolution.
            width: width of the image in pixels; None uses the native resolution.

        Raises:
            ValueError: if the model does not support this height or width.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement latent_shape")

    def levels_at(self, shape: Sequence[int]) -> NoiseLevels:
        """Returns the noise levels for latents of shape ``(..., h, w)``; by default `noise_levels`.

        Override it for models whose noise levels depend on the image size. Then `call` must condition the denoiser on
        these noise levels.
        """
        return self.noise_levels

    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Samples latents ``(b, c, h', w')`` of images ``(b, 3, h, w)`` in [0, 1] from the VAE's posterior.

        The latents have the denoiser's scale and no gradient; see `latent_shape` for ``(c, h', w')``. A ``generator``
        makes the sample reproducible; None uses torch's global generator.
        """
        return self.sample_latents(self.posterior(images), generator)

    def posterior(self, images: Tensor) -> Tensor:
        """Returns mean and standard deviation of the VAE's posterior for images ``(b, 3, h, w)`` in [0, 1].

        The result ``(b, 2c, h', w')`` contains first the c channels of the mean, then those of the standard deviation,
        of latents in the VAE's scale. It has no gradient and can be cached; see `sample_latents`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement posterior")

    def sample_latents(self, posterior: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Samples latents ``(b, c, h', w')`` in the denoiser's scale from the output of `posterior`.

        A ``generator`` makes the sample reproducible; None uses torch's global generator.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement sample_latents")

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents ``(b, c, h', w')`` in the denoiser's scale to images ``(b, 3, h, w)``, with gradient.

        The images are clamped to [0, 1].
        """
        raise NotImplementedError(f"{type(self).__name__} must implement decode")

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the denoiser's prediction ``(b, c, h, w)``, of the backbone's prediction type.

        Args:
            latents: ``(b, c, h, w)`` noisy latents.
            timesteps: ``(b,)`` integer timesteps: indices into the noise levels that `levels_at` returns.
            conditioning: conditioning of the b prompts, from an encoder.
        """
        return conditioning.predict(self._counted_call, latents, timesteps)

    def predict_with(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the prediction of ``denoiser``, a network that is called like `Backbone.denoiser`.

        The other arguments and the result are those of `predict`.
        """
        return conditioning.predict(partial(self.call, denoiser), latents, timesteps)

    def _counted_call(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        if self._flops is not None:
            self._flops.add(latents, conditioning)
        call = self._graphed or self._ungraphed_call
        return call(latents, timesteps, conditioning)

    def _ungraphed_call(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return self.call(self._call[0], latents, timesteps, conditioning)

    def call(self, denoiser: Any, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Calls a network with the arguments that its forward pass takes; implemented by subclasses, used by `predict`.

        Args:
            denoiser: the network: `Backbone.denoiser`, a wrapper of it or a copy.
            latents: ``(b, c, h, w)`` noisy latents.
            timesteps: ``(b,)`` integer timesteps.
            conditioning: conditioning of the b prompts at these timesteps; see `Conditioning.at`.

        Returns:
            The prediction ``(b, c, h, w)``, in the dtype of the latents.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement call")

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
        """Combines conditional and unconditional predictions ``(b, c, h, w)`` by classifier-free guidance.

        ``scale`` is the guidance scale; see `longalign.functional.guide`. Override this method if the model's pipeline
        combines predictions differently.
        """
        return guide(conditional, unconditional, scale)

    def project_text(self, conditioning: Conditioning) -> Conditioning:
        """Precomputes what the denoiser computes from the text alone, to save time in several calls of `predict`.

        Pass the returned conditioning to `predict`. It is valid while the weights and the training mode do not change.
        If computed with gradient, it is valid for one backward pass. The base class returns ``conditioning`` itself.
        """
        return conditioning

    @contextmanager
    def merged_lora(self) -> Iterator[None]:
        """Context manager in which denoiser calls use copies of the weights with the active (unmerged) LoRA merged.

        Calls with gradient or with active dropout still compute the LoRA separately. Merging saves time, and needs
        memory for the copies. The weights must not change within the context. The context has no effect without an
        active LoRA, or if the weights are sharded (FSDP2).
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
        """Returns a `FlopCount` that counts the floating-point operations of all later calls of `predict`.

        The `FlopCount` of an earlier call of this method then stops counting.

        Raises:
            ValueError: if the denoiser is not a diffusers network.
        """
        self._flops = FlopCount(self.denoiser, self.call, self.full_finetune)
        return self._flops

    def wrap_denoiser(self, wrapped: Callable[..., Any], autocast: Autocast = nullcontext) -> None:
        """Makes `predict` call ``wrapped`` instead of the denoiser.

        Undoes `use_cuda_graphs` and `compile_blocks`.

        Args:
            wrapped: the denoiser, wrapped for distributed training or compiled.
            autocast: function that returns the context of mixed precision in which ``wrapped`` calls the denoiser.
        """
        self._call, self._graphed, self._merge_buffers, self.autocast = (wrapped,), None, None, autocast
        for block in self._compiled:
            del block.forward
        self._compiled = []

    def use_cuda_graphs(self) -> None:
        """Makes `predict` replay calls without gradient as CUDA graphs; see `longalign.backbones.graphs`.

        Call it after LoRAs are added and the weights are loaded, cast and moved: a graph keeps the weights' addresses.

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
        """Compiles the forward pass of each transformer and residual block, instead of the whole denoiser.

        Blocks of equal shape share their compiled code. The blocks are instances of the classes that diffusers lists in
        the denoiser's ``_no_split_modules``; of nested blocks, only the innermost. `wrap_denoiser` undoes it.

        Args:
            compile: maps a forward method to its compiled version, e.g. ``torch.compile``.

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

        Saved checkpoints have the default memory format.

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
        """Merges an unmerged LoRA, then adds a new LoRA and returns the new one's trainable parameters, in float32.

        Args:
            config: settings of the new LoRA.
            name: name of the new LoRA; `unused_name` returns a free one.

        Raises:
            ValueError: if a LoRA with this name already exists, or ``config.targets`` selects no layer.
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
        """Merges the active LoRA, the last one added, into the base weights and freezes all weights.

        Does nothing if there is no unmerged LoRA.
        """
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
        """Merges an unmerged LoRA, then makes the denoiser's weights trainable, in float32, and returns them.

        The `unused_weights` stay frozen. Checkpoints saved later contain all weights and no LoRAs.
        """
        self.merge_lora()
        self._merged, self.full_finetune = [], True
        self.denoiser.float().requires_grad_(True)
        for parameter in self.unused_weights().values():
            parameter.requires_grad_(False)
        return [parameter for parameter in self.denoiser.parameters() if parameter.requires_grad]

    def unused_weights(self) -> dict[str, nn.Parameter]:
        """Returns the denoiser's weights in the `unused_modules`, by name; empty if there are no such modules."""
        parameters = self.denoiser.named_parameters()
        return {name: parameter for name, parameter in parameters if is_part_of(name, self.unused_modules)}

    def unused_name(self, name: str) -> str:
        """Returns ``name``, or the first of ``name-2``, ``name-3``... that is not the name of a LoRA."""
        return unique_name(name, self.lora_names)

    @property
    def lora_names(self) -> list[str]:
        """Names of all LoRAs, merged or not, in the order in which they were added."""
        return [lora.name for lora in self._merged] + ([self._active[0]] if self._active else [])

    def _active_lora(self) -> LoraWeights:
        assert self._active is not None
        name, config = self._active
        state = {k: gather_full(v).to("cpu", copy=True).contiguous() for k, v in read_lora(self.denoiser, name).items()}
        return LoraWeights(name, config, state)

    def lora_state(self) -> list[LoraWeights]:
        """Returns all LoRAs, merged or not, on the CPU, in the order in which they were added."""
        return self._merged + ([self._active_lora()] if self._active else [])

    def load_lora(self, loras: Sequence[LoraWeights]) -> None:
        """Adds LoRAs, in order, to a backbone without LoRAs. All but the last are merged; all are frozen.

        Raises:
            ValueError: if the backbone has LoRAs, or names or shapes of the weights do not match its layers.
        """
        self._require_no_lora()
        for lora in loras:
            self.add_lora(lora.config, lora.name)
            write_lora(self.denoiser, lora.name, lora.state)
        self.denoiser.requires_grad_(False)

    def full_state(self) -> dict[str, Tensor]:
        """Returns the denoiser's weights on the CPU, with the names that diffusers uses.

        Merged LoRAs are included in the weights; an unmerged LoRA is omitted. Of sharded weights (FSDP2), only the
        first process gets values; see `longalign.sharding.gather_full`.
        """
        state = {}
        for key, tensor in self.denoiser.state_dict().items():
            if ".lora_" not in key:
                state[key.replace(".base_layer.", ".")] = gather_full(tensor.detach()).to("cpu", copy=True).contiguous()
        return state

    def load_full(self, state: Mapping[str, Tensor]) -> None:
        """Replaces all weights of the denoiser, which becomes float32. Checkpoints saved later contain all weights.

        Args:
            state: state dict of the denoiser, as `full_state` returns it.

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
        """Keeps a float32 copy of the current weights, with LoRAs merged, as the reference model.

        Call it before `train_all`. LoRA training does not need it: `predict_reference` then disables the active LoRA.
        """
        self.merge_lora()
        self._reference = (copy.deepcopy(self.denoiser).float().eval().requires_grad_(False),)

    @torch.no_grad()
    def predict_reference(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns the prediction of the reference model, the denoiser at the start of training, without gradient.

        With an unmerged LoRA, this is the denoiser without that LoRA; else the copy of `keep_reference_model`.
        Arguments and result are those of `predict`.

        Raises:
            ValueError: if there is neither an unmerged LoRA nor a copy.
        """
        if self._active is not None:
            with without_lora(self.denoiser, self._active[0]):
                return self.predict_with(self.denoiser, latents, timesteps, conditioning)
        if not self._reference:
            raise ValueError(
                "expected a reference model, but none was kept; call keep_reference_model before train_all"
            )
        return self.predict_with(self._reference[0], latents, timesteps, conditioning)
