"""The conformance check of a text encoder."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from longalign.encoders.base import Conditioning, TruncationWarning
from longalign.encoders.config import EncoderConfig
from longalign.registry import encoders
from longalign.runtime import Runtime
from longalign.testing.common import (
    CPU,
    EMOJI,
    LONG,
    SHORT,
    checked_config,
    config_checks,
    expect,
    expect_close,
    expect_error,
    run_checks,
)


def check_encoder(config: Any, *, runtime: Runtime = CPU) -> None:
    """Checks that an encoder can be used by every trainer, backbone and pipeline.

    It checks the config (see `longalign.testing.common.config_checks`), the shapes of states, mask and pooled
    embedding, and that all text is encoded or reported as truncated. The prompts include the empty one, one of more
    than 1000 words and one with emoji. States must not depend on the other prompts of the batch. States of a frozen
    encoder must not depend on training mode. Trainable parameters must receive gradient. Invalid input must raise
    ValueError.

    The states that are checked are those that `Conditioning.predict` passes to the denoiser. An encoder may pass
    several rows for each prompt, those of the first prompt first.

    Args:
        config: name, mapping or config of the encoder.
        runtime: device and dtype.

    Raises:
        AssertionError: listing all failed checks.
    """
    checked = checked_config("encoders", config, EncoderConfig)
    encoder = encoders.construct(checked, runtime).eval()
    prompts = [SHORT, LONG, EMOJI, ""]

    def encode(prompts: list[str]) -> Conditioning:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)
            return encoder.encode(prompts)

    def shapes_agree() -> None:
        out = encode(prompts)
        expect(isinstance(out, Conditioning), f"encode must return a Conditioning, got {type(out).__name__}")
        out = _passed_to_denoiser(out, 4)
        b, n, d = out.states.shape
        expect(b >= 4 and d == encoder.dim, f"expected states (4, n, {encoder.dim}) or more rows, got {(b, n, d)}")
        expect(bool(out.states.isfinite().all()), "the states are not finite")
        if out.mask is not None:
            expect(out.mask.shape == (b, n) and out.mask.dtype == torch.bool, f"expected a bool mask {(b, n)}")
            expect(bool(out.mask.any(1).all()), "the mask of a prompt is False for all states")
        if out.pooled is not None:
            expect(out.pooled.ndim == 2 and len(out.pooled) == b, f"expected a pooled embedding ({b}, p)")
        pooled = out.pooled is not None
        declared = checked.gives_pooled()
        expect(
            declared in (None, pooled),
            f"has_pooled is {declared}, but a pooled embedding is {'' if pooled else 'not '}given",
        )

    def reports_cover_the_prompts() -> None:
        out = encode(prompts)
        expect(len(out.reports) == 4, f"expected one report per prompt, got {len(out.reports)}")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reports = encoder.report(prompts)
        expect(list(out.reports) == list(reports), "report() differs from the reports of encode()")
        for prompt, report in zip(prompts, reports, strict=True):
            read = "".join("".join((*report.segments, report.truncated)).split())
            missing = set("".join(prompt.split())) - set(read)
            expect(not missing, f"neither encoded nor reported as truncated: the characters {sorted(missing)[:5]}")

    def truncation_is_reported() -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            encoder.encode([LONG])
        warned = any(issubclass(w.category, TruncationWarning) for w in caught)
        truncated = bool(encoder.report([LONG])[0].truncated)
        expect(warned == truncated, f"truncated text: {truncated}, TruncationWarning: {warned}")

    def states_do_not_depend_on_the_batch() -> None:
        alone, batch = _passed_to_denoiser(encode([SHORT]), 1), _passed_to_denoiser(encode([SHORT, LONG]), 2)
        length, rows = min(alone.states.shape[1], batch.states.shape[1]), len(alone.states)
        if alone.mask is not None:
            length = int(alone.mask.sum(1).min())
        got, expected = batch.states[:rows, :length], alone.states[:, :length]
        expect_close("states alone and in a batch", got, expected, 1e-3, 1e-4)
        if alone.pooled is not None and batch.pooled is not None:
            expect_close("pooled embedding alone and in a batch", batch.pooled[:rows], alone.pooled, 1e-3, 1e-4)

    def guidance_branches_have_equal_lengths() -> None:
        out = encode([SHORT, ""])
        expect(
            out[torch.tensor([1, 0])].states.shape == out.states.shape,
            "states must keep their shape if rows are selected",
        )

    def calls_repeat_in_training_mode() -> None:
        first = _passed_to_denoiser(encode(prompts), 4).states
        frozen = not any(p.requires_grad for p in encoder.parameters())
        try:
            encoder.train()
            again = _passed_to_denoiser(encode(prompts), 4).states
        finally:
            encoder.eval()
        if frozen:
            expect_close("eval and training mode", again, first, 0, 0)

    def only_adapters_have_gradient() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)
            states = _passed_to_denoiser(encoder.encode(prompts), 4).states
        trainable = [p for p in encoder.parameters() if p.requires_grad]
        expect(states.requires_grad == bool(trainable), "states require grad exactly if a parameter is trainable")
        if trainable:
            grads = torch.autograd.grad(states.float().square().sum(), trainable, allow_unused=True)
            expect(any(g is not None and bool(g.any()) for g in grads), "no trainable parameter gets a gradient")

    def invalid_input_is_an_error() -> None:
        expect_error("a bare string as prompts", lambda: encoder.encode(SHORT))
        expect_error("no prompts", lambda: encoder.encode([]))

    run_checks(
        "encoders",
        config,
        [
            *config_checks("encoders", checked),
            shapes_agree,
            reports_cover_the_prompts,
            truncation_is_reported,
            states_do_not_depend_on_the_batch,
            guidance_branches_have_equal_lengths,
            calls_repeat_in_training_mode,
            only_adapters_have_gradient,
            invalid_input_is_an_error,
        ],
    )


def _passed_to_denoiser(conditioning: Conditioning, count: int) -> Conditioning:
    """Returns the conditioning that `Conditioning.predict` passes to a denoiser for ``count`` prompts, at timestep 500.

    Raises:
        AssertionError: if the denoiser is not called once, or with different numbers of rows.
    """
    calls: list[Conditioning] = []

    def call(latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        rows = {len(latents), len(timesteps), len(conditioning.states)}
        expect(len(rows) == 1, f"predict passes latents, timesteps and states of different numbers of rows: {rows}")
        expect(conditioning.is_static, "predict passes a conditioning that depends on the timestep")
        calls.append(conditioning)
        return latents

    latents = torch.zeros(count, 1, 1, 1, device=conditioning.states.device)
    output = conditioning.predict(call, latents, torch.full((count,), 500, device=latents.device))
    expect(output.shape == latents.shape, f"predict: expected {tuple(latents.shape)}, got {tuple(output.shape)}")
    expect(len(calls) == 1, f"expected predict to call the denoiser once, with all rows, got {len(calls)} calls")
    return calls[0]
