"""Self-describing checkpoints: one safetensors file with all trained weights and the config of the run.

Keys of ``longalign.safetensors``:

- ``lora.<i>.<module>.lora_A.weight`` and ``lora_B``: the i-th LoRA, those of earlier stages first;
- ``denoiser.<name>``: all weights of the denoiser, after full fine-tuning;
- ``encoder.<name>``: the encoder's adapter.

A run that trains a reward has none of these keys; the reward is in the folder ``reward/`` next to the file.
The metadata contains the config, names and configs of the LoRAs, the step, package versions, and the package that
provides each part.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from longalign.backbones.base import Backbone
from longalign.backbones.config import LoraConfig
from longalign.backbones.lora import LoraWeights, check_same_names
from longalign.checkpoints.provenance import providers, versions
from longalign.checkpoints.redaction import redacted
from longalign.checkpoints.weights import load_tensors, save_tensors
from longalign.config.checks import check_parts
from longalign.config.files import REWARD, checkpoint_file, read_metadata
from longalign.config.parsing import read_mapping
from longalign.config.run import RunConfig, load_config, to_dict
from longalign.encoders.base import Encoder
from longalign.errors import ConfigError
from longalign.hub import CHECKPOINT
from longalign.registry import backbones, encoders
from longalign.runtime import Runtime

log = logging.getLogger("longalign")

FORMAT = "1"


@dataclass(frozen=True)
class Weights:
    """The weights of a checkpoint.

    Attributes:
        loras: the LoRAs, in the order of application.
        denoiser: all weights of the denoiser; empty if only LoRAs were trained.
        adapter: weights of the encoder's adapter; empty if it has none.
    """

    loras: list[LoraWeights]
    denoiser: dict[str, Tensor]
    adapter: dict[str, Tensor]


def save(folder: Path, config: RunConfig, backbone: Backbone | None, encoder: Encoder | None, step: int) -> Path:
    """Writes ``longalign.safetensors`` to a folder, created if needed; returns the file's path.

    The file is written atomically.

    Args:
        folder: folder of the checkpoint, e.g. ``runs/x/checkpoint-000100``.
        config: config of the run.
        backbone: its LoRAs are saved, or all weights after full fine-tuning; None if the run has no backbone.
        encoder: its adapter is saved, if it has one; None if the run has no encoder.
        step: number of completed optimizer steps.
    """
    return write(folder, config, collect(backbone, encoder), step)


def collect(backbone: Backbone | None, encoder: Encoder | None) -> Weights:
    """Returns the weights that `save` writes, as copies on the CPU.

    With sharded weights, all processes must call this function; only the first one receives the weights.
    """
    parameters = {} if encoder is None else encoder.adapter_parameters()
    adapter_state = {k: p.detach().to("cpu", copy=True).contiguous() for k, p in parameters.items()}
    loras = [] if backbone is None else backbone.lora_state()
    denoiser = backbone.full_state() if backbone is not None and backbone.full_finetune else {}
    return Weights(loras, denoiser, adapter_state)


def write(folder: Path, config: RunConfig, weights: Weights, step: int) -> Path:
    """Writes collected weights as `save` does; all tensors must be on the CPU and contiguous."""
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


def load_weights(checkpoint: str | Path) -> Weights:
    """Reads the weights of a checkpoint: LoRAs, fully fine-tuned denoiser and encoder adapter, on the CPU.

    Args:
        checkpoint: the checkpoint's file or folder, or a run's folder (the newest checkpoint).

    Raises:
        FileNotFoundError: if the checkpoint does not exist.
        ValueError: if the file is damaged or has a different format, or its run has no backbone. Also if tensors are
            not listed in its metadata, or are not finite floats.
    """
    path = checkpoint_file(Path(checkpoint))
    metadata = read_metadata(path)
    if metadata.get("format") != FORMAT or "loras" not in metadata:
        raise ValueError(
            f"{path} has format {metadata.get('format')!r}, expected {FORMAT!r}; it was not written by this version of "
            "longalign: update longalign, or create the checkpoint again"
        )
    if read_mapping(path).get("backbone", "") is None:
        raise ValueError(
            f"{path} has no backbone, since its run trained a reward, saved in {path.parent / REWARD}; expected a "
            "checkpoint with a backbone"
        )
    tensors = load_tensors(path)
    try:
        loras_by_name = [
            (entry["name"], LoraConfig.model_validate(entry["config"])) for entry in json.loads(metadata["loras"])
        ]
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(
            f"the metadata 'loras' of {path} is not a valid list of LoRAs ({error}); download or create the file again"
        ) from error
    loras = [
        LoraWeights(name, config, _with_prefix(tensors, f"lora.{i}.")) for i, (name, config) in enumerate(loras_by_name)
    ]
    _check_complete(path, tensors, loras)
    return Weights(loras, _with_prefix(tensors, "denoiser."), _with_prefix(tensors, "encoder."))


def _check_complete(path: Path, tensors: Mapping[str, Tensor], loras: Sequence[LoraWeights]) -> None:
    """Raises ValueError if tensors are missing, unlisted or not finite floats."""
    prefixes = ("denoiser.", "encoder.", *(f"lora.{i}." for i in range(len(loras))))
    if unknown := [name for name in tensors if not name.startswith(prefixes)]:
        raise ValueError(
            f"{path} has {len(unknown)} tensors that are not listed in its metadata, e.g. '{unknown[0]}'; expected "
            f"names with the prefix {', '.join(prefixes)}"
        )
    if empty := [lora.name for lora in loras if not lora.state]:
        raise ValueError(
            f"{path} lists the LoRA '{empty[0]}' but has no tensors of this LoRA; download or create the file again"
        )
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            problem = "non-finite values" if tensor.is_floating_point() else f"{tensor.dtype}"
            raise ValueError(
                f"{path}: expected finite floats in '{name}', got {problem}; download or create the file again"
            )


def read_config(checkpoint: str | Path) -> RunConfig:
    """Returns the config of a checkpoint, for sampling.

    If training-only parts cannot be loaded, e.g. because their plugins are not installed, rewards, trainer, data and
    cache are omitted with a warning.

    Raises:
        ConfigError: if the backbone or encoder cannot be loaded, or the trained reward of a run without a backbone.
    """
    path = checkpoint_file(Path(checkpoint))
    try:
        return load_config(path)
    except ConfigError as error:
        raw = {**read_mapping(path), "rewards": [], "trainer": None, "data": None, "cache": None}
        if raw.get("backbone", "") is None:  # the rewards are what was trained
            raise
        try:
            config = load_config(raw)
        except ConfigError:
            raise error from None
        log.warning(
            "training-only parts in the config of %s cannot be loaded; sampling does not need them: %s", path, error
        )
        return config


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors whose names have a prefix, with the prefix removed."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def load_into(checkpoint: str | Path, backbone: Backbone, encoder: Encoder) -> None:
    """Loads a checkpoint's weights into newly built parts.

    All LoRAs but the last are merged into the denoiser's weights. The last one stays unmerged and frozen until a new
    LoRA is added or `Backbone.merge_lora` is called.

    Raises:
        ValueError: if the weights do not fit the parts, or only the checkpoint or only the encoder has an adapter.
    """
    weights = load_weights(checkpoint)
    if weights.denoiser:
        backbone.load_full(weights.denoiser)
    backbone.load_lora(weights.loras)
    parameters = encoder.adapter_parameters()
    check_same_names("the encoder's adapter", parameters, weights.adapter)
    for name, parameter in parameters.items():
        parameter.data.copy_(weights.adapter[name])


def load_for_sampling(
    checkpoint: str | Path, runtime: Runtime | None = None, *, device: str | None = None, dtype: str | None = None
) -> tuple[RunConfig, Backbone, Encoder]:
    """Loads config, backbone and encoder of a checkpoint, frozen and in eval mode, without trainer and rewards.

    Args:
        checkpoint: the checkpoint's file or folder, or a run's folder (the newest checkpoint).
        runtime: device and dtype; detected on this machine, in the precision of training, if None.
        device: a torch device, if ``runtime`` is None.
        dtype: "float32", "bfloat16" or "float16", if ``runtime`` is None.

    Raises:
        ValueError: if the checkpoint has no backbone or no encoder, or its weights do not fit.
    """
    path = checkpoint_file(Path(checkpoint))
    config = read_config(path)
    if config.backbone is None or config.encoder is None:
        raise ValueError(
            f"{path} has no backbone to sample with, since its run trained a reward; "
            "expected a checkpoint with a backbone"
        )
    check_parts({"backbone": config.backbone, "encoder": config.encoder})
    runtime = runtime or Runtime.detect(config.loop.precision, device).with_dtype(dtype)
    backbone, encoder = backbones.construct(config.backbone, runtime), encoders.construct(config.encoder, runtime)
    load_into(path, backbone, encoder)
    backbone.merge_lora()
    # cast after merging: LoRAs are merged in the precision of training
    backbone.cast(runtime.torch_dtype)
    for part in (backbone, encoder):
        part.requires_grad_(False).eval()
    return config, backbone, encoder
