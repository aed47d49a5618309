"""The segmenter `my-part`."""

from __future__ import annotations

import re
from collections.abc import Callable

from my_plugin.config import MyPartConfig

from longalign.runtime import Runtime


class MyPart:
    """Segments of at most ``words`` words.

    Args:
        words: maximum number of words.
    """

    def __init__(self, *, words: int):
        self.words = words

    @classmethod
    def from_config(cls, config: MyPartConfig, runtime: Runtime) -> MyPart:
        return cls(words=config.words)

    def __call__(self, prompt: str, count: Callable[[str], int]) -> list[str]:
        """Splits ``prompt``; ``count`` gives the number of tokens of a text."""
        pieces = re.findall(r"\S+\s*", prompt)
        return ["".join(pieces[i : i + self.words]) for i in range(0, len(pieces), self.words)]
