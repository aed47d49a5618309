"""Vision-language models of transformers, run on this machine."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longalign.files.fingerprint import fingerprint
from longalign.files.weights import load_pretrained
from longalign.functional.images import at_least_float32
from longalign.hub import download_problem
from longalign.runtime import Runtime, resolve_checkpoint
from longalign.vlm.base import VLM, Request
from longalign.vlm.config import LocalVLMConfig


class LocalVLM(VLM):
    """A vision-language model of transformers. It answers with the option that is most probable as start of the reply.

    Only the first token of the reply is predicted. The probability of an option is the sum of the probabilities of the
    first tokens of its spellings: as given, lower case, capitalized and upper case, each with and without a space
    before it. Tokens that are the first of several options are omitted.

    Args:
        model: a transformers model that maps images and text to text, e.g. a ``LlavaForConditionalGeneration``.
        processor: the model's processor, from `load_processor`.
        identity: text that identifies the model and its settings; see `VLM`.
        batch_size: number of requests per forward pass.
    """

    def __init__(self, model: Any, processor: Any, *, identity: str, batch_size: int):
        super().__init__()
        self.model, self.processor = model.eval(), processor
        self.identity, self.batch_size = identity, batch_size

    @classmethod
    def from_config(cls, config: LocalVLMConfig, runtime: Runtime) -> LocalVLM:
        """Loads model and processor from a Hub id or a local folder. Code of the checkpoint is not run.

        Raises:
            ValueError: if the model or the processor cannot be loaded, or there is no chat template.
        """
        runtime = runtime.with_dtype(config.dtype)
        processor = load_processor(config.checkpoint, config.revision)
        model = load_model(config.checkpoint, config.revision, runtime)
        weights = fingerprint(resolve_checkpoint(config.checkpoint), config.revision, None, [])
        identity = json.dumps(["local", weights or [config.checkpoint, config.revision], runtime.dtype])
        return cls(model, processor, identity=identity, batch_size=config.batch_size)

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, str | None]]:
        """Yields ``(i, answer)`` for each request ``requests[i]``, batch by batch. An answer is never None.

        Raises:
            ValueError: if all first tokens of an option are also first tokens of other options of the request.
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
        """Returns the logits ``(b, vocabulary)`` of the first token of the reply to each of b requests, on the CPU.

        The dtype is float32, or float64 for a float64 model.
        """
        texts = [chat_text(self.processor, request.text, len(request.images)) for request in requests]
        images = [[image.image for image in request.images] for request in requests]
        return next_token_logits(self.model, processor_inputs(self.processor, texts, images)).cpu()

    def option_tokens(self, options: Sequence[str]) -> list[list[int]]:
        """Returns, for each option, the sorted ids of the tokens that start a spelling of this option only.

        The class docstring lists the spellings.

        Raises:
            ValueError: if there is no such token for an option.
        """
        found = [{self._first_token(text) for text in _spellings(option)} for option in options]
        own = [ids - set().union(*(f for j, f in enumerate(found) if j != i)) for i, ids in enumerate(found)]
        if missing := [option for option, ids in zip(options, own, strict=True) if not ids]:
            raise ValueError(
                f"expected options that start with different tokens, got {list(options)}: the model's tokenizer starts "
                f"{missing[0]!r} with the same tokens as other options; use a different model"
            )
        return [sorted(ids) for ids in own]

    def _first_token(self, text: str) -> int:
        return text_tokens(self.processor.tokenizer, text)[0]


