"""Conditioning for stock diffusers pipelines, and what an encoder left out of a prompt in words."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from longalign.encoders.base import Conditioning, Encoder, PromptReport, TruncationWarning


def per_prompt(negative: str | Sequence[str] | None, count: int) -> list[str]:
    """Negative prompts as one text for each of ``count`` prompts; None is the empty prompt."""
    texts = [negative or ""] * count if negative is None or isinstance(negative, str) else list(negative)
    if len(texts) != count:
        raise ValueError(
            f"expected one negative prompt for all or one per prompt, got {len(texts)} for {count} prompts"
        )
    return texts


def condition(
    pipe: Any, prompts: str | Sequence[str], negative_prompts: str | Sequence[str] | None = None, *, encoder: Any
) -> dict[str, Any]:
    """Conditioning that splats into a stock diffusers pipeline: ``pipe(**condition(pipe, prompts, encoder=...))``.

    Both branches are encoded in one call and have equal lengths. What the pipeline cannot take, or the encoder did not
    read of a prompt, is said in a warning.

    Args:
        pipe: a diffusers pipeline whose call takes ``prompt_embeds``.
        prompts: one prompt or several.
        negative_prompts: one for all or one per prompt; the empty prompt if None.
        encoder: an `Encoder`, or the name or config of one, which is then built on the pipeline's device.

    Returns:
        ``prompt_embeds`` ``(b, n, d)`` and, where the pipeline takes them, ``negative_prompt_embeds``,
        ``pooled_prompt_embeds``, ``negative_pooled_prompt_embeds`` and the masks.

    Raises:
        ValueError: if the pipeline takes no embeddings, needs pooled ones that the encoder does not give, or expects
            states of another width.
    """
    name = type(pipe).__name__
    takes = inspect.signature(pipe.__call__).parameters
    if "prompt_embeds" not in takes:
        raise ValueError(f"{name} takes no 'prompt_embeds'; its text can only be given as a prompt")
    device = getattr(pipe, "_execution_device", None) or pipe.device
    if not isinstance(encoder, Encoder):
        from longalign.registry import encoders
        from longalign.runtime import Runtime

        encoder = encoders.build(encoder, Runtime(str(device), str(pipe.dtype).removeprefix("torch.")))
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    negatives = per_prompt(negative_prompts, len(prompts))
    if "negative_prompt_embeds" not in takes and negative_prompts is not None:
        warnings.warn(f"{name} takes no negative prompt; it is left out", stacklevel=2)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # said below, prompt by prompt
        told = encoder.encode([*prompts, *negatives])
    _check(pipe, told, takes)
    for text in describe_cuts(told.reports):
        warnings.warn(text, stacklevel=2)
    told = told.to(device, pipe.dtype)
    out: dict[str, Any] = {}
    halves = {"": told[: len(prompts)], "negative_": told[len(prompts) :]}
    for branch, half in halves.items():
        values = {
            f"{branch}prompt_embeds": half.states,
            f"{branch}pooled_prompt_embeds": half.pooled,
            f"{branch}prompt_attention_mask": half.mask,
            f"{branch}prompt_embeds_mask": half.mask,
        }
        out |= {key: value for key, value in values.items() if key in takes and value is not None}
    # a pipeline whose default negative prompt is not None refuses one beside its embeddings
    if "negative_prompt_embeds" in out and takes["negative_prompt"].default is not None:
        out["negative_prompt"] = None
    return out


def _check(pipe: Any, told: Conditioning, takes: Any) -> None:
    name = type(pipe).__name__
    if type(told).at is not Conditioning.at:
        raise ValueError(f"{name} cannot follow a conditioning that changes with the timestep; use longalign's sampler")
    if "pooled_prompt_embeds" in takes and told.pooled is None:
        raise ValueError(f"{name} needs pooled embeddings, which this encoder does not give; choose one made for it")
    if "pooled_prompt_embeds" not in takes and told.pooled is not None:
        warnings.warn(f"{name} takes no pooled embeddings; they are left out", stacklevel=3)
    masks = {"prompt_attention_mask", "prompt_embeds_mask"} & set(takes)
    if told.mask is not None and not masks and not bool(told.mask.all()):
        warnings.warn(
            f"{name} takes no attention mask, so the padding of shorter prompts is attended to; pad with <pad*> to one "
            "length (clip-segment's max_tokens) or draw one prompt at a time",
            stacklevel=3,
        )
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    for key in ("joint_attention_dim", "cross_attention_dim"):
        width = getattr(getattr(denoiser, "config", None), key, None)
        if isinstance(width, int) and width != told.states.shape[-1]:
            raise ValueError(
                f"{name} expects text states of width {width}, this encoder's are {told.states.shape[-1]} wide"
            )


def describe_cuts(reports: Sequence[PromptReport]) -> list[str]:
    """One line for each prompt of which something was not read."""
    return [
        f"prompt {i}: the encoder read {sum(report.tokens)} tokens and left out {len(report.cut.split())} words: "
        f"{report.cut.strip()[:60]!r}"
        for i, report in enumerate(reports)
        if report.cut.strip()
    ]
