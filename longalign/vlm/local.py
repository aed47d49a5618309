"""Vision-language models of transformers, run on this machine."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longalign.caching.fingerprint import fingerprint
from longalign.checkpoints.weights import reading
from longalign.hub import download_problem
from longalign.runtime import Runtime, resolve_checkpoint
from longalign.vlm.base import VLM, Request
from longalign.vlm.config import LocalVLMConfig


class LocalVLM(VLM):
    """Answers with the option whose first token is most probable as the first token of the reply.

    The probability of an option is summed over its spellings: lower case, capitalized, upper case, each with and
    without a space before it.

    Args:
        model: a transformers model for images and text to text, e.g. a ``LlavaForConditionalGeneration``.
        processor: its processor, with tokenizer and chat template.
        identity: see `VLM`.
        batch_size: requests per forward pass.

    Raises:
        ValueError: if the processor has no chat template.
    """

    def __init__(self, model: Any, processor: Any, *, identity: str, batch_size: int):
        super().__init__()
        if not getattr(processor, "chat_template", None):
            raise ValueError(
                f"the {type(processor).__name__} has no chat template; expected the checkpoint of an instruction-tuned "
                "model, with a chat_template.jinja or chat_template.json"
            )
        processor.tokenizer.padding_side = "left"  # so that the last position of each row predicts the reply
        self.model, self.processor = model.eval(), processor
        self.identity, self.batch_size = identity, batch_size
        # logits of all positions, most of them of image patches, can be larger than the model
        last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if last_only else {}

    @classmethod
    def from_config(cls, config: LocalVLMConfig, runtime: Runtime) -> LocalVLM:
        """Loads model and processor from a Hub id or a local folder. Code of the checkpoint is not run."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        runtime = runtime.with_dtype(config.dtype)
        checkpoint = resolve_checkpoint(config.checkpoint)
        source: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
        try:
            with reading(f"a file of weights in '{checkpoint}'"):
                loaded: Any = AutoModelForImageTextToText.from_pretrained(
                    checkpoint, dtype=runtime.torch_dtype, output_loading_info=True, **source
                )
            processor = AutoProcessor.from_pretrained(checkpoint, **source)
        except OSError as error:
            if Path(checkpoint).exists():
                raise
            raise ValueError(f"checkpoint '{checkpoint}' could not be loaded: {download_problem(error)}") from error
        model, info = loaded
        if info["missing_keys"]:
            raise ValueError(
                f"'{checkpoint}' is not complete: {len(info['missing_keys'])} weights are missing, e.g. "
                f"{sorted(info['missing_keys'])[:5]}; use a checkpoint saved from {type(model).__name__}"
            )
        weights = fingerprint(checkpoint, config.revision, None, [])
        identity = json.dumps(["local", weights or [config.checkpoint, config.revision], runtime.dtype])
        return cls(model.to(runtime.device), processor, identity=identity, batch_size=config.batch_size)

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, str | None]]:
        """Yields the answers batch by batch; an answer is never None.

        Raises:
            ValueError: if an option shares its first tokens with other options.
        """
        tokens = {options: self.option_tokens(options) for options in {r.options for r in requests}}
        # prompts of similar length together, so that little is padded
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].images), len(requests[i].text)))
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            log_probs = self.next_token([requests[i] for i in rows]).log_softmax(-1)
            for i, row in zip(rows, log_probs, strict=True):
                options = requests[i].options
                scores = [float(row[ids].logsumexp(0)) for ids in tokens[options]]
                yield i, options[scores.index(max(scores))]

    @torch.no_grad()
    def next_token(self, requests: Sequence[Request]) -> Tensor:
        """Returns the float32 logits ``(b, vocabulary)`` of the first token of each reply, on the CPU."""
        template = partial(self.processor.apply_chat_template, tokenize=False, add_generation_prompt=True)
        texts = [template([_message(request)]) for request in requests]
        images = [[image.image for image in request.images] for request in requests]
        start = self.processor.tokenizer.bos_token  # which some templates write themselves
        start_written = start is not None and texts[0].startswith(start)
        inputs = self.processor(
            images=images, text=texts, padding=True, return_tensors="pt", add_special_tokens=not start_written
        ).to(self.model.device)
        inputs = {k: v.to(self.model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        return self.model(**inputs, **self._last_only).logits[:, -1].float().cpu()

    def option_tokens(self, options: Sequence[str]) -> list[list[int]]:
        """Returns the first tokens of the spellings of each option. A token that starts several options is omitted.

        Raises:
            ValueError: if an option shares its first tokens with other options.
        """
        found = [{self._first_token(text) for text in _spellings(option)} for option in options]
        own = [ids - set().union(*(f for j, f in enumerate(found) if j != i)) for i, ids in enumerate(found)]
        if missing := [option for option, ids in zip(options, own, strict=True) if not ids]:
            raise ValueError(
                f"expected options that start with different tokens, got {list(options)}: {missing[0]!r} does not; "
                "use a different model"
            )
        return [sorted(ids) for ids in own]

    def _first_token(self, text: str) -> int:
        tokenizer = self.processor.tokenizer
        ids = tokenizer.encode(text, add_special_tokens=False)
        # SentencePiece vocabularies may encode the space before a word as a token
        return next((i for i in ids if tokenizer.decode([i]).strip()), ids[-1])


def _spellings(option: str) -> list[str]:
    words = {option, option.lower(), option.capitalize(), option.upper()}
    return [space + word for word in words for space in ("", " ")]


def _message(request: Request) -> dict[str, Any]:
    images = [{"type": "image"} for _ in request.images]
    return {"role": "user", "content": [*images, {"type": "text", "text": request.text}]}
