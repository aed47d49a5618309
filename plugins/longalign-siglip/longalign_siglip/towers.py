"""SigLIP's towers from transformers, with the interface of `longalign.rewards.towers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from longalign.rewards.clip import check_tokenizer, pooled
from longalign.rewards.hub import image_statistics
from longalign.rewards.towers import ImageInput, TowerReward, Towers
from longalign.runtime import Runtime, resolve_checkpoint
from torch import Tensor

if TYPE_CHECKING:
    from longalign_siglip.config import SiglipConfig

HALF = (0.5, 0.5, 0.5)


class SiglipTowers(Towers):
    """Both towers of a ``transformers.SiglipModel``.

    Every text is padded to the whole window and encoded without a mask, as in SigLIP's training. Its text embedding is
    read at the last position, so it depends on the input length.

    Args:
        model: a ``SiglipModel``.
        tokenizer: the tokenizer of the model.
    """

    def __init__(self, model: Any, tokenizer: Any):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.dim = model.config.text_config.projection_size
        self.length = model.config.text_config.max_position_embeddings
        self.window = self.length - tokenizer.num_special_tokens_to_add()

    def count_tokens(self, text: str) -> int:
        return len(
            self.tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=True)["input_ids"]
        )

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return pooled(self.model.get_image_features(pixel_values=pixels.to(self.model.dtype)))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
            split_special_tokens=True,
        )
        return pooled(self.model.get_text_features(input_ids=tokens["input_ids"].to(self.model.device)))


def load_siglip(config: SiglipConfig, runtime: Runtime) -> TowerReward:
    """Loads the reward from a Hub id or a local folder in transformers layout."""
    from transformers import AutoTokenizer, SiglipModel

    checkpoint = resolve_checkpoint(config.checkpoint)
    source: dict[str, Any] = {"revision": config.revision}
    loaded: Any = SiglipModel.from_pretrained(checkpoint, output_loading_info=True, **source)
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(
            f"'{checkpoint}' is not a complete SiglipModel: {len(info['missing_keys'])} weights are missing, e.g. "
            f"{sorted(info['missing_keys'])[0]}; expected a checkpoint with both towers"
        )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False, **source)
    check_tokenizer(len(tokenizer), model.config.text_config.vocab_size, checkpoint, checkpoint)
    mean, std = image_statistics(checkpoint, config.revision, default=(HALF, HALF))
    image = ImageInput(model.config.vision_config.image_size, mean, std)
    return TowerReward.from_towers(SiglipTowers(model, tokenizer), image, config, runtime)
