"""The rewards CLIP, PickScore and Denscore, which differ in their weights and in how a prompt is encoded by default."""

from __future__ import annotations

from typing import Any

from longalign.files.weights import load_pretrained
from longalign.rewards.clip.config import ClipLikeConfig
from longalign.rewards.clip.towers import ClipTowers
from longalign.rewards.pretrained import check_tokenizer, has_tokenizer, image_statistics
from longalign.rewards.towers import ImageInput, TowerReward
from longalign.runtime import Runtime, resolve_checkpoint

HINT = " of both towers; set 'variant' for files such as model.fp16.safetensors"


class ClipReward(TowerReward):
    """Cosine similarity of the image and text embeddings of a transformers ``CLIPModel``."""

    @classmethod
    def from_config(cls, config: ClipLikeConfig, runtime: Runtime) -> ClipReward:
        """Loads the reward from a Hub id or a local folder in transformers layout.

        Raises:
            ValueError: if there is no complete ``CLIPModel``, or the tokenizer has more tokens or a different end token
                than the text encoder.
        """
        from transformers import CLIPModel

        checkpoint = resolve_checkpoint(config.checkpoint)
        source: dict[str, Any] = {"revision": config.revision, "subfolder": config.subfolder or ""}
        model = load_pretrained(CLIPModel, checkpoint, hint=HINT, variant=config.variant, **source)
        text_config = model.config.text_config
        processor, processor_source = _processor(config, checkpoint, source)
        tokenizer = _load_tokenizer(processor, processor_source)
        check_tokenizer(len(tokenizer), text_config.vocab_size, processor, checkpoint)
        _check_eos_token(tokenizer.eos_token_id, text_config.eos_token_id, processor, checkpoint)
        mean, std = image_statistics(processor, **processor_source)
        image = ImageInput(model.config.vision_config.image_size, mean, std)
        return cls.from_towers(ClipTowers(model, tokenizer), image, config, runtime)


def _load_tokenizer(processor: str, source: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(processor, trust_remote_code=False, **source)


def _check_eos_token(token: int | None, expected: int, processor: str, checkpoint: str) -> None:
    # legacy configs set eos_token_id=2; transformers then pools at the largest id
    if expected not in (2, token):
        raise ValueError(
            f"the text tower of '{checkpoint}' pools at token {expected}, but the tokenizer of '{processor}' ends "
            f"texts with token {token}; set `processor` to a checkpoint with the tokenizer used in training"
        )


def _processor(config: ClipLikeConfig, checkpoint: str, source: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if config.processor is not None:
        return resolve_checkpoint(config.processor), {}
    if has_tokenizer(checkpoint, **source):
        return checkpoint, source
    return config.default_processor, {}
