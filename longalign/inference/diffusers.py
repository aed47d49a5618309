"""Encodes prompts for unmodified diffusers pipelines, and formats messages about truncated prompts."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from longalign.encoders.base import Conditioning, Encoder, PromptReport, TruncationWarning
from longalign.inference.inputs import PromptInputs, StatesInput, prompt_inputs

#: the encoders last built for each pipeline, by config, device and dtype
_built: WeakKeyDictionary[Any, dict[Any, Encoder]] = WeakKeyDictionary()


def per_prompt(negative: str | Sequence[str] | None, count: int) -> list[str]:
    """Returns one negative prompt for each of ``count`` prompts.

    Args:
        negative: one text for all prompts, or one text for each; None: the empty text for all.
        count: number of prompts.

    Raises:
        ValueError: if the number of texts is not ``count``.
    """
    texts = [negative or ""] * count if negative is None or isinstance(negative, str) else list(negative)
    if len(texts) != count:
        raise ValueError(
            f"expected one negative prompt for all or one per prompt, got {len(texts)} negative prompts for {count} "
            f"prompts; pass one text, or a list of {count} texts"
        )
    return texts


def condition(
    pipe: Any, prompts: str | Sequence[str], negative_prompts: str | Sequence[str] | None = None, *, encoder: Any = None
) -> dict[str, Any]:
    """Encodes prompts as keyword arguments of an unmodified diffusers pipeline: ``pipe(**condition(pipe, prompts))``.

    Prompts and negative prompts are encoded in one call, so that their states have the same number of tokens. A warning
    is issued for truncated prompts, and for each output of the encoder that the pipeline does not accept.
    docs/pipelines.md lists what each pipeline takes.

    Args:
        pipe: a diffusers pipeline with a call argument ``prompt_embeds``.
        prompts: one or several prompts.
        negative_prompts: one for all prompts or one per prompt; None: the empty prompt.
        encoder: an `Encoder`, or its name or config. From a name or config, the encoder is built on the pipeline's
            device and reused in the next call. For a pipeline that takes several sequences of text states, such as
            HunyuanDiT, a list of encoders in the order of the pipeline's arguments. None uses the pipeline's own text
            encoders, which then encode segments of whole sentences, packed to at most 40 tokens; see
            `longalign.encoders.pipeline_encoder.pipeline_encoder`.

    Returns:
        Keyword arguments. ``prompt_embeds`` contains the text states ``(b, n, d)`` of b prompts, or a list of b tensors
        ``(n_i, d)`` without padding if the pipeline takes lists. If the pipeline accepts them, also
        ``negative_prompt_embeds``, ``pooled_prompt_embeds``, ``negative_pooled_prompt_embeds`` and attention masks.
        States and pooled embeddings are in the denoiser's dtype and on the pipeline's device.

    Raises:
        ValueError: if the pipeline accepts no embeddings, or needs an input that the encoder does not provide. Also if
            the pipeline expects a different number of encoders, or text states of a different number or width. Also if
            ``encoder`` is None and the pipeline's text encoders are not supported.
    """
    name = type(pipe).__name__
    parameters = inspect.signature(pipe.__call__).parameters
    inputs = prompt_inputs(pipe, getattr(_denoiser(pipe), "config", None))
    if not inputs.sequences:
        raise ValueError(
            f"expected a pipeline that accepts 'prompt_embeds', got {name}; pass the prompt to the pipeline instead"
        )
    if inputs.unsupported is not None:
        raise ValueError(
            f"{name} takes {inputs.unsupported}, which no encoder gives; pass the prompt to the pipeline instead"
        )
    sources = list(encoder) if isinstance(encoder, (list, tuple)) else [encoder]
    if len(sources) != len(inputs.sequences):
        raise ValueError(
            f"{name} takes {inputs.describe()}: {len(inputs.sequences)} sequence(s) of text states, got "
            f"{len(sources)} encoder(s); pass encoder=[...] with one encoder for each, in this order"
        )
    device = getattr(pipe, "_execution_device", None) or pipe.device
    dtype = _dtype(pipe)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    negatives = per_prompt(negative_prompts, len(prompts))
    if not inputs.negative and negative_prompts is not None:
        warnings.warn(
            f"{name} does not accept 'negative_prompt_embeds'; the negative prompt is ignored, omit it", stacklevel=2
        )
    texts = [*prompts, *negatives]
    with torch.no_grad(), warnings.catch_warnings(), _get_encoders(sources, pipe, device, dtype) as built:
        warnings.simplefilter("ignore", TruncationWarning)  # reported below, per prompt
        texts = _expand_learned_tokens(pipe, texts) if encoder is None else texts
        conditionings = [encoder.encode(texts) for encoder in built]
    pooled = next((c.pooled for c in conditionings if c.pooled is not None), None)
    _check_pooled(name, inputs, pooled)
    out: dict[str, Any] = {}
    for wanted, conditioning in zip(inputs.sequences, conditionings, strict=True):
        _check_states(name, wanted, conditioning)
        for prefix, branch in _branches(conditioning.to(device, dtype), len(prompts)).items():
            out |= _arguments(wanted, branch, prefix)
    for message in dict.fromkeys(m for c in conditionings for m in truncation_messages(c.reports)):
        warnings.warn(message, stacklevel=2)
    if inputs.pooled is not None and pooled is not None:
        pooled = pooled.to(device, dtype)
        pooled = pooled[:, None] if inputs.pooled == "prompt_embeds_pooled" else pooled  # a sequence of one state
        out |= {inputs.pooled: pooled[: len(prompts)], f"negative_{inputs.pooled}": pooled[len(prompts) :]}
    out = {key: value for key, value in out.items() if key in parameters}
    # pipelines raise if both a negative prompt and its embeddings are given, so override a default that is not None
    negative = parameters.get("negative_prompt")
    if "negative_prompt_embeds" in out and negative is not None and negative.default is not None:
        out["negative_prompt"] = None
    return out


@contextmanager
def _get_encoders(
    sources: Sequence[Any], pipe: Any, device: torch.device, dtype: torch.dtype
) -> Iterator[list[Encoder]]:
    """Context manager: yields the encoders for the argument ``encoder`` of `condition`.

    Encoders of names and configs are built, or reused if the last call for ``pipe`` built them.

    Args:
        sources: encoders, names or configs; ``[None]`` for the pipeline's own text encoders.
        pipe: the diffusers pipeline.
        device: device of encoders that are built.
        dtype: dtype of encoders that are built.
    """
    if None in sources:
        from longalign.encoders.pipeline_encoder import pipeline_encoder

        with pipeline_encoder(pipe) as built:
            yield [built]
        return
    from longalign.registry import encoders
    from longalign.runtime import Runtime

    place = str(device), str(dtype).removeprefix("torch.")
    configs = [None if isinstance(source, Encoder) else encoders.validate(source) for source in sources]
    keys = [None if config is None else (config.model_dump_json(), *place) for config in configs]
    before = _built.pop(pipe, {})
    before = {key: before[key] for key in keys if key in before}  # free others before building
    if any(key is not None for key in keys):
        _built[pipe] = before
    for key, config in zip(keys, configs, strict=True):
        if config is not None and key not in before:
            before[key] = encoders.construct(config, Runtime(*place))
    yield [source if key is None else before[key] for source, key in zip(sources, keys, strict=True)]


def _denoiser(pipe: Any) -> Any:
    """Returns the network of a pipeline that takes the text states, or None if there is none."""
    parts = (getattr(pipe, name, None) for name in ("unet", "transformer", "prior", "prior_prior"))
    return next((part for part in parts if part is not None), None)


def _dtype(pipe: Any) -> torch.dtype:
    """Returns the dtype of a pipeline's denoiser, or of the pipeline if it has no denoiser."""
    dtype = getattr(_denoiser(pipe), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else pipe.dtype


def _expand_learned_tokens(pipe: Any, texts: list[str]) -> list[str]:
    """Expands textual-inversion tokens with several vectors in texts, as the pipeline does with its prompts."""
    convert = getattr(pipe, "maybe_convert_prompt", None)
    return texts if convert is None else convert(texts, pipe.tokenizer)


def _check_pooled(name: str, inputs: PromptInputs, pooled: Tensor | None) -> None:
    """Checks the pooled embedding for a pipeline; warns if the pipeline does not accept one.

    Raises:
        ValueError: if the pipeline needs a pooled embedding and there is none, or its width is different.
    """
    if inputs.pooled is None:
        if pooled is not None:
            warnings.warn(
                f"{name} does not accept 'pooled_prompt_embeds'; the pooled embedding is ignored", stacklevel=3
            )
        return
    if pooled is None:
        raise ValueError(
            f"{name} needs '{inputs.pooled}', but the encoder has none; use an encoder with a pooled embedding. "
            f"It takes {inputs.describe()}"
        )
    if inputs.pooled_width not in (None, pooled.shape[-1]):
        raise ValueError(
            f"{name} expects a pooled embedding of width {inputs.pooled_width}, got {pooled.shape[-1]} from the "
            "encoder; choose a matching encoder"
        )


def _check_states(name: str, wanted: StatesInput, conditioning: Conditioning) -> None:
    """Checks text states for an argument of a pipeline; warns if they need an attention mask that it does not accept.

    Raises:
        ValueError: if the states depend on the timestep, have a different width or are too many.
    """
    if not conditioning.is_static:
        raise ValueError(
            f"{name} does not support conditioning that depends on the timestep or combines several predictions; use "
            "`longalign generate`"
        )
    if wanted.width not in (None, conditioning.states.shape[-1]):
        raise ValueError(
            f"{name} expects text states of width {wanted.width} in '{wanted.states}', got "
            f"{conditioning.states.shape[-1]} from the encoder; choose a matching encoder"
        )
    if wanted.length is not None and conditioning.states.shape[1] > wanted.length:
        raise ValueError(
            f"{name} expects {wanted.length} text states in '{wanted.states}', got {conditioning.states.shape[1]} from "
            "the encoder; shorten the prompt, or set the encoder's max_tokens"
        )
    padded = conditioning.mask is not None and not bool(conditioning.mask.all())
    if padded and wanted.mask is None and not wanted.as_list:
        warnings.warn(
            f"{name} does not accept an attention mask, so it attends to the padding of shorter prompts; use the "
            "<pad*> padding of clip-segment (max_tokens) or generate one prompt at a time",
            stacklevel=3,
        )


def _branches(conditioning: Conditioning, count: int) -> dict[str, Conditioning]:
    """Splits the conditioning of ``count`` prompts followed by their negative prompts.

    The keys are the prefixes of the pipeline's arguments: empty for prompts, ``negative_`` for negative prompts.
    """
    return {"": conditioning[:count], "negative_": conditioning[count:]}


def _arguments(wanted: StatesInput, branch: Conditioning, prefix: str) -> dict[str, Any]:
    """Returns states and mask as keyword arguments of a pipeline, whose names start with ``prefix``."""
    states, mask = branch.states, branch.mask
    if wanted.as_list:
        rows = list(states) if mask is None else [row[kept] for row, kept in zip(states, mask, strict=True)]
        return {f"{prefix}{wanted.states}": rows}
    if wanted.mask is None:
        return {f"{prefix}{wanted.states}": states}
    mask = torch.ones_like(states[..., 0], dtype=torch.bool) if mask is None else mask
    if wanted.length is not None:
        missing = wanted.length - states.shape[1]
        states, mask = pad(states, (0, 0, 0, missing)), pad(mask, (0, missing))
    return {f"{prefix}{wanted.states}": states, f"{prefix}{wanted.mask}": mask}


def truncation_messages(reports: Sequence[PromptReport]) -> list[str]:
    """Returns a message for each truncated prompt, with the number of encoded tokens and the text that was dropped.

    Args:
        reports: the report of each prompt, from `Encoder.report`.
    """
    return [
        f"prompt {i}: encoded {sum(report.tokens)} tokens, truncated {len(report.truncated.split())} words: "
        f"{report.truncated.strip()[:60]!r}"
        for i, report in enumerate(reports)
        if report.truncated.strip()
    ]
