"""Reads the published files of ImageReward, and renames BLIP's original parameters to transformers' names."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from longalign.files.weights import load_pickle
from longalign.rewards.pretrained import find_optional_file
from longalign.runtime import resolve_checkpoint

WEIGHTS, TEXT_CONFIG = "ImageReward.pt", "med_config.json"
#: width of an attention head of BLIP's image encoders
HEAD_WIDTH = 64
#: epsilon of the image encoder's layer norms in BLIP's code; transformers' default is 1e-5
LAYER_NORM_EPS = 1e-6

VISION, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
_VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)


def find_file(checkpoint: str, name: str, revision: str | None) -> Path:
    """Returns the path of a published file, downloaded if needed.

    Args:
        checkpoint: Hub id or local folder.
        name: name of the file.
        revision: branch, tag or commit of the Hub repository; None: its main branch.

    Raises:
        ValueError: if the checkpoint does not contain the file.
    """
    path = find_optional_file(resolve_checkpoint(checkpoint), name, revision)
    if path is None:
        raise ValueError(
            f"checkpoint '{checkpoint}' of 'imagereward' could not be loaded: it has no {name}, or is not on this "
            f"machine and cannot be downloaded; expected a Hub id, or a folder with {WEIGHTS} and {TEXT_CONFIG}"
        )
    return path


def read_state(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of ``ImageReward.pt``, on the CPU. No code in the file is executed.

    Raises:
        ValueError: if the file is damaged or does not contain the weights of ImageReward.
    """
    state = load_pickle(path)
    prefixes = (VISION, TEXT, HEAD)
    if not isinstance(state, dict) or not all(any(str(key).startswith(p) for key in state) for p in prefixes):
        keys = sorted(map(str, state))[:3] if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"expected weights with the names {', '.join(p + '*' for p in prefixes)} in '{path}', got {keys}; use the "
            "file of ImageReward"
        )
    return state


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the state dict of one module, with the parameter names of transformers.

    Args:
        state: all tensors of ``ImageReward.pt``.
        prefix: `VISION`, `TEXT` or `HEAD`: the module, by the prefix of its
            tensors' names.
    """
    part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if prefix != VISION:
        return {key: value for key, value in part.items() if not key.endswith("position_ids")}  # a constant
    for pattern, name in _VISION_NAMES:
        part = {re.sub(pattern, name, key): value for key, value in part.items()}
    return part


def vision_config(state: dict[str, Tensor]) -> dict[str, Any]:
    """Returns the arguments of a ``BlipVisionConfig``, computed from the shapes of the image encoder's weights.

    The published files contain no config of the image encoder.

    Args:
        state: all tensors of ``ImageReward.pt``.
    """
    width, _, patch, _ = state[VISION + "patch_embed.proj.weight"].shape
    blocks = {key.removeprefix(VISION).split(".")[1] for key in state if key.startswith(VISION + "blocks.")}
    return {
        "hidden_size": width,
        "intermediate_size": state[VISION + "blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": len(blocks),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "image_size": patch * math.isqrt(state[VISION + "pos_embed"].shape[1] - 1),
        "patch_size": patch,
        "layer_norm_eps": LAYER_NORM_EPS,
    }


def text_config(path: Path, vision_width: int) -> dict[str, Any]:
    """Returns the arguments of a ``BlipTextConfig``, read from ``med_config.json``.

    Args:
        path: path of ``med_config.json``. The key ``encoder_width`` in this file has no effect.
        vision_width: width of the states of the image encoder, to which the text encoder attends.

    Raises:
        ValueError: if keys are missing in the file.
    """
    keys = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
        "vocab_size", "hidden_act", "layer_norm_eps", "pad_token_id",
    )  # fmt: skip
    values = json.loads(path.read_text(encoding="utf-8"))
    if missing := [key for key in keys if key not in values]:
        raise ValueError(f"expected the keys {', '.join(missing)} in '{path}', as in the file of ImageReward; add them")
    return {**{key: values[key] for key in keys}, "encoder_hidden_size": vision_width, "is_decoder": True}


def load_part(module: nn.Module, state: dict[str, Tensor], prefix: str, path: Path) -> None:
    """Loads the weights of one module.

    Args:
        module: the module.
        state: all tensors of ``ImageReward.pt``.
        prefix: which module it is: `VISION`, `TEXT` or `HEAD`.
        path: path of ``ImageReward.pt``, for messages.

    Raises:
        ValueError: if weights are missing or have a different shape.
    """
    try:
        missing = module.load_state_dict(part_of(state, prefix), strict=False).missing_keys
    except RuntimeError as error:
        raise ValueError(
            f"the weights {prefix}* of '{path}' do not match {TEXT_CONFIG}: {error}; use both files of ImageReward"
        ) from error
    if missing:
        raise ValueError(
            f"'{path}' is not complete: {len(missing)} weights {prefix}* are missing, e.g. {missing[0]} (transformers' "
            "name); use the file of ImageReward"
        )
