"""VQAScore (Lin et al. 2024, arXiv 2404.01291), with gradient with respect to the images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from longalign.rewards.base import Scores
from longalign.rewards.vlm import VisionLanguageReward
from longalign.rewards.vqascore.config import VqaScoreConfig
from longalign.runtime import Runtime, resolve_checkpoint
from longalign.vlm.local import (
    load_model,
    load_processor,
    next_token_logits,
    text_tokens,
)
from longalign.vlm.pixels import check_differentiable, model_inputs


class VqaScoreReward(VisionLanguageReward):
    """Probability that an answer is the first token of a model's reply, ``P("Yes" | image, question)``, in [0, 1].

    The probabilities of the answer with and without a space before it are added, because tokenizers differ in which of
    the two starts a reply. Images are preprocessed as by the model's processor.

    Args:
        model: a decoder-only transformers model for images and text, e.g. a ``LlavaForConditionalGeneration``.
        processor: the model's processor, from `longalign.vlm.local.load_processor`.
        question: the question, with ``{prompt}`` for the prompt.
        answer: the answer whose probability is the score.
        micro_batch: number of images per pass of the model; None: all at once.

    Raises:
        ValueError: if the answer is not a single token.
    """

    def __init__(self, model: Any, processor: Any, *, question: str, answer: str, micro_batch: int | None):
        super().__init__(model, processor, micro_batch)
        self.question = question
        self.answer_tokens = _answer_tokens(processor.tokenizer, answer)
        self._max_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._warned = False

    @classmethod
    def from_config(cls, config: VqaScoreConfig, runtime: Runtime) -> VqaScoreReward:
        """Loads the model from a Hub id or a local folder.

        Raises:
            ValueError: before weights are loaded, if the model is not decoder-only, gradient cannot pass through its
                image processor, or the answer is not a single token.
        """
        processor = load_processor(config.checkpoint, config.revision)
        _check_decoder_only(config)
        check_differentiable(processor, config.checkpoint)
        _answer_tokens(processor.tokenizer, config.answer)
        model = load_model(config.checkpoint, config.revision, runtime.with_dtype(config.dtype))
        return cls(model, processor, question=config.question, answer=config.answer, micro_batch=config.micro_batch)

    def score_components(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        scores = self.predict(self._probabilities, images, prompts, self.question, "{prompt}")
        return Scores(scores).checked(images, prompts)

    def _probabilities(self, images: Tensor, texts: list[str]) -> Tensor:
        inputs = model_inputs(self.processor, texts, images)
        self._warn_if_long(inputs["input_ids"].shape[1])
        return next_token_logits(self.model, inputs).softmax(-1)[:, self.answer_tokens].sum(-1)

    def _warn_if_long(self, length: int) -> None:
        if self._max_positions is not None and length > self._max_positions and not self._warned:
            self._warned = True
            warnings.warn(
                f"an image and its question have {length} tokens, but the model was trained on at most "
                f"{self._max_positions}: scores may be meaningless. Score the sentences of a prompt with the reward "
                "`segments` (only warned once)",
                stacklevel=6,
            )


def _check_decoder_only(config: VqaScoreConfig) -> None:
    from transformers import AutoConfig

    model = AutoConfig.from_pretrained(resolve_checkpoint(config.checkpoint), revision=config.revision)
    if model.is_encoder_decoder or model.get_text_config().is_encoder_decoder:
        raise ValueError(
            f"'{config.checkpoint}' is an encoder-decoder ('{model.model_type}'), which 'vqascore' does not support; "
            "use a decoder-only model, such as LLaVA or Qwen2-VL"
        )


def _answer_tokens(tokenizer: Any, answer: str) -> list[int]:
    """Returns the token ids of an answer with and without a space before it; one or two ids.

    Raises:
        ValueError: if neither spelling is a single token of the vocabulary.
    """
    spellings = [text_tokens(tokenizer, text) for text in (answer, f" {answer}")]
    tokens = sorted({ids[0] for ids in spellings if len(ids) == 1 and ids[0] != tokenizer.unk_token_id})
    if not tokens:
        raise ValueError(
            f"expected an answer of one token, got {answer!r}, which the tokenizer splits into "
            f"{tokenizer.convert_ids_to_tokens(spellings[0])}; set `answer` to a single word such as 'Yes'"
        )
    return tokens
