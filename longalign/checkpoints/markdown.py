"""Formats untrusted texts, such as names and configs of other people's checkpoints, as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any

import yaml


def escape_text(value: object) -> str:
    """Formats untrusted text as one line of Markdown that is shown literally."""
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", escape(" ".join(str(value).split()), quote=False))


def code(value: object) -> str:
    """Formats untrusted text as inline code on one line."""
    text = " ".join(str(value).split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks} {text} {ticks}" if "`" in text else f"`{text}`"


def block(text: str, language: str) -> str:
    """Formats text as a Markdown code block, which fences inside the text cannot end.

    Args:
        text: the text.
        language: language for highlighting, e.g. ``"python"``.
    """
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def yaml_block(config: Mapping[str, Any]) -> str:
    """Formats a config, as a dict of plain values, as a Markdown code block of YAML."""
    return block(yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120), "yaml")


def table_cell(value: str) -> str:
    """Formats an untrusted name as a cell of a Markdown table."""
    return escape(" ".join(value.split()), quote=False).replace("|", "&#124;").replace("`", "&#96;")
