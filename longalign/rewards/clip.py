"""Rewards from transformers' ``CLIPModel``: CLIP, PickScore and Denscore, which differ only in their weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longalign.checkpoints.weights import reading
from longalign.functional.images import ImagePreprocessor
from longalign.hub import download_problem
from longalign.rewards.hub import has_tokenizer, image_statistics
from longalign.rewards.towers import ImageInput, TowerReward, Towers
from longalign.runtime import Runtime, resolve_checkpoint
from longalign.tokens import TextTokens

if TYPE_CHECKING:
    from longalign.rewards.configs import ClipLikeConfig

NUM_SPECIAL_TOKENS = 2


class ClipTowers(Towers):
    """Both towers of a ``transformers.CLIPModel``.

    The text tower is causal and its embedding is pooled at ``<eot>``, so padding after it has no effect and needs no
    mask.

    Args:
        model: a ``CLIPModel``.
        tokenizer: the tokenizer of the model.
    """

    def __init__(self, model: Any, tokenizer: Any):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.tokens = TextTokens(tokenizer, model.config.text_config.vocab_size)
        self.dim = model.config.projection_dim
        self.window = model.config.text_config.max_position_embeddings - NUM_SPECIAL_TOKENS

    def count_tokens(self, text: str) -> int:
        return self.tokens.count(text)

    def num_positions(self, texts: Sequence[str]) -> list[int]:
        return [min(len(tokens), self.window) + NUM_SPECIAL_TOKENS for tokens in self.tokens.batch(texts)]

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return pooled(self.model.get_image_features(pixel_values=pixels.to(self.model.dtype)))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        sot, eot = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        pad = eot if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        rows = [[sot, *tokens.ids[: self.window], eot] for tokens in self.tokens.batch(texts)]
        length = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
        return pooled(self.model.get_text_features(input_ids=ids.to(self.model.device)))

    def train_only(self, which: str) -> None:
        text = (self.model.text_model, self.model.text_projection)
        vision = (self.model.vision_model, self.model.visual_projection)
        parts = {"all": (*text, *vision), "text": text, "vision": vision, "projections": (text[1], vision[1])}
        self.requires_grad_(False)
        for part in (*parts[which], self.logit_scale):
            part.requires_grad_(True)

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.model.logit_scale

    def enable_gradient_checkpointing(self) -> None:
        # newer versions of transformers renamed this method, and the old name warns
        name = "activation_checkpointing_enable"
        enable = getattr(self.model, name if hasattr(self.model, name) else "gradient_checkpointing_enable")
        enable({"use_reentrant": False})

    def save(self, folder: Path, preprocessor: ImagePreprocessor) -> None:
        self.model.save_pretrained(folder)
        # reset, otherwise the truncation and padding of the last call are saved
        if backend := getattr(self.tokenizer, "backend_tokenizer", None):
            backend.no_truncation()
            backend.no_padding()
        self.tokenizer.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(
            json.dumps(_image_processor_config(preprocessor), indent=1) + "\n"
        )


def _image_processor_config(preprocessor: ImagePreprocessor) -> dict[str, Any]:
    """Config of transformers' ``CLIPImageProcessor`` with the settings of ``preprocessor``."""
    height, width = preprocessor.size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": min(height, width)},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessor.mean),
        "image_std": list(preprocessor.std),
    }


def pooled(output: Any) -> Tensor:
    """The projected features in the output of ``get_*_features``: an object since transformers 5, a tensor before."""
    return output if isinstance(output, Tensor) else output.pooler_output


def check_tokenizer(num_tokens: int, num_embeddings: int, processor: str, checkpoint: str) -> None:
    """Raises ValueError if a tokenizer has more tokens than the checkpoint's text tower has embeddings."""
    if num_tokens > num_embeddings:
        raise ValueError(
            f"the tokenizer of '{processor}' has {num_tokens} tokens, the text tower of '{checkpoint}' has "
            f"{num_embeddings} embeddings; set `processor` to a checkpoint with the tokenizer used in training"
        )


def load_clip_reward(config: ClipLikeConfig, runtime: Runtime) -> TowerReward:
    """Loads a `TowerReward` from a Hub id or a local folder in transformers layout."""
    from transformers import AutoTokenizer, CLIPModel

    checkpoint = resolve_checkpoint(config.checkpoint)
    source: dict[str, Any] = {"revision": config.revision, "subfolder": config.subfolder or ""}
    try:
        with reading(f"a file of weights in '{checkpoint}'"):
            loaded: Any = CLIPModel.from_pretrained(
                checkpoint, output_loading_info=True, variant=config.variant, **source
            )
    except OSError as error:
        if Path(checkpoint).exists():
            raise
        raise ValueError(
            f"checkpoint '{checkpoint}' of '{config.name}' cannot be loaded: {download_problem(error)}"
        ) from error
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(
            f"'{checkpoint}' is not a complete CLIPModel: {len(info['missing_keys'])} weights are missing, e.g. "
            f"{sorted(info['missing_keys'])[:5]}; expected both towers and their projections"
        )
    processor, processor_source = _processor(config, checkpoint, source)
    tokenizer = AutoTokenizer.from_pretrained(processor, trust_remote_code=False, **processor_source)
    check_tokenizer(len(tokenizer), model.config.text_config.vocab_size, processor, checkpoint)
    _check_eos_token(tokenizer.eos_token_id, model.config.text_config.eos_token_id, processor, checkpoint)
    mean, std = image_statistics(processor, **processor_source)
    image = ImageInput(model.config.vision_config.image_size, mean, std)
    return TowerReward.from_towers(ClipTowers(model, tokenizer), image, config, runtime)


def _check_eos_token(token: int | None, expected: int, processor: str, checkpoint: str) -> None:
    # legacy configs set eos_token_id=2; transformers then pools at the largest id
    if expected not in (2, token):
        raise ValueError(
            f"the text tower of '{checkpoint}' pools at token {expected}, the tokenizer of '{processor}' ends texts "
            f"with token {token}; set `processor` to a checkpoint with the tokenizer used in training"
        )


def _processor(config: ClipLikeConfig, checkpoint: str, source: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if config.processor is not None:
        return resolve_checkpoint(config.processor), {}
    if has_tokenizer(checkpoint, **source):
        return checkpoint, source
    return config.default_processor, {}
