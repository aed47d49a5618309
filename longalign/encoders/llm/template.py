"""Tokenizes prompts inside a template, such as a language model's chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from longalign.tokens import TextTokens, Tokenized

_MARK = "\ue000"
"""A character for private use, which no chat template contains."""


@dataclass(frozen=True)
class TemplateRow:
    """Token ids of one text inside a template.

    Attributes:
        before: ids of the template before the text, including special tokens.
        text: the text and its tokens.
        after: ids of the template after the text, including special tokens.
    """

    before: tuple[int, ...]
    text: Tokenized
    after: tuple[int, ...]


def chat_template(tokenizer: Any, system: str | None, variables: Mapping[str, Any]) -> tuple[str, str]:
    """Returns two parts of a chat in the tokenizer's template: before the user's message, and after it up to the reply.

    Args:
        tokenizer: a transformers tokenizer.
        system: text of the system message; None passes no system message to the chat template.
        variables: values of variables of the chat template, by name.

    Raises:
        ValueError: if the tokenizer has no chat template, or the chat template rejects the messages, does not contain
            the user's message exactly once, or has no such variable.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "encoder.template is 'chat', but the tokenizer has no chat template; set template to a text with {} in "
            "place of the prompt"
        )
    source = str(tokenizer.chat_template)
    unknown = [name for name in variables if name == "messages" or not re.search(rf"\b{re.escape(name)}\b", source)]
    if unknown:
        raise ValueError(
            f"encoder.template_variables: the tokenizer's chat template has no variable {', '.join(unknown)} to set; "
            "remove it"
        )
    messages = [] if system is None else [{"role": "system", "content": system}]
    settings = {"add_generation_prompt": True, **variables}
    try:
        text = tokenizer.apply_chat_template(
            [*messages, {"role": "user", "content": _MARK}], tokenize=False, **settings
        )
    except TemplateError as error:
        raise ValueError(
            f"the tokenizer's chat template rejects {'a system and ' if messages else ''}a user message: {error}; set "
            "template to a text with {}" + (", or system to null" if messages else "")
        ) from error
    if text.count(_MARK) != 1:
        raise ValueError(
            f"expected a chat template that contains the user's message once, got a template that contains it "
            f"{text.count(_MARK)} times; set template to a text with {{}}"
        )
    before, _, after = text.partition(_MARK)
    return before, after


class Template:
    """A template in which texts are tokenized. Calling it with a list of texts returns one `TemplateRow` per text.

    Template and text are tokenized together, because a space before the text may be part of the text's first token.
    That token counts as the text's. Names of special tokens become special tokens in the template only; in a text, they
    are tokenized as plain text.

    Args:
        tokens: the tokenizer, as a `longalign.tokens.TextTokens`.
        prefix: the template before the text.
        suffix: the template after the text.
        add_special_tokens: whether the tokenizer adds its special tokens, such as ``<bos>``, to the template.
    """

    def __init__(self, tokens: TextTokens, prefix: str, suffix: str, add_special_tokens: bool):
        self.tokens, self.prefix, self.suffix = tokens, prefix, suffix
        self.add_special_tokens = add_special_tokens
        tokenizer = tokens.tokenizer
        self._special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}

    def __call__(self, texts: Sequence[str]) -> list[TemplateRow]:
        """Returns one row per text: the tokens of the template with the text in its place."""
        rows = self._tokenize(texts)
        for i, row in enumerate(rows):
            if self._special & set(row.text.ids):
                (empty,) = self._tokenize([""])
                rows[i] = TemplateRow(empty.before, self.tokens(row.text.text), empty.after)
        return rows

    def _tokenize(self, texts: Sequence[str]) -> list[TemplateRow]:
        encoding = self.tokens.tokenizer(
            [self.prefix + text + self.suffix for text in texts], add_special_tokens=self.add_special_tokens,
            return_offsets_mapping=True, truncation=False, verbose=False,
        )  # fmt: skip
        rows = []
        for i, (text, ids, offsets) in enumerate(
            zip(texts, encoding["input_ids"], encoding["offset_mapping"], strict=True)
        ):
            start, stop = len(self.prefix), len(self.prefix) + len(text)
            # the other positions are special tokens that the tokenizer added, whose offsets are 0
            own = [k for k, sequence in enumerate(encoding.sequence_ids(i)) if sequence is not None]
            end = own[-1] + 1 if own else len(ids)
            first = next((k for k in own if offsets[k][1] > start), end)
            last = next((k for k in own if k >= first and offsets[k][0] >= stop), end)
            starts = tuple(max(0, offset - start) for offset, _ in offsets[first:last])
            rows.append(
                TemplateRow(tuple(ids[:first]), Tokenized(text, tuple(ids[first:last]), starts), tuple(ids[last:]))
            )
        return rows
