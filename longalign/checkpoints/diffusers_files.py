"""Writes trained weights as files for diffusers: LoRAs as one file, a denoiser, and adapters of text encoders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from longalign.backbones.lora import concat_loras, peft_settings
from longalign.checkpoints.checkpoint import Weights, load_weights, read_config
from longalign.config.run import RunConfig
from longalign.encoders.t5.adapter import TextAdapter
from longalign.files.paths import DIFFUSERS_LORA
from longalign.files.weights import save_tensors
from longalign.runtime import Runtime

# metadata key of diffusers for LoRA settings, otherwise inferred from the shapes of the weights
ADAPTER_METADATA = "lora_adapter_metadata"


def export_lora(checkpoint: str | Path, folder: str | Path) -> Path:
    """Exports the LoRAs of a checkpoint as one file for ``load_lora_weights`` of a diffusers pipeline.

    Args:
        checkpoint: the checkpoint's file or folder, or the output folder of a run, of which the newest checkpoint is
            exported.
        folder: output folder, created if needed.

    Returns:
        The path of the written ``pytorch_lora_weights.safetensors``.

    Raises:
        FileNotFoundError: if the checkpoint does not exist.
        ValueError: if the checkpoint has no LoRA, or its denoiser was fully fine-tuned.
    """
    weights = load_weights(checkpoint)
    if weights.denoiser or not weights.loras:
        raise ValueError(
            f"{checkpoint} has {'all weights of the denoiser' if weights.denoiser else 'no LoRA'}; expected a "
            "checkpoint whose denoiser was trained with LoRAs only"
        )
    return save_lora(read_config(checkpoint), weights, Path(folder))


def save_lora(config: RunConfig, weights: Weights, output: Path) -> Path:
    """Saves all LoRAs of a checkpoint as one file for ``load_lora_weights(output)`` of a diffusers pipeline.

    Several LoRAs are concatenated to one of the same effect; its rank is the sum of their ranks.

    Args:
        config: config of the checkpoint.
        weights: weights of the checkpoint, with at least one LoRA.
        output: output folder, created if needed.

    Returns:
        The path of the written ``pytorch_lora_weights.safetensors``.
    """
    joined = concat_loras(weights.loras)
    component = denoiser_folder(config)
    tensors = {f"{component}.{key}": tensor for key, tensor in joined.items()}
    adapter_metadata = {f"{component}.{key}": value for key, value in peft_settings(joined).items()}
    path = output / DIFFUSERS_LORA
    output.mkdir(parents=True, exist_ok=True)
    save_tensors(path, tensors, {"format": "pt", ADAPTER_METADATA: json.dumps(adapter_metadata)})
    return path


def denoiser_folder(config: RunConfig) -> str:
    """Returns the name of the denoiser in the diffusers pipeline of a config: ``unet`` or ``transformer``."""
    return getattr(config.backbone, "component", "unet")


def save_denoiser(config: RunConfig, weights: Weights, output: Path) -> Path:
    """Saves a fully fine-tuned denoiser with all LoRAs merged, in diffusers format.

    Args:
        config: config of the checkpoint, whose base model is loaded.
        weights: weights of the checkpoint.
        output: output folder, in which the folder ``unet`` or ``transformer`` is written.

    Returns:
        The path of the written folder.
    """
    assert config.backbone is not None
    backbone = config.backbone.build(Runtime())
    backbone.load_full(weights.denoiser)
    backbone.load_lora(weights.loras)
    backbone.merge_lora()
    folder = output / denoiser_folder(config)
    backbone.denoiser.save_pretrained(folder)
    return folder


def build_adapters(state: Mapping[str, Tensor]) -> dict[str, TextAdapter]:
    """Builds an encoder's LaVi-Bridge adapters, networks that map states of T5 (arXiv 2403.07860), from their weights.

    Args:
        state: name -> weight of all adapters of the encoder. Adapters of other types are skipped.

    Returns:
        Name -> adapter, with the names ``adapter``, ``adapter-2`` and so on. Empty if there is no such adapter.
    """
    adapters: dict[str, TextAdapter] = {}
    for key in state:
        if not key.endswith("norm1.weight"):
            continue
        prefix = key.removesuffix("norm1.weight")
        weights = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if {"norm2.weight", "ff1.net.2.weight", "ff2.net.2.weight"} <= set(weights):
            widths = (len(weights[key]) for key in ("norm1.weight", "norm2.weight", "ff2.net.2.weight"))
            adapter = TextAdapter(*widths)
            adapter.load_state_dict(weights)
            adapters[f"adapter-{len(adapters) + 1}" if adapters else "adapter"] = adapter
    return adapters
