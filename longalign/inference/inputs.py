"""Which text embeddings a diffusers pipeline takes, from the signature of its call and its denoiser's config."""

from __future__ import annotations

import inspect
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

#: config keys of denoisers for the width of a sequence of text states; the first one that is a number counts
WIDTH_KEYS: Mapping[str, tuple[str, ...]] = {
    "prompt_embeds": (
        "caption_channels", "joint_attention_dim", "text_embed_dim", "cap_feat_dim", "context_in_dim", "text_in_dim",
        "text_hidden_dim", "text_dim", "encoder_hid_dim", "cross_attention_dim",
    ),
    "prompt_embeds_2": ("cross_attention_dim_t5", "text_embed_2_dim"),
}  # fmt: skip
POOLED = ("pooled_prompt_embeds", "prompt_embeds_pooled")
POOLED_WIDTH_KEYS = ("pooled_projection_dim", "clip_text_pooled_in_channels")
MASKS = ("prompt_attention_mask", "prompt_embeds_mask", "attention_mask")
#: config keys of HunyuanDiT for the only number of states that it takes
LENGTH_KEYS = {"prompt_embeds": "text_len", "prompt_embeds_2": "text_len_t5"}

#: arguments of pipelines whose prompt is more than sequences of states with masks and a pooled embedding
UNSUPPORTED = {
    "prompt_embeds_llama3": "states of every layer of Llama 3",
    "prompt_cu_seqlens": "states of Qwen2.5-VL packed into one sequence",
    "prior_token_ids": "image tokens that a language model generates from the prompt",
    "encoder_hidden_states": "states in 'encoder_hidden_states' and a pooled embedding in 'prompt_embeds'",
    "text_encoder_select_layers": "states of several layers of its language model",
}


@dataclass(frozen=True)
class StatesInput:
    """A sequence of text states that a pipeline takes.

    Attributes:
        states: name of the argument with the states.
        mask: name of the argument with the mask, or None.
        as_list: whether the pipeline takes a list with the states of each prompt, without padding.
        width: width of the states; None if unknown.
        length: the only number of states that the denoiser takes; None if any.
    """

    states: str
    mask: str | None
    as_list: bool
    width: int | None
    length: int | None


@dataclass(frozen=True)
class PromptInputs:
    """The text embeddings that a pipeline takes.

    Attributes:
        sequences: the sequences of text states, in the order of the pipeline's arguments.
        pooled: name of the argument with the pooled embedding, or None.
        pooled_width: width of the pooled embedding; None if unknown.
        negative: whether the pipeline takes embeddings of a negative prompt.
        unsupported: what the pipeline needs that no encoder gives, or None.
    """

    sequences: tuple[StatesInput, ...]
    pooled: str | None
    pooled_width: int | None
    negative: bool
    unsupported: str | None

    def describe(self) -> str:
        """Returns the arguments with their widths, for messages."""
        named = [(s.states, s.width) for s in self.sequences]
        named += [(self.pooled, self.pooled_width)] if self.pooled else []
        return ", ".join(f"'{name}'" + (f" of width {width}" if width else "") for name, width in named)


def width_keys(name: str, keys: Container[str]) -> list[str]:
    """Returns the keys of a denoiser's config that may contain the width of the states in the argument ``name``."""
    return [key for key in WIDTH_KEYS.get(name, ()) if key in keys]


def prompt_inputs(pipeline: Any, config: Any = None) -> PromptInputs:
    """Returns the text embeddings that a pipeline takes; ``sequences`` is empty if it takes none.

    Args:
        pipeline: a diffusers pipeline or its class.
        config: config of its denoiser, for the widths; they are unknown without it.
    """
    parameters = inspect.signature(pipeline.__call__).parameters
    cls = pipeline if inspect.isclass(pipeline) else type(pipeline)
    keys = [*(key for keys in WIDTH_KEYS.values() for key in keys), *LENGTH_KEYS.values(), *POOLED_WIDTH_KEYS]
    numbers = {key: value for key in keys if isinstance(value := getattr(config, key, None), int)}
    sequences = []
    for name, parameter in parameters.items():
        match = re.fullmatch(r"prompt_embeds(?P<suffix>_(?!mask|pooled|scale)\w+)?", name)
        if match is None:
            continue
        masks = [mask for mask in MASKS if f"{mask}{match['suffix'] or ''}" in parameters]
        widths, length = width_keys(name, numbers), LENGTH_KEYS.get(name)
        sequences.append(
            StatesInput(
                states=name,
                mask=f"{masks[0]}{match['suffix'] or ''}" if masks else None,
                as_list="list[" in str(parameter.annotation).lower(),
                width=numbers[widths[0]] if widths else None,
                length=numbers.get(str(length)) if "text_len_t5" in numbers else None,
            )
        )
    all_names = {*parameters, *inspect.signature(cls.__init__).parameters}
    return PromptInputs(
        tuple(sequences),
        next((name for name in POOLED if name in parameters), None),
        next((numbers[key] for key in POOLED_WIDTH_KEYS if key in numbers), None),
        any(f"negative_{s.states}" in parameters for s in sequences),
        next((reason for name, reason in UNSUPPORTED.items() if name in all_names), None),
    )
