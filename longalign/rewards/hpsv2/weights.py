"""Finds and loads the published weights of HPSv2: ``.pt`` files of open_clip's ViT-H-14."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from longalign.files.weights import load_pickle
from longalign.hub import download_problem
from longalign.runtime import resolve_checkpoint

#: optional file with the architecture, next to the weights
CONFIG_FILE = "open_clip_config.json"
FILES = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


def find_weights(checkpoint: str, version: str | None = None, revision: str | None = None) -> Path:
    """Returns the path of the ``.pt`` file of a checkpoint, downloaded if needed.

    Args:
        checkpoint: Hub id, ``.pt`` file or folder.
        version: ``"v2"`` or ``"v2.1"``, the file to use of a Hub repository or a folder; None: ``"v2.1"``. Must be None
            for a ``.pt`` file.
        revision: branch, tag or commit of a Hub repository; None: its main branch. Must be None for a local path.

    Raises:
        ValueError: if there is no such file, or ``version`` or ``revision`` is given where it must be None.
    """
    path = Path(resolve_checkpoint(checkpoint))
    local = path.exists() or path.suffix == ".pt"
    if local and revision is not None:
        raise ValueError(
            f"`revision` only applies to Hub repositories, but '{checkpoint}' is a local path; remove `revision`"
        )
    if path.suffix == ".pt":
        if not path.is_file():
            raise ValueError(f"no file '{checkpoint}'; expected a .pt file, a folder with a .pt file, or a Hub id")
        if version is not None:
            raise ValueError(
                f"`version` only applies to a folder or Hub repository, but '{checkpoint}' is a file; remove `version`"
            )
        return path
    name = FILES[version or "v2.1"]
    if path.is_dir():
        if not (path / name).is_file():
            files = sorted(p.name for p in path.glob("*.pt")) or ["no .pt file"]
            raise ValueError(
                f"'{checkpoint}' does not contain {name}; it contains {', '.join(files)}; set `version`, or "
                "`checkpoint` to a .pt file"
            )
        return path / name
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(checkpoint, name, revision=revision))
    except Exception as error:
        raise ValueError(
            f"checkpoint '{checkpoint}' of 'hpsv2' could not be loaded: {download_problem(error, name)}"
        ) from error


def read_state(weights: Path) -> dict[str, Tensor]:
    """Returns the tensors under the key ``state_dict`` of a ``.pt`` file, on the CPU. No code in the file is executed.

    Raises:
        ValueError: if the file is damaged, has no such key or contains anything but tensors and plain values.
    """
    content = load_pickle(weights)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        got = f"a dict with {sorted(map(str, content))[:5]}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"expected weights under 'state_dict' in '{weights}', as in HPSv2's files; got {got}. Use a file of HPSv2"
        )
    return content["state_dict"]


def build_model(model_cfg: dict[str, Any], state: dict[str, Tensor], origin: str) -> Any:
    """Builds an ``open_clip.model.CLIP`` in float32 on the CPU.

    Args:
        model_cfg: open_clip's config of the architecture.
        state: name -> weight, from `read_state`.
        origin: path of the weights, for the error message.

    Raises:
        ValueError: if the weights do not fit the architecture.
    """
    from open_clip.model import CLIP

    model = CLIP(**model_cfg)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"the weights of '{origin}' do not match the architecture {model_cfg}: {error}; "
            f"add the matching {CONFIG_FILE} to the folder of the weights"
        ) from error
    return model
