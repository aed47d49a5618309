"""Converts the published longSD weights (Hub: luping-liu/LongSD) to a longalign checkpoint and a diffusers LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longalign.backbones.config import LoraConfig
from longalign.backbones.lora import LoraWeights, lora_targets
from longalign.backbones.stable_diffusion.sd import empty_unet
from longalign.checkpoints.checkpoint import Weights, write
from longalign.checkpoints.diffusers_files import export_lora
from longalign.config.run import RunConfig, load_config
from longalign.encoders.t5.adapter import TextAdapter
from longalign.files.weights import load_pickle
from longalign.hub import CHECKPOINT

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
T5 = "google-t5/t5-large"
ADAPTER = "s28750_adapter"
LORAS = {"align": ("s28750_lora_vis.pt", 28750), "reward": ("sd15-reward-3750.pt", 3750)}
"""Training stage -> file of its LoRA and number of training steps, in the order of application."""

# non-default config values of the UNet of Stable Diffusion 1.5; spares the download of its config
_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


def convert_longsd(
    source: str | Path, output: str | Path, backbone: str = SD15, t5: str = T5, align_only: bool = False
) -> Path:
    """Converts the published LongAlign weights (longSD) to a checkpoint for ``longalign generate`` and ``init_from``.

    The published weights are the LoRAs of two training stages, first supervised (align), then by reward, and the
    adapter of T5. The function also writes ``pytorch_lora_weights.safetensors``, the sum of the LoRAs, for
    ``load_lora_weights`` of a diffusers pipeline.

    Args:
        source: folder with ``s28750_adapter/``, ``s28750_lora_vis.pt`` and ``sd15-reward-3750.pt``.
        output: output folder, created if needed; must not already contain ``longalign.safetensors``.
        backbone: Hub id or local folder of the base model, Stable Diffusion 1.5 in diffusers layout, whose CLIP text
            encoder encodes the sentences of a prompt.
        t5: Hub id or local folder of the T5 encoder.
        align_only: whether to omit the LoRA of the reward stage; ``sd15-reward-3750.pt`` is then not required.

    Returns:
        The path of ``longalign.safetensors``.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file's content, number of tensors or shapes are not as expected, or ``output`` contains a
            checkpoint.
    """
    source, output = Path(source), Path(output)
    stages = {name: entry for name, entry in LORAS.items() if name == "align" or not align_only}
    missing = [f for f in (ADAPTER, *(file for file, _ in stages.values())) if not (source / f).exists()]
    if missing:
        raise FileNotFoundError(
            f"missing in {source}: {', '.join(missing)}; expected the files of luping-liu/LongSD"
            + (" (--align-only skips the reward stage)" if missing == [LORAS["reward"][0]] else "")
        )
    if (output / CHECKPOINT).exists():
        raise ValueError(f"{output / CHECKPOINT} exists; choose a different folder")
    text_adapter = TextAdapter.load(str(source / ADAPTER))
    unet = empty_unet(backbone, _UNET if backbone == SD15 else None)
    loras = [read_lora_file(source / file, unet, name) for name, (file, _) in stages.items()]
    # T5 is part 1 of the encoder in `longsd_config`
    adapter = {f"parts.1.adapter.{key}": tensor.contiguous() for key, tensor in text_adapter.state_dict().items()}
    step = sum(steps for _, steps in stages.values())
    path = write(output, longsd_config(backbone, t5, text_adapter), Weights(loras, {}, adapter), step)
    export_lora(path, output)
    return path


def longsd_config(backbone: str, t5: str, adapter: TextAdapter) -> RunConfig:
    """Returns the config of backbone and encoder with which longSD was trained (paper, section 3.1 and appendix A).

    The encoder concatenates 240 states of CLIP, which encodes each sentence separately, and 240 states of T5, mapped to
    the width of CLIP's states by the adapter.

    Args:
        backbone: Hub id or local folder of the base model.
        t5: Hub id or local folder of the T5 encoder.
        adapter: the adapter; only its widths are used.
    """
    widths = {key: getattr(adapter, key) for key in ("in_dim", "int_dim", "out_dim")}
    clip = {"name": "clip-segment", "checkpoint": backbone, "segmenter": "longalign", "max_tokens": 240}
    clip["truncate_segments"] = True
    text = {"name": "t5", "checkpoint": t5, "max_tokens": 240, "adapter": widths}
    parts = [{**part, "overflow": "truncate"} for part in (clip, text)]
    return load_config(
        {"backbone": {"name": "sd", "checkpoint": backbone}, "encoder": {"name": "concat", "parts": parts}}
    )


def read_lora_file(path: Path, unet: nn.Module, name: str) -> LoraWeights:
    """Reads one stage's LoRA from its pickled flat list of tensors ``[up, down, up, down, ...]``.

    The list has one pair per Linear and Conv2d inside Attention, ResnetBlock2D and GEGLU, in the order of
    ``named_modules``, without duplicates: 224 pairs in Stable Diffusion 1.5.

    Args:
        path: path of the ``.pt`` file.
        unet: the UNet of the base model, whose weights are not used.
        name: name of the LoRA in the checkpoint, e.g. ``"align"``.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the number of tensors or a tensor's shape or dtype does not fit these layers.
    """
    tensors = read_tensors(path)
    layers = {target: unet.get_submodule(target) for target in lora_targets(unet)}
    if len(tensors) != 2 * len(layers):
        raise ValueError(
            f"{path} has {len(tensors)} tensors; expected {2 * len(layers)} for the {len(layers)} LoRA layers of this "
            "UNet; use the base model with which the LoRA was trained"
        )
    rank = tensors[0].shape[1] if tensors[0].dim() > 1 else 0
    state: dict[str, Tensor] = {}
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    for i, ((target, layer), (up, down)) in enumerate(zip(layers.items(), pairs, strict=True)):
        expected = _shapes(layer, rank)
        for offset, (kind, tensor) in enumerate((("up", up), ("down", down))):
            if tuple(tensor.shape) != expected[kind] or not tensor.is_floating_point():
                raise ValueError(
                    f"{path}: tensor {2 * i + offset}, '{kind}' of '{target}': expected floats of shape "
                    f"{expected[kind]}, got {tensor.dtype} {tuple(tensor.shape)}; the list must be [up, down, up, "
                    "down, ...] in the order of the UNet's layers"
                )
        state[f"{target}.lora_A.weight"] = down.detach().clone(memory_format=torch.contiguous_format)
        state[f"{target}.lora_B.weight"] = up.detach().clone(memory_format=torch.contiguous_format)
    return LoraWeights(name, LoraConfig(rank=rank, scale=1.0, dropout=0.1, dropout_placement="up"), state)


def read_tensors(path: Path) -> list[Tensor]:
    """Reads a list of tensors from a ``torch.save`` file to the CPU, without executing code in the file.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is damaged or contains anything but a non-empty list of tensors.
    """
    content = load_pickle(path)
    if not isinstance(content, (list, tuple)) or not content or not all(isinstance(t, Tensor) for t in content):
        kind = f"a mapping with keys {list(content)[:2]}" if isinstance(content, Mapping) else repr(type(content))
        raise ValueError(
            f"{path}: expected a list of tensors [up, down, up, down, ...], got {kind}; use the file of "
            "luping-liu/LongSD"
        )
    return list(content)


def _shapes(layer: Any, rank: int) -> dict[str, tuple[int, ...]]:
    if isinstance(layer, nn.Conv2d):
        return {
            "up": (layer.out_channels, rank, 1, 1),
            "down": (rank, layer.in_channels // layer.groups, *layer.kernel_size),
        }
    return {"up": (layer.out_features, rank), "down": (rank, layer.in_features)}