def load_processor(checkpoint: str, revision: str | None) -> Any:
    """Loads a vision-language model's transformers processor: image processor, tokenizer and chat template.

    The tokenizer pads on the left, so that the last position of each row predicts the reply. Code of the checkpoint is
    not run.

    Args:
        checkpoint: Hub id or local folder.
        revision: branch, tag or commit on the Hub; None for the default branch.

    Raises:
        ValueError: if the processor cannot be downloaded, or has no chat template.
        OSError: if a local folder does not contain a processor.
    """
    from transformers import AutoProcessor

    source = resolve_checkpoint(checkpoint)
    # the torchvision backend, which transformers 5 uses by default
    backend = {} if find_spec("transformers.image_processing_backends") else {"use_fast": True}
    with _download(checkpoint):
        processor: Any = AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=False, **backend)
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            f"the {type(processor).__name__} of '{checkpoint}' has no chat template; use the checkpoint of an "
            "instruction-tuned model, with a chat_template.jinja or chat_template.json"
        )
    processor.tokenizer.padding_side = "left"
    return processor


def load_model(checkpoint: str, revision: str | None, runtime: Runtime) -> Any:
    """Loads a vision-language model of transformers. Code of the checkpoint is not run.

    Args:
        checkpoint: Hub id or local folder.
        revision: branch, tag or commit on the Hub; None for the default branch.
        runtime: device and dtype of the model.

    Raises:
        ValueError: if the model cannot be loaded, or weights are missing.
    """
    from transformers import AutoModelForImageTextToText

    model = load_pretrained(
        AutoModelForImageTextToText,
        resolve_checkpoint(checkpoint),
        dtype=runtime.torch_dtype,
        revision=revision,
        trust_remote_code=False,
    )
    return model.to(runtime.device)


@contextmanager
def _download(checkpoint: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if Path(resolve_checkpoint(checkpoint)).exists():
            raise
        raise ValueError(f"checkpoint '{checkpoint}' could not be loaded: {download_problem(error)}") from error


def chat_text(processor: Any, text: str, num_images: int) -> str:
    """Returns the text of a chat in the processor's chat template, up to the start of the reply.

    The chat has one message of the user: placeholders of ``num_images`` images, then ``text``.
    """
    images = [{"type": "image"} for _ in range(num_images)]
    message = {"role": "user", "content": [*images, {"type": "text", "text": text}]}
    return processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


def processor_inputs(processor: Any, texts: Sequence[str], images: Sequence[Any]) -> dict[str, Tensor]:
    """Returns the padded inputs (tensors) of a vision-language model for a batch of chats.

    Args:
        processor: the model's processor, from `load_processor`.
        texts: outputs of `chat_text`.
        images: for each text, a list of its images: images of PIL, or tensors ``(3, h, w)`` in [0, 255].
    """
    start = processor.tokenizer.bos_token  # which some templates write themselves
    start_written = start is not None and texts[0].startswith(start)
    return processor(
        images=list(images), text=list(texts), padding=True, return_tensors="pt", add_special_tokens=not start_written
    )


def next_token_logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Returns the logits ``(b, vocabulary)`` of the token after each of b chats, the first token of the reply.

    The dtype is float32, or float64 for a float64 model. ``inputs`` are from `processor_inputs`.
    """
    inputs = {k: v.to(model.device, model.dtype if v.is_floating_point() else None) for k, v in inputs.items()}
    # logits of all positions, most of them of image patches, can be larger than the model
    last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
    logits = model(**inputs, **({"logits_to_keep": 1} if last_only else {})).logits[:, -1]
    return at_least_float32(logits)


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    """Returns the token ids of a text, without special tokens and without tokens that consist of spaces.

    If all tokens consist of spaces, returns only the last one.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    # SentencePiece vocabularies may encode the space before a word as a token
    return [i for i in ids if tokenizer.decode([i]).strip()] or ids[-1:]


def escape_special_tokens(tokenizer: Any, text: str) -> str:
    """Returns ``text`` with a space inside each name of a special token, so that it is tokenized as plain text.

    For example, ``<image>`` becomes ``< image>``.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for token in dict.fromkeys([*tokenizer.all_special_tokens, *added]):
        if len(token) > 1:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def _spellings(option: str) -> list[str]:
    words = {option, option.lower(), option.capitalize(), option.upper()}
    return [space + word for word in words for space in ("", " ")]
