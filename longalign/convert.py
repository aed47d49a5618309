"""The published longSD weights (hub: luping-liu/LongSD) as a checkpoint of ours, and as a LoRA for plain diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longalign.backbones.configs import LoraConfig
from longalign.backbones.lora import LoraWeights, lora_targets
from longalign.backbones.sd import empty_unet
from longalign.checkpoint import Weights, export_lora, write
from longalign.config import RunConfig, load_config
from longalign.encoders.adapter import TextAdapter
from longalign.files import CHECKPOINT
from longalign.weights import load_pickle

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
T5 = "google-t5/t5-large"
ADAPTER = "s28750_adapter"
LORAS = {"align": ("s28750_lora_vis.pt", 28750), "reward": ("sd15-reward-3750.pt", 3750)}
"""File of each stage, in the order in which they are applied, and the steps it was trained for."""

# what a UNet of Stable Diffusion 1.5 differs in from diffusers' defaults, so that its hub page is not needed
_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


def convert_longsd(
    source: str | Path, output: str | Path, backbone: str = SD15, t5: str = T5, align_only: bool = False
) -> Path:
    """Turns a folder of the published files into a checkpoint that ``generate`` and ``init_from`` read.

    Beside ``longalign.safetensors`` it writes ``pytorch_lora_weights.safetensors``, the sum of both LoRAs, which a
    diffusers pipeline reads with ``load_lora_weights``.

    Args:
        source: holds ``s28750_adapter/``, ``s28750_lora_vis.pt`` and ``sd15-reward-3750.pt``.
        output: folder for both files; one that has a checkpoint already is refused.
        backbone: hub id or folder of the base model, whose CLIP encodes the segments too.
        t5: hub id or folder of T5.
        align_only: leaves the reward stage out; its file is then not needed.

    Returns:
        The path of ``longalign.safetensors``.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file holds something else than its tensors, or not as many, or of other shapes.
    """
    source, output = Path(source), Path(output)
    stages = {name: entry for name, entry in LORAS.items() if name == "align" or not align_only}
    missing = [f for f in (ADAPTER, *(file for file, _ in stages.values())) if not (source / f).exists()]
    if missing:
        raise FileNotFoundError(
            f"{source} lacks {', '.join(missing)}; expected the files of luping-liu/LongSD"
            + (" (--align-only does without the reward stage)" if missing == [LORAS["reward"][0]] else "")
        )
    if (output / CHECKPOINT).exists():
        raise ValueError(f"{output / CHECKPOINT} exists; choose another folder")
    text_adapter = TextAdapter.load(str(source / ADAPTER))
    unet = empty_unet(backbone, _UNET if backbone == SD15 else None)
    loras = [read_lora_file(source / file, unet, name) for name, (file, _) in stages.items()]
    # "parts.1" is the place of T5 in the encoder that `longsd_config` composes
    adapter = {f"parts.1.adapter.{key}": tensor.contiguous() for key, tensor in text_adapter.state_dict().items()}
    step = sum(steps for _, steps in stages.values())
    path = write(output, longsd_config(backbone, t5, text_adapter), Weights(loras, {}, adapter), step)
    export_lora(path, output)
    return path


def longsd_config(backbone: str, t5: str, adapter: TextAdapter) -> RunConfig:
    """The composition that the weights were trained in (paper 3.1, appendix A): CLIP's segments in 240 states, then
    T5's 240 through the adapter, whose weights come from the checkpoint."""
    widths = {key: getattr(adapter, key) for key in ("in_dim", "int_dim", "out_dim")}
    clip = {"name": "clip-segment", "checkpoint": backbone, "segmenter": "longalign", "max_tokens": 240}
    text = {"name": "t5", "checkpoint": t5, "max_tokens": 240, "adapter": widths}
    parts = [{**part, "overflow": "truncate"} for part in (clip, text)]
    return load_config(
        {"backbone": {"name": "sd", "checkpoint": backbone}, "encoder": {"name": "concat", "parts": parts}}
    )


def read_lora_file(path: Path, unet: nn.Module, name: str) -> LoraWeights:
    """One stage's LoRA, from its pickled flat list ``[up, down, up, down, ...]``.

    A pair belongs to each Linear and Conv2d inside Attention, ResnetBlock2D and GEGLU in the order in which
    ``named_modules`` meets them, each once: 224 pairs in Stable Diffusion 1.5.

    Raises:
        ValueError: if the list has another length, or a tensor another shape, than these layers ask for.
    """
    tensors = read_tensors(path)
    layers = {target: unet.get_submodule(target) for target in lora_targets(unet)}
    if len(tensors) != 2 * len(layers):
        raise ValueError(
            f"{path} holds {len(tensors)} tensors; this UNet has {len(layers)} layers with a LoRA, which makes "
            f"{2 * len(layers)}. Is it the right base model?"
        )
    rank = tensors[0].shape[1] if tensors[0].dim() > 1 else 0
    state: dict[str, Tensor] = {}
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    for i, ((target, layer), (up, down)) in enumerate(zip(layers.items(), pairs, strict=True)):
        expected = _shapes(layer, rank)
        for place, (what, tensor) in enumerate((("up", up), ("down", down))):
            if tuple(tensor.shape) != expected[what] or not tensor.is_floating_point():
                raise ValueError(
                    f"{path}: tensor {2 * i + place}, '{what}' of '{target}', should be floats of shape "
                    f"{expected[what]}, got {tensor.dtype} {tuple(tensor.shape)}; expected the list [up, down, up, "
                    "down, ...] in the order of the UNet's layers"
                )
        state[f"{target}.lora_A.weight"] = down.detach().clone(memory_format=torch.contiguous_format)
        state[f"{target}.lora_B.weight"] = up.detach().clone(memory_format=torch.contiguous_format)
    return LoraWeights(name, LoraConfig(rank=rank, scale=1.0, dropout=0.1, dropout_placement="up"), state)


def read_tensors(path: Path) -> list[Tensor]:
    """The list of tensors in a pickle, read without running any code in it. Raises ValueError if it is none."""
    found = load_pickle(path)
    if not isinstance(found, (list, tuple)) or not found or not all(isinstance(t, Tensor) for t in found):
        held = f"a mapping with keys such as {list(found)[:2]}" if isinstance(found, Mapping) else repr(type(found))
        raise ValueError(f"{path} should hold a list of tensors [up, down, up, down, ...], it holds {held}")
    return list(found)


def _shapes(layer: Any, rank: int) -> dict[str, tuple[int, ...]]:
    if isinstance(layer, nn.Conv2d):
        return {
            "up": (layer.out_channels, rank, 1, 1),
            "down": (rank, layer.in_channels // layer.groups, *layer.kernel_size),
        }
    return {"up": (layer.out_features, rank), "down": (rank, layer.in_features)}
