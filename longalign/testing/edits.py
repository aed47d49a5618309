"""The conformance check of an edit: a function of a reward's text embedding."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from longalign.edits.base import Edit, EditedText
from longalign.edits.config import EditConfig
from longalign.functional.preference import common_direction
from longalign.registry import edits, rewards
from longalign.rewards.edited.reward import EditedReward
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
    run_checks,
)

#: the bundled CLIP reward of the synthetic scenes
MINI_CLIP: Mapping[str, Any] = MappingProxyType({"name": "clip", "checkpoint": "mini/clip"})
#: names that the reward `edited` logs itself
LOGGED = {"text_relevant", "text_irrelevant", "eta", "edit_norm"}


def check_edit(config: Any, *, inner: Any = MINI_CLIP, runtime: Runtime = CPU, size: int = 64) -> None:
    """Checks that an edit can be used in the reward `edited`.

    It checks the config (see `longalign.testing.common.config_checks`), and that edited embeddings are finite, of shape
    ``(b, d)`` and the same in a repeated call. With a fixed common direction of the text embeddings, a prompt's
    embedding must not depend on the other prompts. The input must not be modified, nothing may be trainable, and a
    saved and loaded edit must give the same embeddings. In the reward `edited`, the score must be the dot product of
    image embedding and edited embedding, with a finite non-zero gradient. The logged ``text_relevant`` and
    ``text_irrelevant`` must sum to the score without the edit.

    Args:
        config: name, mapping or config of the edit.
        inner: name or mapping of the reward whose text embedding is edited.
        runtime: device and dtype.
        size: side of the square test images in pixels.

    Raises:
        AssertionError: listing all failed checks.
    """
    checked = checked_config("edits", config, EditConfig)
    reward = rewards.build(inner if isinstance(inner, str) else dict(inner), runtime).eval()
    prompts = [SHORT, LONG, EMOJI, ""]
    images = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0)).to(runtime.device)
    text = reward.text_features(prompts)
    direction = common_direction(text)

    def build() -> Edit:
        edit = edits.construct(checked, runtime).eval()
        edit.check_reward(reward)
        return edit

    edit = build()

    def call(edit: Edit = edit, rows: slice = slice(None)) -> EditedText:
        with torch.no_grad():
            return edit(text[rows], prompts[rows], reward, direction)

    def embeddings_are_finite_and_keep_their_shape() -> None:
        edited = call().text
        expect(edited.shape == text.shape, f"expected embeddings {tuple(text.shape)}, got {tuple(edited.shape)}")
        expect(bool(edited.isfinite().all()), "the edited embeddings are not finite")

    def calls_repeat() -> None:
        expect_close("the same call twice", call().text, call().text, 0, 0)

    def rows_are_independent() -> None:
        singles = torch.cat([call(rows=slice(i, i + 1)).text for i in range(4)])
        expect_close("a batch and its prompts one by one", singles, call().text)

    def input_is_unchanged() -> None:
        before = text.clone()
        call()
        expect_close("the text embeddings after the call", text, before, 0, 0)

    def state_is_complete() -> None:
        trained, restored = build().train(), build()
        call(trained)
        restored.load_state_dict(trained.state_dict())
        expect_close("an edit with restored state", call(restored).text, call(trained.eval()).text)

    def nothing_is_trainable() -> None:
        names = [name for name, p in edit.named_parameters() if p.requires_grad]
        expect(not names, f"the parameters {names[:3]} require grad; edits are not trained")

    def a_common_direction_is_needed_as_declared() -> None:
        if not edit.needs_direction:
            edited = edit(text[:1], prompts[:1], reward, None).text
            expected = (1, text.shape[1])
            expect(edited.shape == expected, f"without direction: expected {expected}, got {tuple(edited.shape)}")

    def score_is_the_dot_product() -> None:
        leaf = images.clone().requires_grad_()
        whole = EditedReward(reward, edit=edit, direction=direction, gather=runtime.gather).eval()
        scores = whole.score_components(leaf, prompts)
        image, found = reward.image_features(images), call()
        expect_close("the score", scores.total.detach(), (image * found.text).sum(-1))
        plain = scores.parts["text_relevant"] + scores.parts["text_irrelevant"]
        expect_close("the sum of text_relevant and text_irrelevant", plain, (image * text).sum(-1))
        taken = LOGGED & {*found.along, *found.values}
        expect(not taken, f"the names {sorted(taken)} are those of the reward; rename these quantities")
        wrong = [name for name, value in scores.parts.items() if value.shape != (4,)]
        expect(not wrong, f"the quantities {wrong} do not have the shape (4,), one value per prompt")
        scores.total.sum().backward()
        grad = leaf.grad
        expect(grad is not None and bool(grad.isfinite().all() and grad.any()), "the gradient is zero or not finite")

    run_checks(
        "edits",
        config,
        [
            *config_checks("edits", checked),
            embeddings_are_finite_and_keep_their_shape,
            calls_repeat,
            rows_are_independent,
            input_is_unchanged,
            state_is_complete,
            nothing_is_trainable,
            a_common_direction_is_needed_as_declared,
            score_is_the_dot_product,
        ],
    )
