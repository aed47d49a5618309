"""HPSv2 and v2.1 (Wu et al. 2023, arXiv 2306.09341): open_clip's ViT-H-14 from the published ``.pt`` files."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from longalign.checkpoints.weights import load_pickle
from longalign.functional.images import CLIP_MEAN, CLIP_STD
from longalign.hub import download_problem
from longalign.rewards.clip import NUM_SPECIAL_TOKENS, check_tokenizer
from longalign.rewards.towers import ImageInput, TowerReward, Towers
from longalign.runtime import Runtime, resolve_checkpoint

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
        model: an ``open_clip.model.CLIP``.
        tokenizer: an ``open_clip.tokenizer.SimpleTokenizer``.
    """

    def __init__(self, model: Any, tokenizer: Any):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.dim = model.text_projection.shape[1]
        self.window = model.context_length - NUM_SPECIAL_TOKENS

    def count_tokens(self, text: str) -> int:
        # unlike calling the tokenizer, encode() does not clean the text
        return len(self.tokenizer.encode(self.tokenizer.clean_fn(self._escape_special(text))))

    def _escape_special(self, text: str) -> str:
        """Changes the names of special tokens in a text so that they are tokenized as text."""
        clean = self.tokenizer.clean_fn(text)
        return _SPECIAL.sub(r"< \1", clean) if _SPECIAL.search(clean) else text

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels.to(self.model.positional_embedding.dtype))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(
            [self._escape_special(text) for text in texts], context_length=self.model.context_length
        )
        return self.model.encode_text(tokens.to(self.model.positional_embedding.device))


def load_hpsv2(config: Hpsv2Config, runtime: Runtime) -> TowerReward:
    """Loads a `TowerReward` from the Hub, a ``.pt`` file or a folder with one."""
    weights = find_weights(config.checkpoint, config.version, config.revision)
    settings = _settings(weights.parent)
    model = build_model(settings["model_cfg"], read_state(weights), str(weights))
    tokenizer = _tokenizer(weights.parent, model.context_length)
    check_tokenizer(tokenizer.vocab_size, model.vocab_size, str(weights), str(weights))
    preprocess = settings.get("preprocess_cfg", {})
    image = ImageInput(model.visual.image_size, preprocess.get("mean", CLIP_MEAN), preprocess.get("std", CLIP_STD))
    return TowerReward.from_towers(OpenClipTowers(model, tokenizer), image, config, runtime)


def find_weights(checkpoint: str, version: str | None = None, revision: str | None = None) -> Path:
    """Path of the ``.pt`` file of a checkpoint, downloaded if needed.

    Args:
        checkpoint: Hub id, ``.pt`` file or folder.
        version: ``"v2"`` or ``"v2.1"``, for a Hub id or a folder; v2.1 if None.
        revision: branch, tag or commit, for a Hub id.

    Raises:
        ValueError: if there is no such file, or ``version`` or ``revision`` does not apply.
    """
    path = Path(resolve_checkpoint(checkpoint))
    local = path.exists() or path.suffix == ".pt"
    if local and revision is not None:
        raise ValueError(f"`revision` only applies to Hub repositories, '{checkpoint}' is a local path; remove it")
    if path.suffix == ".pt":
        if not path.is_file():
            raise ValueError(f"no file '{checkpoint}'; expected a .pt file, a folder with one, or a Hub id")
        if version is not None:
            raise ValueError(
                f"`version` only applies to a folder or Hub repository, '{checkpoint}' is a file; remove it"
            )
        return path
    name = FILES[version or "v2.1"]
    if path.is_dir():
        if not (path / name).is_file():
            files = sorted(p.name for p in path.glob("*.pt")) or ["no .pt file"]
            raise ValueError(f"'{checkpoint}' does not contain {name}; it contains {', '.join(files)}; see `version`")
        return path / name
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(checkpoint, name, revision=revision))
    except Exception as error:
        raise ValueError(
            f"checkpoint '{checkpoint}' of 'hpsv2' cannot be loaded: {download_problem(error, name)}"
        ) from error


def read_state(weights: Path) -> dict[str, Tensor]:
    """Loads the tensors under ``state_dict`` of a ``.pt`` file; only tensors are unpickled."""
    content = load_pickle(weights)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        got = f"a dict with {sorted(map(str, content))[:5]}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"expected weights under 'state_dict' in '{weights}', as in HPSv2's files; got {got}")
    return content["state_dict"]


def build_model(model_cfg: dict[str, Any], state: dict[str, Tensor], origin: str) -> Any:
    """Builds an ``open_clip.model.CLIP`` from its config and weights, in float32; ``origin`` is used in messages."""
    from open_clip.model import CLIP

    model = CLIP(**model_cfg)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"the weights of '{origin}' do not match the architecture {model_cfg}: {error}; "
            f"put the matching {CONFIG_FILE} into the folder of the weights"
        ) from error
    return model


def _settings(folder: Path) -> dict[str, Any]:
    """``model_cfg`` and ``preprocess_cfg`` from the config file in ``folder``, else open_clip's ViT-H-14."""
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
