"""The segmenter `my-part`."""

from __future__ import annotations

import re
from collections.abc import Callable

from my_plugin.config import MyPartConfig

from longalign.runtime import Runtime


class MyPart:
    """Splits prompts into segments of ``words`` words.

    Args:
        words: number of words in a segment; the last segment may have fewer.
    """

    def __init__(self, *, words: int):
        self.words = words

    @classmethod
    def from_config(cls, config: MyPartConfig, runtime: Runtime) -> MyPart:
        return cls(words=config.words)

    def __call__(self, prompt: str, count: Callable[[str], int]) -> list[str]:
        """Returns the segments of ``prompt``; ``count(text)`` returns the number of tokens of a text."""
        pieces = re.findall(r"\S+\s*", prompt)
        return ["".join(pieces[i : i + self.words]) for i in range(0, len(pieces), self.words)]
