"""Checkpoints that explain themselves: one safetensors file with all that was trained and the config it belongs to.

Keys of ``longalign.safetensors``: ``lora.<i>.<module>.lora_A.weight`` and ``lora_B`` for the i-th LoRA, those of
earlier stages first; ``denoiser.<name>`` where all weights were trained; ``encoder.<name>`` for the encoder's adapter.
A run that trains a reward has no such keys, and the reward's own folder, ``reward/``, beside the file.
Its metadata hold the config, the LoRAs' names and configs, the step, the versions, and who provided each part.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from longalign.backbones.base import Backbone
from longalign.backbones.configs import LoraConfig
from longalign.backbones.lora import LoraWeights, check_same_names, concat_loras, peft_settings
from longalign.checks import check_parts, parts_of
from longalign.config import RunConfig, load_config, to_dict
from longalign.encoders.base import Encoder
from longalign.errors import ConfigError, redact_url
from longalign.files import CHECKPOINT, DIFFUSERS_LORA, REWARD, checkpoint_file, read_mapping, read_metadata
from longalign.registry import REGISTRIES, backbones, encoders
from longalign.runtime import Runtime
from longalign.trainers.base import adapter
from longalign.weights import load_tensors, save_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger("longalign")

FORMAT = "1"
# where diffusers keeps the settings that it otherwise guesses from the shapes of the weights
ADAPTER_METADATA = "lora_adapter_metadata"
PACKAGES = ("longalign", "torch", "diffusers", "transformers", "peft", "accelerate", "open_clip_torch", "pydantic")


@dataclass(frozen=True)
class Weights:
    """What a checkpoint holds.

    Attributes:
        stacks: the LoRAs, the first applied first.
        denoiser: all weights of the denoiser, or empty where only LoRAs were trained.
        adapter: the encoder's adapter, or empty where it has none.
    """

    loras: list[LoraWeights]
    denoiser: dict[str, Tensor]
    adapter: dict[str, Tensor]


def save(folder: Path, config: RunConfig, backbone: Backbone | None, encoder: Encoder | None, step: int) -> Path:
    """Writes ``longalign.safetensors`` into a folder, which is made if it is missing; returns the file.

    The file appears under its name only when it is complete.

    Args:
        folder: e.g. ``runs/x/checkpoint-000100``.
        config: of the run.
        backbone: its LoRAs, or all weights if those are trained, are saved; None in a run without one.
        encoder: its adapter is saved; None in a run without one.
        step: optimiser steps done.
    """
    return write(folder, config, collect(backbone, encoder), step)


def collect(backbone: Backbone | None, encoder: Encoder | None) -> Weights:
    """What `save` writes, as copies on the CPU. All processes must call it where weights are split over them, and only
    the first gets them."""
    trained = {} if encoder is None else adapter(encoder)
    parameters = {k: p.detach().to("cpu", copy=True).contiguous() for k, p in trained.items()}
    loras = [] if backbone is None else backbone.lora_state()
    denoiser = backbone.full_state() if backbone is not None and backbone.full_finetune else {}
    return Weights(loras, denoiser, parameters)


def write(folder: Path, config: RunConfig, weights: Weights, step: int) -> Path:
    """As `save`, for weights that are at hand; all of them on the CPU and contiguous."""
    loras = weights.loras
    tensors = {f"lora.{i}.{key}": tensor for i, lora in enumerate(loras) for key, tensor in lora.state.items()}
    tensors |= {f"denoiser.{key}": tensor for key, tensor in weights.denoiser.items()}
    tensors |= {f"encoder.{key}": tensor for key, tensor in weights.adapter.items()}
    metadata = {
        "format": FORMAT,
        "config": json.dumps(redacted(to_dict(config)), ensure_ascii=False),
        "step": str(step),
        "loras": json.dumps([{"name": s.name, "config": s.config.model_dump(mode="json")} for s in loras]),
        "versions": json.dumps(versions()),
        "providers": json.dumps(providers(config)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CHECKPOINT
    save_tensors(path, tensors, metadata)
    return path


def redacted(value: Any) -> Any:
    """A dumped config without the credentials in its addresses."""
    if isinstance(value, dict):
        return {key: redacted(child) for key, child in value.items()}
    if isinstance(value, list):
        return [redacted(child) for child in value]
    return redact_url(value) if isinstance(value, str) else value


def load_weights(checkpoint: str | Path) -> Weights:
    """Reads a checkpoint given as its file, its folder, or a run's folder (the newest one).

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is damaged, was not written by longalign, or by a later format, holds no backbone's
            weights, or tensors that its metadata do not tell of, or that are no finite floats.
    """
    path = checkpoint_file(Path(checkpoint))
    metadata = read_metadata(path)
    if metadata.get("format") != FORMAT or "loras" not in metadata:
        raise ValueError(
            f"{path} has format {metadata.get('format')!r}, expected {FORMAT!r}; it was not written by this version of "
            "longalign: update longalign, or make the checkpoint anew"
        )
    if read_mapping(path).get("backbone", "") is None:
        raise ValueError(
            f"{path} is of a run that trained a reward, which is in {path.parent / REWARD}; expected a checkpoint of a "
            "backbone"
        )
    tensors = load_tensors(path)
    try:
        loras_by_name = [
            (entry["name"], LoraConfig.model_validate(entry["config"])) for entry in json.loads(metadata["loras"])
        ]
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"{path} does not list its LoRAs ({error}); get it again") from error
    loras = [LoraWeights(name, config, _under(tensors, f"lora.{i}.")) for i, (name, config) in enumerate(loras_by_name)]
    _check_complete(path, tensors, loras)
    return Weights(loras, _under(tensors, "denoiser."), _under(tensors, "encoder."))


def _check_complete(path: Path, tensors: Mapping[str, Tensor], loras: Sequence[LoraWeights]) -> None:
    """Raises ValueError if a part of a checkpoint would be omitted, or cannot be weights."""
    prefixes = ("denoiser.", "encoder.", *(f"lora.{i}." for i in range(len(loras))))
    if unknown := [name for name in tensors if not name.startswith(prefixes)]:
        raise ValueError(
            f"{path} holds {len(unknown)} tensors that its metadata do not tell of, e.g. '{unknown[0]}'; expected "
            f"names that start with {', '.join(prefixes)}"
        )
    if empty := [lora.name for lora in loras if not lora.state]:
        raise ValueError(f"{path} lists the LoRA '{empty[0]}' and holds no tensor of it")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            what = "numbers that are not finite" if tensor.is_floating_point() else f"{tensor.dtype}"
            raise ValueError(f"{path}: expected finite floats in '{name}', found {what}")


def read_config(checkpoint: str | Path) -> RunConfig:
    """The config of a checkpoint, to sample with it: what only training needs may be of plugins that are missing here.

    Rewards, trainer, data and cache are then omitted, with a warning.

    Raises:
        ConfigError: if its backbone or encoder cannot be read.
    """
    path = checkpoint_file(Path(checkpoint))
    try:
        return load_config(path)
    except ConfigError as error:
        raw = {**read_mapping(path), "rewards": [], "trainer": None, "data": None, "cache": None}
        try:
            config = load_config(raw)
        except ConfigError:
            raise error from None
        log.warning(
            "%s was trained with parts that are not used for sampling, and cannot be read here: %s", path, error
        )
        return config


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def load_into(checkpoint: str | Path, backbone: Backbone, encoder: Encoder) -> None:
    """Puts a checkpoint's weights into freshly built parts.

    All LoRAs but the last are merged into the denoiser's weights; the last stays apart, frozen, until another is
    added or `Backbone.merge_lora` is called.

    Raises:
        ValueError: if the weights do not fit the parts, or the checkpoint has an adapter and the encoder has none.
    """
    weights = load_weights(checkpoint)
    if weights.denoiser:
        backbone.load_full(weights.denoiser)
    backbone.load_lora(weights.loras)
    parameters = adapter(encoder)
    check_same_names("the encoder's adapter", parameters, weights.adapter)
    for name, parameter in parameters.items():
        parameter.data.copy_(weights.adapter[name])


def load_for_sampling(
    checkpoint: str | Path, runtime: Runtime | None = None, *, device: str | None = None, dtype: str | None = None
) -> tuple[RunConfig, Backbone, Encoder]:
    """Config, backbone and encoder of a checkpoint, frozen and in eval mode; no trainer and no reward is built.

    Args:
        checkpoint: its file, its folder, or a run's folder (the newest one).
        runtime: where to load them; this machine's, in the precision of training, if None.
        device: a torch device, in the place of a runtime's.
        dtype: "float32", "bfloat16" or "float16", in the place of a runtime's.
    """
    path = checkpoint_file(Path(checkpoint))
    config = read_config(path)
    if config.backbone is None or config.encoder is None:
        raise ValueError(
            f"{path} is of a run that trained a reward, and has no backbone to sample with; expected one that has"
        )
    check_parts({"backbone": config.backbone, "encoder": config.encoder})
    runtime = runtime or Runtime.detect(config.loop.precision, device).with_dtype(dtype)
    backbone, encoder = backbones.construct(config.backbone, runtime), encoders.construct(config.encoder, runtime)
    load_into(path, backbone, encoder)
    backbone.merge_lora()
    # Merged first, in the precision of training, so that what is drawn is what was trained.
    backbone.cast(runtime.torch_dtype)
    for part in (backbone, encoder):
        part.requires_grad_(False).eval()
    return config, backbone, encoder


def export_lora(checkpoint: str | Path, folder: str | Path) -> Path:
    """Writes a checkpoint's LoRAs as one file that a stock diffusers pipeline loads with ``load_lora_weights(folder)``.

    LoRAs of several stages are joined into one of the sum of their ranks, which is exact.

    Returns:
        The path of ``pytorch_lora_weights.safetensors``.

    Raises:
        ValueError: if all weights were trained, or no LoRA was.
    """
    weights = load_weights(checkpoint)
    if weights.denoiser or not weights.loras:
        raise ValueError(
            f"{checkpoint} holds {'all weights of the denoiser' if weights.denoiser else 'no LoRA'}; only a checkpoint "
            "whose denoiser was trained by LoRA alone can be exported as a LoRA"
        )
    joined = concat_loras(weights.loras)
    component = denoiser_folder(read_config(checkpoint))
    tensors = {f"{component}.{key}": tensor for key, tensor in joined.items()}
    adapter_metadata = {f"{component}.{key}": value for key, value in peft_settings(joined).items()}
    path = Path(folder) / DIFFUSERS_LORA
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors, {"format": "pt", ADAPTER_METADATA: json.dumps(adapter_metadata)})
    return path


def denoiser_folder(config: RunConfig) -> str:
    """What diffusers calls the denoiser of a run's backbone: ``unet`` or ``transformer``."""
    return getattr(config.backbone, "component", "unet")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def providers(config: RunConfig) -> dict[str, str]:
    """Who provides each part of a run, by its path in the config, e.g. ``{"rewards.0.inner": "longalign 0.1.0"}``."""
    owners = {}
    for path, part in parts_of(config):
        for registry in REGISTRIES.values():
            if part.name in registry and registry.get(part.name) is type(part):
                owners[path] = registry.info(part.name).owner
    return owners
