"""CLIP, PickScore and Denscore, which differ only in their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longalign.checkpoints.weights import reading
from longalign.hub import download_problem
from longalign.rewards.clip.config import ClipLikeConfig
from longalign.rewards.clip.towers import ClipTowers
from longalign.rewards.pretrained import check_tokenizer, has_tokenizer, image_statistics
from longalign.rewards.towers import ImageInput, TowerReward
from longalign.runtime import Runtime, resolve_checkpoint


class ClipReward(TowerReward):
    """Cosine similarity of the image and text embeddings of a transformers ``CLIPModel``."""

    @classmethod
    def from_config(cls, config: ClipLikeConfig, runtime: Runtime) -> ClipReward:
        """Loads the reward from a Hub id or a local folder in transformers layout."""
        checkpoint = resolve_checkpoint(config.checkpoint)
        source: dict[str, Any] = {"revision": config.revision, "subfolder": config.subfolder or ""}
        model = _load_model(config, checkpoint, source)
        text_config = model.config.text_config
        processor, processor_source = _processor(config, checkpoint, source)
        tokenizer = _load_tokenizer(processor, processor_source)
        check_tokenizer(len(tokenizer), text_config.vocab_size, processor, checkpoint)
        _check_eos_token(tokenizer.eos_token_id, text_config.eos_token_id, processor, checkpoint)
        mean, std = image_statistics(processor, **processor_source)
        image = ImageInput(model.config.vision_config.image_size, mean, std)
        return cls.from_towers(ClipTowers(model, tokenizer), image, config, runtime)


def _load_model(config: ClipLikeConfig, checkpoint: str, source: dict[str, Any]) -> Any:
    """Loads the ``CLIPModel``; raises ValueError if weights are missing."""
    from transformers import CLIPModel

    try:
        with reading(f"a file of weights in '{checkpoint}'"):
            loaded: Any = CLIPModel.from_pretrained(
                checkpoint, output_loading_info=True, variant=config.variant, **source
            )
    except OSError as error:
        if Path(checkpoint).exists():
            raise
        raise ValueError(
            f"checkpoint '{checkpoint}' of '{config.name}' could not be loaded: {download_problem(error)}"
        ) from error
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(
            f"'{checkpoint}' is not a complete CLIPModel: {len(info['missing_keys'])} weights are missing, e.g. "
            f"{sorted(info['missing_keys'])[:5]}; use a checkpoint saved from CLIPModel, not from CLIPTextModel"
        )
    return model


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
