"""HPSv2 and v2.1 (Wu et al. 2023, arXiv 2306.09341)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longalign.functional.images import CLIP_MEAN, CLIP_STD
from longalign.rewards.hpsv2.config import Hpsv2Config
from longalign.rewards.hpsv2.towers import OpenClipTowers
from longalign.rewards.hpsv2.weights import CONFIG_FILE, build_model, find_weights, read_state
from longalign.rewards.pretrained import check_tokenizer
from longalign.rewards.towers import ImageInput, TowerReward
from longalign.runtime import Runtime

ARCHITECTURE = "ViT-H-14"
BPE_FILE = "bpe_simple_vocab.txt.gz"


class Hpsv2Reward(TowerReward):
    """Cosine similarity of the embeddings of an open_clip ViT-H-14 that was fine-tuned on human preferences."""

    @classmethod
    def from_config(cls, config: Hpsv2Config, runtime: Runtime) -> Hpsv2Reward:
        """Loads the reward from the Hub, a ``.pt`` file, or a folder with a ``.pt`` file.

        Raises:
            ValueError: if the weights do not exist or do not fit the architecture, or the tokenizer has more tokens
                than the text encoder.
        """
        weights = find_weights(config.checkpoint, config.version, config.revision)
        settings = _settings(weights.parent)
        model = build_model(settings["model_cfg"], read_state(weights), str(weights))
        tokenizer = _tokenizer(weights.parent, model.context_length)
        check_tokenizer(tokenizer.vocab_size, model.vocab_size, str(weights), str(weights))
        preprocess = settings.get("preprocess_cfg", {})
        image = ImageInput(model.visual.image_size, preprocess.get("mean", CLIP_MEAN), preprocess.get("std", CLIP_STD))
        return cls.from_towers(OpenClipTowers(model, tokenizer), image, config, runtime)


def _settings(folder: Path) -> dict[str, Any]:
    """Returns open_clip's ``model_cfg`` and, if known, ``preprocess_cfg``.

    They are those of ``open_clip_config.json`` in ``folder`` if it exists, otherwise those of ViT-H-14.
    """
    if (folder / CONFIG_FILE).is_file():
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return settings if "model_cfg" in settings else {"model_cfg": settings}
    import open_clip

    return {"model_cfg": open_clip.get_model_config(ARCHITECTURE)}


def _tokenizer(folder: Path, context_length: int) -> Any:
    from open_clip.tokenizer import SimpleTokenizer, default_bpe

    vocabulary = folder / BPE_FILE
    bpe_path = str(vocabulary) if vocabulary.is_file() else default_bpe()
    return SimpleTokenizer(bpe_path, context_length=context_length)
