"""Self-describing checkpoints: one safetensors file with all trained weights and the config of the run.

Names of the tensors in ``longalign.safetensors``:

- ``lora.<i>.<module>.lora_A.weight`` and ``lora_B``: the i-th LoRA, in the order of application. A run that starts from
  a checkpoint (``init_from``) with LoRAs appends its own;
- ``denoiser.<name>``: all weights of the denoiser, after full fine-tuning;
- ``encoder.<name>``: the encoder's adapter, i.e. trained layers after a frozen text model.

A run that trains a reward has none of these tensors; the reward is in the folder ``reward/`` next to the file.
The metadata contains the config, names and configs of the LoRAs, the number of optimizer steps, package versions, and
the package that provides each part of the config.
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
from longalign.config.checks import check_parts
from longalign.config.parsing import read_mapping
from longalign.config.run import RunConfig, load_config, to_dict
from longalign.encoders.base import Encoder
from longalign.errors import ConfigError
from longalign.files.paths import REWARD, checkpoint_file, read_metadata
from longalign.files.weights import load_tensors, save_tensors
from longalign.hub import CHECKPOINT
from longalign.registry import backbones, encoders
from longalign.runtime import Runtime

log = logging.getLogger("longalign")

FORMAT = "1"


@dataclass(frozen=True)
class Weights:
    """The weights of a checkpoint, on the CPU.

    Attributes:
        loras: the LoRAs of the denoiser, in the order of application.
        denoiser: name -> weight of the denoiser, all weights; empty unless the denoiser was fully fine-tuned.
        adapter: name -> weight of the encoder's adapter; empty if the encoder has no adapter.
    """

    loras: list[LoraWeights]
    denoiser: dict[str, Tensor]
    adapter: dict[str, Tensor]


def save(folder: Path, config: RunConfig, backbone: Backbone | None, encoder: Encoder | None, step: int) -> Path:
    """Writes ``longalign.safetensors`` atomically to a folder, created if needed; returns the file's path.

    Args:
        folder: folder of the checkpoint, e.g. ``runs/x/checkpoint-000100``.
        config: config of the run.
        backbone: backbone whose LoRAs are saved, and after full fine-tuning all weights of the denoiser; None if the
            run has no backbone.
        encoder: encoder whose adapter is saved, if it has one; None if the run has no encoder.
        step: number of completed optimizer steps.
    """
    return write(folder, config, collect(backbone, encoder), step)


def collect(backbone: Backbone | None, encoder: Encoder | None) -> Weights:
    """Returns the weights that `save` writes, as copies on the CPU; the arguments are those of `save`.

    If weights are sharded over processes, all processes must call this function; only the first process receives all
    weights.
    """
    parameters = {} if encoder is None else encoder.adapter_parameters()
    adapter_state = {k: p.detach().to("cpu", copy=True).contiguous() for k, p in parameters.items()}
    loras = [] if backbone is None else backbone.lora_state()
    denoiser = backbone.full_state() if backbone is not None and backbone.full_finetune else {}
    return Weights(loras, denoiser, adapter_state)


def write(folder: Path, config: RunConfig, weights: Weights, step: int) -> Path:
    """Writes ``longalign.safetensors`` as `save` does; returns the file's path.

    Args:
        folder: folder of the checkpoint, created if needed.
        config: config of the run.
        weights: contiguous tensors on the CPU, e.g. from `collect`.
        step: number of completed optimizer steps.
    """
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
        checkpoint: the checkpoint's file or folder, or the output folder of a run, of which the newest checkpoint is
            read.

    Raises:
        FileNotFoundError: if the checkpoint does not exist.
        ValueError: if the file is damaged or has a different format, or its run has no backbone. Also if tensors are
            missing, not listed in the metadata, or not finite floats.
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
    """Checks the tensors of a checkpoint file.

    Raises:
        ValueError: if a name has no known prefix, a listed LoRA has no tensors, or a tensor is not of finite floats.
    """
    prefixes = ("denoiser.", "encoder.", *(f"lora.{i}." for i in range(len(loras))))
    if unknown := [name for name in tensors if not name.startswith(prefixes)]:
        raise ValueError(
            f"{path} has {len(unknown)} tensors that are not listed in its metadata, e.g. '{unknown[0]}'; expected "
            f"names with the prefix {' or '.join(prefixes)}; download or create the file again"
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
    """Returns the config of the run that wrote a checkpoint.

    If keys that only training needs are invalid on this machine, e.g. because a plugin is not installed, all of
    ``rewards``, ``trainer``, ``data`` and ``cache`` are emptied, with a warning.

    Args:
        checkpoint: the checkpoint's file or folder, or the output folder of a run, of which the newest checkpoint is
            read.

    Raises:
        ConfigError: if ``backbone`` or ``encoder`` is invalid on this machine. For a run without a backbone, which
            trained a reward: if any key is invalid.
        FileNotFoundError: if the checkpoint does not exist.
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
    """Loads a checkpoint's weights into a newly built backbone and encoder.

    All LoRAs but the last are merged into the denoiser's weights. The last LoRA is active but frozen, and is merged
    when a new LoRA is added or `Backbone.merge_lora` is called.

    Args:
        checkpoint: the checkpoint's file or folder, or the output folder of a run, of which the newest checkpoint is
            read.
        backbone: backbone of the checkpoint's config.
        encoder: encoder of the checkpoint's config.

    Raises:
        ValueError: if the weights do not fit the backbone or the encoder's adapter, or only one of checkpoint and
            encoder has an adapter.
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
    """Loads backbone and encoder of a checkpoint with all LoRAs merged, frozen and in eval mode.

    Args:
        checkpoint: the checkpoint's file or folder, or the output folder of a run, of which the newest checkpoint is
            loaded.
        runtime: device and dtype. If given, the arguments ``device`` and ``dtype`` have no effect; None: uses these.
        device: a torch device, e.g. ``"cuda"``; None: the fastest available one.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``, for all weights except those of the encoder's adapter;
            None: the dtype of ``loop.precision`` in training.

    Returns:
        ``(config, backbone, encoder)``.

    Raises:
        ValueError: if the checkpoint has no backbone or no encoder, or its weights do not fit these.
        FileNotFoundError: if the checkpoint does not exist.
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
