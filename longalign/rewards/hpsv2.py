"""HPSv2 and v2.1 (Wu et al. 2023, arXiv 2306.09341): open_clip's ViT-H-14 from the published ``.pt`` files."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from longalign.hub import why
from longalign.images import CLIP_MEAN, CLIP_STD
from longalign.rewards.clip import NUM_SPECIAL_TOKENS, check_tokenizer
from longalign.rewards.towers import ImageInput, TowerReward, Towers
from longalign.runtime import Runtime, resolve_checkpoint
from longalign.weights import load_pickle

if TYPE_CHECKING:
    from longalign.rewards.configs import Hpsv2Config

ARCHITECTURE = "ViT-H-14"
FILES = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
CONFIG_FILE = "open_clip_config.json"
_SPECIAL = re.compile("<((?:start|end)_of_text>)")
BPE_FILE = "bpe_simple_vocab.txt.gz"


class OpenClipTowers(Towers):
    """Both towers of an ``open_clip`` model.

    Args:
        model: the model, an ``open_clip.model.CLIP``.
        tokenizer: an ``open_clip.tokenizer.SimpleTokenizer``.
    """

    def __init__(self, model: Any, tokenizer: Any):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.dim = model.text_projection.shape[1]
        self.window = model.context_length - NUM_SPECIAL_TOKENS

    def count_tokens(self, text: str) -> int:
        # encode() leaves the cleaning to the caller
        return len(self.tokenizer.encode(self.tokenizer.clean_fn(self._plain(text))))

    def _plain(self, text: str) -> str:
        """A text in which what looks like a special token is text; the same tokens otherwise."""
        clean = self.tokenizer.clean_fn(text)
        return _SPECIAL.sub(r"< \1", clean) if _SPECIAL.search(clean) else text

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels.to(self.model.positional_embedding.dtype))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer([self._plain(text) for text in texts], context_length=self.model.context_length)
        return self.model.encode_text(tokens.to(self.model.positional_embedding.device))


def load_hpsv2(config: Hpsv2Config, runtime: Runtime) -> TowerReward:
    """Loads a `TowerReward` from the hub, a ``.pt`` file or a folder that holds one."""
    weights = find_weights(config.checkpoint, config.version, config.revision)
    settings = _settings(weights.parent)
    model = build_model(settings["model_cfg"], read_state(weights), str(weights))
    tokenizer = _tokenizer(weights.parent, model.context_length)
    check_tokenizer(tokenizer.vocab_size, model.vocab_size, str(weights), str(weights))
    preprocess = settings.get("preprocess_cfg", {})
    image = ImageInput(model.visual.image_size, preprocess.get("mean", CLIP_MEAN), preprocess.get("std", CLIP_STD))
    return TowerReward.from_towers(OpenClipTowers(model, tokenizer), image, config, runtime)


def find_weights(checkpoint: str, version: str | None = None, revision: str | None = None) -> Path:
    """The ``.pt`` file of a checkpoint.

    Args:
        checkpoint: hub id, ``.pt`` file or folder.
        version: ``"v2"`` or ``"v2.1"``, for a hub id or a folder; v2.1 if None.
        revision: for a hub id.
    """
    path = Path(resolve_checkpoint(checkpoint))
    local = path.exists() or path.suffix == ".pt"
    if local and revision is not None:
        raise ValueError(f"`revision` is for hub repositories, and '{checkpoint}' is on this machine; remove it")
    if path.suffix == ".pt":
        if not path.is_file():
            raise ValueError(f"there is no file '{checkpoint}'; give a .pt file, a folder that holds one, or a hub id")
        if version is not None:
            raise ValueError(f"`version` picks a file of a folder or hub repository; '{checkpoint}' is one; remove it")
        return path
    name = FILES[version or "v2.1"]
    if path.is_dir():
        if not (path / name).is_file():
            there = sorted(p.name for p in path.glob("*.pt")) or ["no .pt file"]
            raise ValueError(f"'{checkpoint}' does not hold {name}; it holds {', '.join(there)}; see `version`")
        return path / name
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(checkpoint, name, revision=revision))
    except Exception as error:
        raise ValueError(f"checkpoint '{checkpoint}' of 'hpsv2' is not to be had: {why(error, name)}") from error


def read_state(weights: Path) -> dict[str, Tensor]:
    """The tensors under ``state_dict`` of a ``.pt`` file; nothing but tensors is unpickled."""
    content = load_pickle(weights)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        keys = f"a dict with {sorted(map(str, content))[:5]}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"expected the weights of '{weights}' under 'state_dict', as in HPSv2's files; found {keys}")
    return content["state_dict"]


def build_model(model_cfg: dict[str, Any], state: dict[str, Tensor], origin: str) -> Any:
    """An ``open_clip.model.CLIP`` of a given architecture with given weights, in float32."""
    from open_clip.model import CLIP

    model = CLIP(**model_cfg)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"the weights of '{origin}' do not fit the architecture {model_cfg}: {error}; "
            f"put the right {CONFIG_FILE} beside the weights"
        ) from error
    return model


def _settings(folder: Path) -> dict[str, Any]:
    """``model_cfg`` and ``preprocess_cfg``: the file beside the weights, else open_clip's ViT-H-14."""
    if (folder / CONFIG_FILE).is_file():
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return settings if "model_cfg" in settings else {"model_cfg": settings}
    import open_clip

    return {"model_cfg": open_clip.get_model_config(ARCHITECTURE)}


def _tokenizer(folder: Path, context_length: int) -> Any:
    from open_clip.tokenizer import SimpleTokenizer, default_bpe

    beside = folder / BPE_FILE
    bpe_path = str(beside) if beside.is_file() else default_bpe()
    return SimpleTokenizer(bpe_path, context_length=context_length)
