"""The conformance check of a segmenter, which splits prompts into segments."""

from __future__ import annotations

from typing import Any

from longalign.registry import segmenters
from longalign.segmenters.parts import SegmenterConfig
from longalign.testing.common import CPU, EMOJI, LONG, SHORT, checked_config, config_checks, expect, run_checks


def check_segmenter(config: Any, *, lossless: bool = True) -> None:
    """Checks that a segmenter can be used by encoders and rewards.

    It checks the config (see `longalign.testing.common.config_checks`). Segments must be non-empty texts. The
    empty prompt must have no segment with text. A repeated call must return the same segments.

    Args:
        config: name, mapping or config of the segmenter.
        lossless: whether the joined segments must equal the text, apart from whitespace; False for a segmenter that
            drops or adds delimiters on purpose.

    Raises:
        AssertionError: listing all failed checks.
    """
    checked = checked_config("segmenters", config, SegmenterConfig)
    segmenter = segmenters.construct(checked, CPU)
    texts = [SHORT, LONG, EMOJI, "One. Two! Three? “Four.” 5.5 m", "no full stop", "a\n\nb"]

    def count(text: str) -> int:
        return len(text.split())

    def segments_are_strings() -> None:
        for text in texts:
            segments = segmenter(text, count)
            wrong = [s for s in segments if not isinstance(s, str) or not s.strip()]
            expect(not wrong, f"{text[:40]!r} has the segments {wrong[:3]!r}; expected non-empty strings")

    def the_empty_prompt_has_no_segments() -> None:
        segments = [s for s in segmenter("", count) if s.strip()]
        expect(not segments, f"the empty prompt has the segments {segments!r}")

    def calls_repeat() -> None:
        expect(all(segmenter(t, count) == segmenter(t, count) for t in texts), "the same text is split differently")

    def nothing_is_lost() -> None:
        for text in texts:
            joined = "".join("".join(segmenter(text, count)).split())
            expect(joined == "".join(text.split()), f"{text[:40]!r} became {joined[:60]!r}")

    checks = [
        *config_checks("segmenters", checked),
        segments_are_strings,
        the_empty_prompt_has_no_segments,
        calls_repeat,
    ]
    run_checks("segmenters", config, [*checks, nothing_is_lost] if lossless else checks)
