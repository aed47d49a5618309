"""Rewards from transformers' ``CLIPModel``: CLIP itself, PickScore and Denscore, which differ in their weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longalign.hub import why
from longalign.images import ImagePreprocessor
from longalign.rewards.hub import holds_tokenizer, image_statistics
from longalign.rewards.towers import ImageInput, TowerReward, Towers
from longalign.runtime import Runtime, resolve_checkpoint
from longalign.tokens import TextTokens
from longalign.weights import reading

if TYPE_CHECKING:
    from longalign.rewards.configs import ClipLikeConfig

NUM_SPECIAL_TOKENS = 2


class ClipTowers(Towers):
    """Both towers of a ``transformers.CLIPModel``.

    The text tower is causal and its embedding is read at ``<eot>``, so padding after it changes nothing and needs no
    mask.

    Args:
        model: the model.
        tokenizer: its tokenizer.
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
        return [min(len(read), self.window) + NUM_SPECIAL_TOKENS for read in self.tokens.batch(texts)]

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return pooled(self.model.get_image_features(pixel_values=pixels.to(self.model.dtype)))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        sot, eot = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        pad = eot if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        rows = [[sot, *read.ids[: self.window], eot] for read in self.tokens.batch(texts)]
        length = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
        return pooled(self.model.get_text_features(input_ids=ids.to(self.model.device)))

    def train_only(self, what: str) -> None:
        text = (self.model.text_model, self.model.text_projection)
        vision = (self.model.vision_model, self.model.visual_projection)
        parts = {"all": (*text, *vision), "text": text, "vision": vision, "projections": (text[1], vision[1])}
        self.requires_grad_(False)
        for part in (*parts[what], self.logit_scale):
            part.requires_grad_(True)

    @property
    def logit_scale(self) -> nn.Parameter:
        return self.model.logit_scale

    def enable_gradient_checkpointing(self) -> None:
        # renamed in recent versions of transformers, where the old name warns
        name = "activation_checkpointing_enable"
        enable = getattr(self.model, name if hasattr(self.model, name) else "gradient_checkpointing_enable")
        enable({"use_reentrant": False})

    def save(self, folder: Path, pixels: ImagePreprocessor) -> None:
        self.model.save_pretrained(folder)
        if backend := getattr(self.tokenizer, "backend_tokenizer", None):  # it would save how it was last called
            backend.no_truncation()
            backend.no_padding()
        self.tokenizer.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(_image_settings(pixels), indent=1) + "\n")


def _image_settings(pixels: ImagePreprocessor) -> dict[str, Any]:
    """What transformers' ``CLIPImageProcessor`` is told of a model's images."""
    height, width = pixels.size
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
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
    }


def pooled(output: Any) -> Tensor:
    """The projected features of ``get_*_features``: an object since transformers 5, a tensor before."""
    return output if isinstance(output, Tensor) else output.pooler_output


def check_tokenizer(num_tokens: int, num_embeddings: int, processor: str, checkpoint: str) -> None:
    """Raises ValueError where a tokenizer has tokens that the text tower of a checkpoint has no embedding for."""
    if num_tokens > num_embeddings:
        raise ValueError(
            f"the tokenizer of '{processor}' has {num_tokens} tokens, the text tower of '{checkpoint}' has embeddings "
            f"for {num_embeddings}; set `processor` to the checkpoint whose tokenizer it was trained with"
        )


def load_clip_reward(config: ClipLikeConfig, runtime: Runtime) -> TowerReward:
    """Loads a `TowerReward` from a hub id or a local folder in transformers layout."""
    from transformers import AutoTokenizer, CLIPModel

    checkpoint = resolve_checkpoint(config.checkpoint)
    own: dict[str, Any] = {"revision": config.revision, "subfolder": config.subfolder or ""}
    try:
        with reading(f"a file of weights in '{checkpoint}'"):
            loaded: Any = CLIPModel.from_pretrained(checkpoint, output_loading_info=True, variant=config.variant, **own)
    except OSError as error:
        if Path(checkpoint).exists():
            raise
        raise ValueError(f"checkpoint '{checkpoint}' of '{config.name}' is not to be had: {why(error)}") from error
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(
            f"'{checkpoint}' is not a whole CLIPModel: {sorted(info['missing_keys'])[:5]} and so on are missing "
            f"({len(info['missing_keys'])} in all); expected both towers and their projections"
        )
    processor, where = _processor(config, checkpoint, own)
    tokenizer = AutoTokenizer.from_pretrained(processor, trust_remote_code=False, **where)
    check_tokenizer(len(tokenizer), model.config.text_config.vocab_size, processor, checkpoint)
    _check_end(tokenizer.eos_token_id, model.config.text_config.eos_token_id, processor, checkpoint)
    mean, std = image_statistics(processor, **where)
    image = ImageInput(model.config.vision_config.image_size, mean, std)
    return TowerReward.from_towers(ClipTowers(model, tokenizer), image, config, runtime)


def _check_end(token: int | None, expected: int, processor: str, checkpoint: str) -> None:
    # 2 is the mark of old configs, for which transformers reads the embedding at the largest id
    if expected not in (2, token):
        raise ValueError(
            f"the text tower of '{checkpoint}' is read at token {expected}, and the tokenizer of '{processor}' ends "
            f"texts with token {token}; set `processor` to the checkpoint whose tokenizer it was trained with"
        )


def _processor(config: ClipLikeConfig, checkpoint: str, own: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if config.processor is not None:
        return resolve_checkpoint(config.processor), {}
    if holds_tokenizer(checkpoint, **own):
        return checkpoint, own
    return config.default_processor, {}
