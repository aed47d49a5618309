"""SigLIP as a reward of longalign, loaded with transformers."""

from __future__ import annotations

from typing import Any

from longalign import Runtime
from longalign.rewards import ImageInput, TowerReward, check_tokenizer, image_statistics
from longalign.runtime import resolve_checkpoint

from longalign_siglip.config import SiglipConfig
from longalign_siglip.towers import SiglipTowers

HALF = (0.5, 0.5, 0.5)


class SiglipReward(TowerReward):
    """The cosine similarity of SigLIP's image and text embeddings."""

    @classmethod
    def from_config(cls, config: SiglipConfig, runtime: Runtime) -> SiglipReward:
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
        return cls.from_towers(SiglipTowers(model, tokenizer), image, config, runtime)
