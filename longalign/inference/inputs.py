"""Finds out which text embeddings a diffusers pipeline takes, by the signature of its call and the denoiser config."""

from __future__ import annotations

import inspect
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

#: argument of a pipeline -> config keys of denoisers for the width of its text states; the first integer counts
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
#: argument of a pipeline -> config key of HunyuanDiT for the number of states, which is fixed there
LENGTH_KEYS = {"prompt_embeds": "text_len", "prompt_embeds_2": "text_len_t5"}

#: argument that identifies an unsupported pipeline -> what the pipeline needs and no encoder gives
UNSUPPORTED = {
    "prompt_embeds_llama3": "states of every layer of Llama 3",
    "prompt_cu_seqlens": "states of Qwen2.5-VL packed into one sequence",
    "prior_token_ids": "image tokens that a language model generates from the prompt",
    "encoder_hidden_states": "states in 'encoder_hidden_states' and a pooled embedding in 'prompt_embeds'",
    "text_encoder_select_layers": "states of several layers of its language model",
}


@dataclass(frozen=True)
class StatesInput:
    """An argument of a pipeline's call that takes a sequence of text states for each prompt.

    Attributes:
        states: name of the argument.
        mask: name of the argument that takes the attention mask of these states; None if there is none.
        as_list: whether the pipeline takes a list of tensors ``(n_i, d)`` without padding, one for each prompt, instead
            of one tensor ``(b, n, d)``.
        width: width ``d`` of the states; None if unknown.
        length: number ``n`` of states per prompt if the denoiser takes only this number; None if it takes any.
    """

    states: str
    mask: str | None
    as_list: bool
    width: int | None
    length: int | None


@dataclass(frozen=True)
class PromptInputs:
    """The text embeddings that a diffusers pipeline takes.

    Attributes:
        sequences: the arguments for sequences of text states, in the order of the call's signature.
        pooled: name of the argument that takes the pooled embedding; None if there is none.
        pooled_width: width of the pooled embedding; None if unknown.
        negative: whether the pipeline takes embeddings of negative prompts.
        unsupported: an input, in words, that the pipeline needs and no `Encoder` provides; None if there is no such
            input.
    """

    sequences: tuple[StatesInput, ...]
    pooled: str | None
    pooled_width: int | None
    negative: bool
    unsupported: str | None

    def describe(self) -> str:
        """Returns a text for messages: the names of the arguments for text embeddings, with their widths."""
        named = [(s.states, s.width) for s in self.sequences]
        named += [(self.pooled, self.pooled_width)] if self.pooled else []
        return ", ".join(f"'{name}'" + (f" of width {width}" if width else "") for name, width in named)


def width_keys(name: str, keys: Container[str]) -> list[str]:
    """Returns the config keys of a denoiser that may contain the width of the text states in an argument.

    Args:
        name: name of the pipeline's argument, e.g. ``"prompt_embeds"``.
        keys: keys that the denoiser's config has; other keys are not returned.
    """
    return [key for key in WIDTH_KEYS.get(name, ()) if key in keys]


def prompt_inputs(pipeline: Any, config: Any = None) -> PromptInputs:
    """Finds out which text embeddings a pipeline takes.

    Args:
        pipeline: a diffusers pipeline or its class.
        config: config of the pipeline's denoiser, from which widths are read; None: widths are unknown.

    Returns:
        The inputs; ``sequences`` is empty if the pipeline takes no text states.
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
