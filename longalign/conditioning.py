"""Conditioning for stock diffusers pipelines, and what an encoder left out of a prompt in words."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from longalign.encoders.base import Conditioning, Encoder, PromptReport, TruncationWarning

#: of each pipeline, the encoder that was built last for it, and from what
_built: WeakKeyDictionary[Any, tuple[Any, Encoder]] = WeakKeyDictionary()


def per_prompt(negative: str | Sequence[str] | None, count: int) -> list[str]:
    """Negative prompts as one text for each of ``count`` prompts; None is the empty prompt."""
    texts = [negative or ""] * count if negative is None or isinstance(negative, str) else list(negative)
    if len(texts) != count:
        raise ValueError(
            f"expected one negative prompt for all or one per prompt, got {len(texts)} for {count} prompts"
        )
    return texts


def condition(
    pipe: Any, prompts: str | Sequence[str], negative_prompts: str | Sequence[str] | None = None, *, encoder: Any = None
) -> dict[str, Any]:
    """Conditioning that splats into a stock diffusers pipeline: ``pipe(**condition(pipe, prompts))``.

    Both branches are encoded in one call and have equal lengths. What the pipeline cannot take, or the encoder did not
    read of a prompt, is said in a warning.

    Args:
        pipe: a diffusers pipeline whose call takes ``prompt_embeds``.
        prompts: one prompt or several.
        negative_prompts: one for all or one per prompt; the empty prompt if None.
        encoder: None for the segments of the prompts through the pipeline's own text encoders, see
            `longalign.encoders.own.own_encoder`; or an `Encoder`, or the name or config of one, which is then built on
            the pipeline's device and kept for its next call.

    Returns:
        ``prompt_embeds`` ``(b, n, d)`` and, where the pipeline takes them, ``negative_prompt_embeds``,
        ``pooled_prompt_embeds``, ``negative_pooled_prompt_embeds`` and the masks; in the denoiser's dtype.

    Raises:
        ValueError: if the pipeline takes no embeddings, needs pooled ones that the encoder does not give, expects
            states of another width, or has text encoders of other kinds and ``encoder`` is None.
    """
    name = type(pipe).__name__
    takes = inspect.signature(pipe.__call__).parameters
    if "prompt_embeds" not in takes:
        raise ValueError(f"{name} takes no 'prompt_embeds'; its text can only be given as a prompt")
    device = getattr(pipe, "_execution_device", None) or pipe.device
    dtype = _dtype(pipe)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    negatives = per_prompt(negative_prompts, len(prompts))
    if "negative_prompt_embeds" not in takes and negative_prompts is not None:
        warnings.warn(f"{name} takes no negative prompt; it is left out", stacklevel=2)
    texts = [*prompts, *negatives]
    with torch.no_grad(), warnings.catch_warnings(), _ready(encoder, pipe, device, dtype) as ready:
        warnings.simplefilter("ignore", TruncationWarning)  # said below, prompt by prompt
        conditioning = ready.encode(_with_learned_tokens(pipe, texts) if encoder is None else texts)
    _check(pipe, conditioning, takes)
    for text in truncation_messages(conditioning.reports):
        warnings.warn(text, stacklevel=2)
    conditioning = conditioning.to(device, dtype)
    out: dict[str, Any] = {}
    halves = {"": conditioning[: len(prompts)], "negative_": conditioning[len(prompts) :]}
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


@contextmanager
def _ready(encoder: Any, pipe: Any, device: torch.device, dtype: torch.dtype) -> Iterator[Encoder]:
    """The encoder that `condition` is given, or the pipeline's own, or the one that is built from a name or config."""
    if encoder is None:
        from longalign.encoders.own import own_encoder

        with own_encoder(pipe) as own:
            yield own
        return
    if isinstance(encoder, Encoder):
        yield encoder
        return
    from longalign.registry import encoders
    from longalign.runtime import Runtime

    config = encoders.validate(encoder)
    asked = config, str(device), str(dtype).removeprefix("torch.")
    kept = _built.get(pipe)
    if kept is None or kept[0] != asked:
        _built.pop(pipe, None)  # before the next one takes memory
        kept = _built[pipe] = asked, encoders.build(config, Runtime(*asked[1:]))
    yield kept[1]


def _denoiser(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)


def _dtype(pipe: Any) -> torch.dtype:
    """The denoiser's, for transformers may load a text encoder in another; the pipeline's where that says nothing."""
    dtype = getattr(_denoiser(pipe), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else pipe.dtype


def _with_learned_tokens(pipe: Any, texts: list[str]) -> list[str]:
    """Tokens of textual inversion that stand for several vectors, written out as the pipeline does itself."""
    convert = getattr(pipe, "maybe_convert_prompt", None)
    return texts if convert is None else convert(texts, pipe.tokenizer)


def _check(pipe: Any, conditioning: Conditioning, takes: Any) -> None:
    name = type(pipe).__name__
    if type(conditioning).at is not Conditioning.at:
        raise ValueError(f"{name} cannot follow a conditioning that changes with the timestep; use longalign's sampler")
    if "pooled_prompt_embeds" in takes and conditioning.pooled is None:
        raise ValueError(f"{name} needs pooled embeddings, which this encoder does not give; choose one made for it")
    if "pooled_prompt_embeds" not in takes and conditioning.pooled is not None:
        warnings.warn(f"{name} takes no pooled embeddings; they are left out", stacklevel=3)
    masks = {"prompt_attention_mask", "prompt_embeds_mask"} & set(takes)
    if conditioning.mask is not None and not masks and not bool(conditioning.mask.all()):
        warnings.warn(
            f"{name} takes no attention mask, so the padding of shorter prompts is attended to; pad with <pad*> to one "
            "length (clip-segment's max_tokens) or draw one prompt at a time",
            stacklevel=3,
        )
    denoiser = _denoiser(pipe)
    for key in ("joint_attention_dim", "cross_attention_dim"):
        width = getattr(getattr(denoiser, "config", None), key, None)
        if isinstance(width, int) and width != conditioning.states.shape[-1]:
            raise ValueError(
                f"{name} expects text states of width {width}, this encoder's are {conditioning.states.shape[-1]} wide"
            )


def truncation_messages(reports: Sequence[PromptReport]) -> list[str]:
    """One line for each prompt of which something was not read."""
    return [
        f"prompt {i}: the encoder read {sum(report.tokens)} tokens and left out {len(report.truncated.split())} words: "
        f"{report.truncated.strip()[:60]!r}"
        for i, report in enumerate(reports)
        if report.truncated.strip()
    ]
