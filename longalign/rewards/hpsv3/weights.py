"""Loads the published weights of HPSv3, whose parameters are named as in older or newer versions of transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longalign.files.weights import load_pretrained
from longalign.rewards.hpsv3.config import WEIGHTS
from longalign.rewards.pretrained import find_optional_file
from longalign.runtime import Runtime, resolve_checkpoint

HEAD = "rm_head."
#: of the language model, not used for scores
UNUSED = "lm_head.weight"
#: names of `Qwen2VLForConditionalGeneration` before and since transformers 4.52, as those of `Qwen2VLModel`
_NAMES = ((r"^(model\.)?visual\.", "visual."), (r"^model\.(language_model\.)?", "language_model."))
EMBEDDINGS = "language_model.embed_tokens.weight"


def find_weights(checkpoint: str, revision: str | None) -> Path:
    """Returns the path of the weights, downloaded if needed.

    Args:
        checkpoint: Hub id or folder with ``HPSv3.safetensors``, or the path of a ``.safetensors`` file.
        revision: branch, tag or commit of the Hub repository; None: its main branch.

    Raises:
        ValueError: if there is no such file.
    """
    path: Path | None = Path(checkpoint)
    try:
        if Path(checkpoint).suffix != ".safetensors":
            path = find_optional_file(resolve_checkpoint(checkpoint), WEIGHTS, revision)
    except OSError:  # neither a folder nor a Hub id
        path = None
    if path is None or not path.is_file():
        raise ValueError(
            f"checkpoint '{checkpoint}' of 'hpsv3' could not be loaded: it has no {WEIGHTS}, or is not on this machine "
            "and cannot be downloaded; expected a Hub id, a folder with this file, or its path"
        )
    return path


def split_state(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits the tensors of HPSv3's published file into two state dicts: of a ``Qwen2VLModel``, and of the head."""
    model, head = {}, {}
    for key, value in state.items():
        if key.startswith(HEAD):
            head[key.removeprefix(HEAD)] = value
        elif key != UNUSED:
            for pattern, name in _NAMES:
                key, count = re.subn(pattern, name, key)
                if count:
                    break
            model[key] = value
    return model, head


def make_head(width: int) -> nn.Sequential:
    """Returns the published head without its weights.

    It maps states ``(b, width)`` to mean and logarithm of the standard deviation of the preference, ``(b, 2)``.
    """
    return nn.Sequential(
        nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def load_networks(state: dict[str, Tensor], config: Any, path: Path, runtime: Runtime) -> tuple[Any, nn.Sequential]:
    """Builds a ``Qwen2VLModel`` and the head of HPSv3 with their weights, and returns both; the head is float32.

    Args:
        state: tensors of the published file.
        config: a ``Qwen2VLConfig``. The size of its vocabulary is set to that of the published file.
        path: the published file, for messages.
        runtime: device of both, and dtype of the model.

    Raises:
        ValueError: if weights are missing, unexpected or of a different shape.
    """
    from transformers import Qwen2VLModel

    weights, head_weights = split_state(state)
    text = config.get_text_config()
    if EMBEDDINGS in weights:
        text.vocab_size = len(weights[EMBEDDINGS])
    head = make_head(text.hidden_size)
    with torch.device("meta"):
        expected = Qwen2VLModel(config).state_dict()
    _check_same(weights, expected, path, "the model")
    _check_same(head_weights, head.state_dict(), path, HEAD)
    model = load_pretrained(Qwen2VLModel, None, config=config, state_dict=weights, dtype=runtime.torch_dtype)
    head.load_state_dict(head_weights)
    return model.to(runtime.device), head.float().to(runtime.device)


def _check_same(got: dict[str, Tensor], expected: dict[str, Tensor], path: Path, part: str) -> None:
    shapes = {key: tuple(value.shape) for key, value in expected.items()}
    problems = {
        "missing": shapes.keys() - got.keys(),
        "unexpected": got.keys() - shapes.keys(),
        "of a different shape": {key for key in shapes.keys() & got.keys() if tuple(got[key].shape) != shapes[key]},
    }
    for problem, keys in problems.items():
        if keys:
            raise ValueError(
                f"'{path}' does not fit: {len(keys)} weights of {part} are {problem}, e.g. {min(keys)}; use the file "
                f"{WEIGHTS} and the `base` that it was trained from"
            )
