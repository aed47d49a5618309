"""Converts the weight names of OpenAI's CLIP to those of transformers."""

from __future__ import annotations

import torch
from torch import Tensor

_NUM_CLIP_POSITIONS = 20
"""Number of positions whose embeddings LongCLIP keeps from CLIP; the others are in ``positional_embedding_res``."""

_NAMES = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "attn.out_proj.": "self_attn.out_proj.",
}


def text_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the text-model weights of an OpenAI-style CLIP under the names of a transformers ``CLIPTextModel``.

    The names have no prefix ``text_model.``. For LongCLIP (arXiv 2403.15378), the first 20 positions are those of
    ``positional_embedding``, the others those of ``positional_embedding_res``.

    Args:
        state: a state dict with ``token_embedding.*``, ``positional_embedding``, ``transformer.resblocks.*``,
            ``ln_final.*``, and for LongCLIP ``positional_embedding_res``. Other keys, e.g. of the image tower, are
            ignored.

    Raises:
        ValueError: if the token embedding, ``positional_embedding`` or the weight of ``ln_final`` is missing.
    """
    missing = [k for k in ("token_embedding.weight", "positional_embedding", "ln_final.weight") if k not in state]
    if missing:
        raise ValueError(
            f"expected an OpenAI-style CLIP, but keys are missing: {missing}; got {sorted(state)[:5]}...; use an "
            "original file of CLIP or LongCLIP"
        )
    positions = state["positional_embedding"]
    if "positional_embedding_res" in state:
        positions = torch.cat(
            [positions[:_NUM_CLIP_POSITIONS], state["positional_embedding_res"][_NUM_CLIP_POSITIONS:]]
        )
    out = {
        "embeddings.token_embedding.weight": state["token_embedding.weight"],
        "embeddings.position_embedding.weight": positions,
        "final_layer_norm.weight": state["ln_final.weight"],
        "final_layer_norm.bias": state["ln_final.bias"],
    }
    for key, value in state.items():
        if not key.startswith("transformer.resblocks."):
            continue
        layer, _, name = key.removeprefix("transformer.resblocks.").partition(".")
        prefix = f"encoder.layers.{layer}."
        if name.startswith("attn.in_proj_"):
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                out[f"{prefix}self_attn.{part}_proj.{name.removeprefix('attn.in_proj_')}"] = chunk
            continue
        for old, new in _NAMES.items():
            if name.startswith(old):
                out[prefix + name.replace(old, new)] = value
    return out
