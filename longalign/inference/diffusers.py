"""Computes the conditioning of stock diffusers pipelines, and messages about truncated prompts."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from longalign.encoders.base import Conditioning, Encoder, PromptReport, TruncationWarning

#: the encoder last built for each pipeline, with its config, device and dtype
_built: WeakKeyDictionary[Any, tuple[Any, Encoder]] = WeakKeyDictionary()


def per_prompt(negative: str | Sequence[str] | None, count: int) -> list[str]:
    """Expands negative prompts to one text per prompt; None is the empty prompt."""
    texts = [negative or ""] * count if negative is None or isinstance(negative, str) else list(negative)
    if len(texts) != count:
        raise ValueError(
            f"expected one negative prompt for all or one per prompt, got {len(texts)} for {count} prompts"
        )
    return texts


def condition(
    pipe: Any, prompts: str | Sequence[str], negative_prompts: str | Sequence[str] | None = None, *, encoder: Any = None
) -> dict[str, Any]:
    """Encodes prompts as keyword arguments of a stock diffusers pipeline: ``pipe(**condition(pipe, prompts))``.

    Prompts and negative prompts are encoded in one call and have equal lengths. A warning is issued for truncated
    prompts and for conditioning that the pipeline does not accept.

    Args:
        pipe: a diffusers pipeline with a call argument ``prompt_embeds``.
        prompts: one or several prompts.
        negative_prompts: one for all prompts or one per prompt; the empty prompt if None.
        encoder: an `Encoder`, or its name or config. From a name or config, the encoder is built on the pipeline's
            device and reused in the next call. None encodes segments with the pipeline's own text encoders, see
            `longalign.encoders.pipeline_encoder.pipeline_encoder`.

    Returns:
        ``prompt_embeds`` ``(b, n, d)`` and, if the pipeline accepts them, ``negative_prompt_embeds``,
        ``pooled_prompt_embeds``, ``negative_pooled_prompt_embeds`` and the masks, in the denoiser's dtype.

    Raises:
        ValueError: if the pipeline accepts no embeddings, needs pooled embeddings that the encoder does not provide,
            expects states of a different width, or has unsupported text encoders while ``encoder`` is None.
    """
    name = type(pipe).__name__
    parameters = inspect.signature(pipe.__call__).parameters
    if "prompt_embeds" not in parameters:
        raise ValueError(f"expected a pipeline that accepts 'prompt_embeds', got {name}; pass the prompt to it instead")
    device = getattr(pipe, "_execution_device", None) or pipe.device
    dtype = _dtype(pipe)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    negatives = per_prompt(negative_prompts, len(prompts))
    if "negative_prompt_embeds" not in parameters and negative_prompts is not None:
        warnings.warn(f"{name} does not accept 'negative_prompt_embeds'; the negative prompt is ignored", stacklevel=2)
    texts = [*prompts, *negatives]
    with torch.no_grad(), warnings.catch_warnings(), _get_encoder(encoder, pipe, device, dtype) as built:
        warnings.simplefilter("ignore", TruncationWarning)  # reported below, per prompt
        conditioning = built.encode(_expand_learned_tokens(pipe, texts) if encoder is None else texts)
    _check_conditioning(pipe, conditioning, parameters)
    for message in truncation_messages(conditioning.reports):
        warnings.warn(message, stacklevel=2)
    conditioning = conditioning.to(device, dtype)
    out: dict[str, Any] = {}
    branches = {"": conditioning[: len(prompts)], "negative_": conditioning[len(prompts) :]}
    for prefix, branch in branches.items():
        values = {
            f"{prefix}prompt_embeds": branch.states,
            f"{prefix}pooled_prompt_embeds": branch.pooled,
            f"{prefix}prompt_attention_mask": branch.mask,
            f"{prefix}prompt_embeds_mask": branch.mask,
        }
        out |= {key: value for key, value in values.items() if key in parameters and value is not None}
    # pipelines raise if both a negative prompt and its embeddings are given, so override a default that is not None
    if "negative_prompt_embeds" in out and parameters["negative_prompt"].default is not None:
        out["negative_prompt"] = None
    return out


@contextmanager
def _get_encoder(encoder: Any, pipe: Any, device: torch.device, dtype: torch.dtype) -> Iterator[Encoder]:
    """Resolves the ``encoder`` argument of `condition`; reuses an encoder built for the same config."""
    if encoder is None:
        from longalign.encoders.pipeline_encoder import pipeline_encoder

        with pipeline_encoder(pipe) as built:
            yield built
        return
    if isinstance(encoder, Encoder):
        yield encoder
        return
    from longalign.registry import encoders
    from longalign.runtime import Runtime

    config = encoders.validate(encoder)
    key = config, str(device), str(dtype).removeprefix("torch.")
    cached = _built.get(pipe)
    if cached is None or cached[0] != key:
        _built.pop(pipe, None)  # free its memory before building the next one
        cached = _built[pipe] = key, encoders.construct(config, Runtime(*key[1:]))
    yield cached[1]


def _denoiser(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)


def _dtype(pipe: Any) -> torch.dtype:
    """Returns the denoiser's dtype, or the pipeline's if it has no denoiser. That of text encoders may differ."""
    dtype = getattr(_denoiser(pipe), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else pipe.dtype


def _expand_learned_tokens(pipe: Any, texts: list[str]) -> list[str]:
    """Expands multi-vector textual-inversion tokens, as the pipeline does."""
    convert = getattr(pipe, "maybe_convert_prompt", None)
    return texts if convert is None else convert(texts, pipe.tokenizer)


def _check_conditioning(pipe: Any, conditioning: Conditioning, parameters: Any) -> None:
    """Raises or warns about conditioning that the pipeline does not support."""
    name = type(pipe).__name__
    if type(conditioning).at is not Conditioning.at:
        raise ValueError(f"{name} does not support conditioning that depends on the timestep; use `longalign generate`")
    if "pooled_prompt_embeds" in parameters and conditioning.pooled is None:
        raise ValueError(
            f"{name} needs 'pooled_prompt_embeds', but the encoder has none; use an encoder with a pooled embedding"
        )
    if "pooled_prompt_embeds" not in parameters and conditioning.pooled is not None:
        warnings.warn(f"{name} does not accept 'pooled_prompt_embeds'; the pooled embedding is ignored", stacklevel=3)
    masks = {"prompt_attention_mask", "prompt_embeds_mask"} & set(parameters)
    if conditioning.mask is not None and not masks and not bool(conditioning.mask.all()):
        warnings.warn(
            f"{name} does not accept an attention mask, so it attends to the padding of shorter prompts; use the "
            "<pad*> padding of clip-segment (max_tokens) or generate one prompt at a time",
            stacklevel=3,
        )
    denoiser = _denoiser(pipe)
    for key in ("joint_attention_dim", "cross_attention_dim"):
        width = getattr(getattr(denoiser, "config", None), key, None)
        if isinstance(width, int) and width != conditioning.states.shape[-1]:
            raise ValueError(
                f"{name} expects text states of width {width}, got {conditioning.states.shape[-1]} from the encoder; "
                "choose a matching encoder"
            )


def truncation_messages(reports: Sequence[PromptReport]) -> list[str]:
    """Returns one line per truncated prompt."""
    return [
        f"prompt {i}: encoded {sum(report.tokens)} tokens, truncated {len(report.truncated.split())} words: "
        f"{report.truncated.strip()[:60]!r}"
        for i, report in enumerate(reports)
        if report.truncated.strip()
    ]
