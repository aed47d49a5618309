"""Config of the encoder `llm`. Does not import torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, JsonValue, model_validator

from longalign.encoders.config import LoadedConfig
from longalign.registry import Part

CHAT = "chat"
SLOT = "{}"
"""The text that stands for the prompt in a template."""


class LlmConfig(LoadedConfig):
    """Encodes prompts with the hidden states of a causal language model or, without images, a vision-language model.

    The prompt is placed in a template. Settings of published models: for Z-Image, the defaults with ``layer: -2``; for
    Qwen-Image, ``system`` and ``prefix: none``; for Sana, ``template``, ``prefix: first`` and ``lowercase: true``; for
    FLUX.2-klein, ``layer: [9, 18, 27]``, ``pad_to: 512`` and ``template_variables: {enable_thinking: false}``; for
    FLUX.2-dev, ``layer: [10, 20, 30]``, ``pad_to: 512`` and ``system``. The values of ``system`` and ``template`` are
    not part of this package; docs/pipelines.md says where to get them.
    """

    target: ClassVar[str] = "longalign.encoders.llm.encoder:LlmEncoder"

    name: Literal["llm"] = "llm"
    template: str = CHAT
    """``"chat"``: the tokenizer's own chat template, with the prompt as the user's message. Otherwise a text with
    ``{}`` in place of the prompt, to which the tokenizer's special tokens, such as ``<bos>``, are added.
    """
    system: str | None = None
    """system message for the chat template; null: the one that the chat template contains, if any."""
    template_variables: dict[str, JsonValue] = Field(default={})
    """values of variables of the chat template, e.g. ``{enable_thinking: false}`` for that of Qwen3."""
    prefix: Literal["all", "first", "none"] = "all"
    """which states of the template before the prompt are kept: all, that of the first token, or none. The states of the
    template after the prompt are kept in any case.
    """
    layer: int | Annotated[list[int], Field(min_length=1)] = -1
    """layer whose states are used, as an index of transformers' ``hidden_states``. 0: the embeddings; 9: the ninth
    layer; -1: the last layer, after the final normalization; -2: the layer before the last. The states of a list of
    layers are concatenated along the width.
    """
    lowercase: bool = False
    """whether prompts are converted to lower case."""
    max_tokens: int = Field(default=512, ge=1)
    """maximum number of tokens of the prompt, or of a segment, per forward pass, without those of the template."""
    pad_to: int | None = Field(default=None, ge=1)
    """number of states to which shorter prompts are padded, for denoisers without an attention mask. The states of the
    padding are those of the tokenizer's padding token, on its padding side. No state is masked. In a batch with longer
    prompts, the last state is repeated. null: prompts are padded to the longest one of the batch, with a mask.
    """
    segmenter: Part("segmenters") | None = None  # type: ignore[valid-type]
    """how prompts are split into segments, such as sentences. Each segment is encoded separately in the template, and
    the states are concatenated. Segments of more than ``max_tokens`` tokens are split. null: the prompt is encoded as a
    whole.
    """
    overflow: Literal["truncate", "error"] = "truncate"
    """what to do with prompts of more than ``max_tokens`` tokens without a segmenter: ``"truncate"`` truncates with a
    warning, ``"error"`` raises. With a segmenter, nothing is truncated.
    """

    @model_validator(mode="after")
    def _check_template(self) -> LlmConfig:
        if self.template != CHAT and self.template.count(SLOT) != 1:
            raise ValueError(
                f"template: expected '{CHAT}', or a text with one {SLOT} in place of the prompt, got "
                f"{self.template.count(SLOT)} {SLOT} in {self.template[:60]!r}"
            )
        if self.template != CHAT and self.system is not None:
            raise ValueError(f"'system' requires `template: {CHAT}`; write the system message into the template")
        if self.template != CHAT and self.template_variables:
            raise ValueError(f"'template_variables' requires `template: {CHAT}`; remove it")
        return self

    def widths(self) -> tuple[int | None, int | None]:
        width, pooled = super().widths()
        return None if width is None else width * len(self.layers), pooled

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose states are concatenated."""
        return (self.layer,) if isinstance(self.layer, int) else tuple(self.layer)
