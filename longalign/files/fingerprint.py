"""Fingerprints: short hashes that identify the weights that a config refers to, without loading these weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from longalign.runtime import resolve_checkpoint

#: config keys of weights and vocabularies
KEYS = ("checkpoint", "tokenizer", "layout")
SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt", ".json", ".txt", ".model")
BLOCK, BLOCKS = 4096, 256


def fingerprints(config: Any, folders: Sequence[str], ask_hub: bool = True) -> dict[str, str | None]:
    """Returns the `fingerprint` of each checkpoint in a config: path of the config key -> fingerprint.

    A path is e.g. ``parts.0.checkpoint``.

    Args:
        config: a config as plain values, the output of pydantic's ``model_dump``.
        folders: as for `fingerprint`.
        ask_hub: as for `fingerprint`.
    """
    return {
        path: fingerprint(name, revision, subfolder, folders, ask_hub)
        for path, name, revision, subfolder in _checkpoints("", config)
    }


def _checkpoints(path: str, value: Any) -> Iterator[tuple[str, str, str | None, str | None]]:
    if isinstance(value, dict):
        for key, child in value.items():
            child_path = f"{path}.{key}" if path else key
            if key in KEYS and isinstance(child, str):
                options = value if key == "checkpoint" else {}
                yield child_path, child, options.get("revision"), options.get("subfolder")
            yield from _checkpoints(child_path, child)
    elif isinstance(value, list):
        for i, child in enumerate(value):
            yield from _checkpoints(f"{path}.{i}", child)


def fingerprint(
    checkpoint: str, revision: str | None, subfolder: str | None, folders: Sequence[str], ask_hub: bool = True
) -> str | None:
    """Returns a text that identifies the weights of one checkpoint; None for a Hub id without access to its commit.

    For local files: a hash of names, sizes and content in hexadecimal. Files up to 1 MiB are hashed completely. For
    larger files, 256 blocks of 4 KiB spread over the file are hashed; any training changes them. For a Hub id:
    ``commit <hash>``, the commit on the Hub; if offline, or if ``ask_hub`` is False, the commit in the local Hub cache.

    Args:
        checkpoint: local file or folder, bundled weights (``mini/...``), or Hub id.
        revision: branch, tag or commit on the Hub; None for the default branch.
        subfolder: subfolder of the model in a local folder; None for the top level.
        folders: name prefixes of the relevant subfolders of a diffusers checkpoint. For example, ``["text_encoder",
            "tokenizer"]`` includes ``text_encoder_2``. If a folder has no such subfolder, its top-level files are used.
        ask_hub: whether to query the Hub for the current commit, with a timeout of 10 seconds.
    """
    root = Path(resolve_checkpoint(checkpoint))
    if not root.exists():
        return _commit(checkpoint, revision, ask_hub)
    if subfolder and (root / subfolder).is_dir():
        root = root / subfolder
        if root.name.startswith(tuple(folders)):  # a text model's folder; its tokenizer is next to it
            root = root.parent
    files = [root]
    if root.is_dir():
        subfolders = [p for p in root.iterdir() if p.is_dir() and p.name.startswith(tuple(folders))]
        files = [f for p in subfolders for f in p.rglob("*")] if subfolders else list(root.iterdir())
    digest = blake2b(digest_size=8)
    for file in sorted(f for f in files if f.is_file() and f.suffix in SUFFIXES):
        digest.update(f"{file.relative_to(root)} {file.stat().st_size} ".encode())
        for block in _blocks(file):
            digest.update(block)
    return digest.hexdigest()


def _blocks(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as content:
        if size <= BLOCK * BLOCKS:
            yield content.read()
            return
        for i in range(BLOCKS):
            content.seek(i * (size - BLOCK) // (BLOCKS - 1))
            yield content.read(BLOCK)


def _commit(repository: str, revision: str | None, ask_hub: bool) -> str | None:
    from huggingface_hub import HfApi, constants

    if revision is not None and len(revision) == 40:
        return f"commit {revision}"
    try:  # the commit that loading would download, even if the branch has moved
        if ask_hub:
            return f"commit {HfApi().model_info(repository, revision=revision, timeout=10).sha}"
    except Exception:  # offline or no access; loading then uses the cache, or raises
        pass
    name = f"models--{repository.replace('/', '--')}"
    reference = Path(constants.HF_HUB_CACHE) / name / "refs" / (revision or "main")
    if reference.is_file():
        return f"commit {reference.read_text().strip()}"
    return None
