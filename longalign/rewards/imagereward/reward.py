"""ImageReward (Xu et al. 2023, arXiv 2304.05977)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Self

from torch import Tensor, nn

from longalign.functional.images import ImageCheck, ImagePreprocessor, at_least_float32
from longalign.hub import download_problem
from longalign.rewards.base import Reward, Scores, check_pairs
from longalign.rewards.imagereward import weights
from longalign.rewards.imagereward.config import ImageRewardConfig
from longalign.rewards.micro import micro_batched
from longalign.rewards.pretrained import check_tokenizer, has_tokenizer
from longalign.runtime import Runtime, resolve_checkpoint

#: mean and standard deviation of the authors' scores, by which the score is normalized
MEAN, STD = 0.16717362830052426, 1.0333394966054072
#: tokens of a text that the authors' code reads, with [CLS] and [SEP]
MAX_LENGTH, NUM_SPECIAL_TOKENS = 35, 2
TOKENIZER = "google-bert/bert-base-uncased"


class ImageRewardReward(Reward):
    """Score of ImageReward: ``(f(image, text) - mean) / std``, an unbounded number.

    ``f`` is a linear head on the last hidden state of BLIP's text encoder at [CLS]; the text encoder attends to the
    patches of the image. ``mean`` and ``std`` are the authors' constants, so that scores of the published weights have
    mean 0 and standard deviation 1 on the authors' data.

    Args:
        vision: a ``BlipVisionModel``.
        text: a ``BlipTextModel`` with cross-attention.
        head: maps states ``(b, d)`` to ``(b, 1)``, in float32.
        tokenizer: the tokenizer of the text encoder.
        preprocessor: resizes and normalizes images in [0, 1] for ``vision``.
        micro_batch: number of images per pass of the encoders; None: all at once.
    """

    def __init__(
        self,
        vision: Any,
        text: Any,
        head: nn.Module,
        tokenizer: Any,
        preprocessor: ImagePreprocessor,
        *,
        micro_batch: int | None,
    ):
        super().__init__()
        self.vision, self.text, self.head = vision, text, head
        self.requires_grad_(False).eval()
        self.tokenizer, self.preprocessor, self.micro_batch = tokenizer, preprocessor, micro_batch
        self.window = MAX_LENGTH - NUM_SPECIAL_TOKENS
        self._check_images = ImageCheck()
        self._warned = False

    @classmethod
    def from_config(cls, config: ImageRewardConfig, runtime: Runtime) -> ImageRewardReward:
        """Loads the reward from the Hub, or a folder with the published files.

        Raises:
            ValueError: if a file is missing or does not have the expected content, or the tokenizer has more tokens
                than the text encoder.
        """
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        checkpoint = resolve_checkpoint(config.checkpoint)
        text_file = weights.find_file(checkpoint, weights.TEXT_CONFIG, config.revision)
        file = weights.find_file(checkpoint, weights.WEIGHTS, config.revision)
        state = weights.read_state(file)
        settings = weights.vision_config(state)
        vision_config, size = BlipVisionConfig(**settings), settings["image_size"]
        text_config = BlipTextConfig(**weights.text_config(text_file, vision_config.hidden_size))
        tokenizer = _load_tokenizer(config, checkpoint)
        check_tokenizer(len(tokenizer), text_config.vocab_size, tokenizer.name_or_path, checkpoint)
        vision, text = BlipVisionModel(vision_config), BlipTextModel(text_config, add_pooling_layer=False)
        head = _head(text_config.hidden_size)
        for module, prefix in ((vision, weights.VISION), (text, weights.TEXT), (head, weights.HEAD)):
            weights.load_part(module, state, prefix, file)
        for module in (vision, text):
            module.to(runtime.torch_dtype)
        preprocessor = ImagePreprocessor((size, size), aspect=config.aspect)
        return cls(vision, text, head, tokenizer, preprocessor, micro_batch=config.micro_batch).to(runtime.device)

    def train(self, mode: bool = True) -> Self:
        """Sets training or eval mode of the reward and returns the reward; its networks stay in eval mode."""
        super().train(mode)
        for module in (self.vision, self.text, self.head):
            module.eval()
        return self

    def count_tokens(self, text: str) -> int:
        return len(
            self.tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=True)["input_ids"]
        )

    def score_components(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        check_pairs(images, prompts)
        return Scores(self.score_texts(images, prompts, range(len(prompts)))).checked(images, prompts)

    def score_texts(self, images: Tensor, texts: Sequence[str], image_index: Sequence[int]) -> Tensor:
        self._check_images(images)
        self._warn_if_truncated(texts)
        pixels = self.preprocessor(images, random=False).to(self.vision.device)
        states = micro_batched(self._image_states, self.micro_batch, pixels)
        return micro_batched(self._scores, self.micro_batch, states[list(image_index)], list(texts))

    def _image_states(self, pixels: Tensor) -> Tensor:
        return self.vision(pixel_values=pixels.to(self.vision.dtype)).last_hidden_state

    def _scores(self, states: Tensor, texts: Sequence[str]) -> Tensor:
        tokenize = partial(self.tokenizer, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        tokens = tokenize(list(texts), split_special_tokens=True).to(states.device)
        output = self.text(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], encoder_hidden_states=states
        )
        return (self.head(at_least_float32(output.last_hidden_state[:, 0])).squeeze(1) - MEAN) / STD

    def _warn_if_truncated(self, texts: Sequence[str]) -> None:
        count = 0 if self._warned else max(map(self.count_tokens, texts), default=0)
        if count > MAX_LENGTH - NUM_SPECIAL_TOKENS:
            self._warned = True
            warnings.warn(
                f"a prompt has {count} tokens, but ImageReward reads {self.window}: the rest is not scored. To score "
                "the whole prompt, wrap the reward: {name: segments, inner: imagereward} (only warned once)",
                stacklevel=5,
            )


def _load_tokenizer(config: ImageRewardConfig, checkpoint: str) -> Any:
    from transformers import AutoTokenizer

    own = config.tokenizer is None and has_tokenizer(checkpoint, config.revision)
    name = checkpoint if own else resolve_checkpoint(config.tokenizer or TOKENIZER)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, revision=config.revision if own else None)
    except OSError as error:
        raise ValueError(
            f"the tokenizer '{name}' of 'imagereward' could not be loaded: {download_problem(error)}; set `tokenizer` "
            "to a local copy"
        ) from error


def _head(width: int) -> nn.Sequential:
    """Returns the published head without its weights: linear layers, without activations in between."""
    return nn.Sequential(
        nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2),
        nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip
