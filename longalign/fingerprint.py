"""Which weights a part's config stands for, told without loading them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from longalign.runtime import resolve_checkpoint

#: keys of configs that name weights or a vocabulary
KEYS = ("checkpoint", "tokenizer", "layout")
SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt", ".json", ".txt", ".model")
BLOCK, BLOCKS = 4096, 256


def fingerprints(config: Any, folders: Sequence[str], ask_hub: bool = True) -> dict[str, str | None]:
    """A fingerprint for each checkpoint that a config names, by its path in the config.

    Args:
        config: a dumped config.
        folders: how the folders are called that matter of a checkpoint in diffusers layout, e.g. ``["text_encoder",
            "tokenizer"]``, which stands for ``text_encoder_2`` too. Of a folder that has none of them the files at its
            top count.
        ask_hub: whether the hub is asked for its commit, see `fingerprint`.
    """
    return {
        path: fingerprint(name, revision, subfolder, folders, ask_hub)
        for path, name, revision, subfolder in _named("", config)
    }


def _named(path: str, value: Any) -> Iterator[tuple[str, str, str | None, str | None]]:
    if isinstance(value, dict):
        for key, child in value.items():
            here = f"{path}.{key}" if path else key
            if key in KEYS and isinstance(child, str):
                about = value if key == "checkpoint" else {}
                yield here, child, about.get("revision"), about.get("subfolder")
            yield from _named(here, child)
    elif isinstance(value, list):
        for i, child in enumerate(value):
            yield from _named(f"{path}.{i}", child)


def fingerprint(
    checkpoint: str, revision: str | None, subfolder: str | None, folders: Sequence[str], ask_hub: bool = True
) -> str | None:
    """Of local files their names, sizes and a part of their content; of a hub id its commit: the hub's, or without a
    connection, or if it is not to be asked, the one that was downloaded.

    Files up to 1 MiB are read whole, of larger ones 256 blocks spread over the file, which any training changes.

    Returns:
        None for a hub id that is neither within reach nor downloaded to this machine.
    """
    place = Path(resolve_checkpoint(checkpoint))
    if not place.exists():
        return _commit(checkpoint, revision, ask_hub)
    if subfolder and (place / subfolder).is_dir():
        place = place / subfolder
        if place.name.startswith(tuple(folders)):  # a text model's own folder, beside which its tokenizer is
            place = place.parent
    files = [place]
    if place.is_dir():
        wanted = [p for p in place.iterdir() if p.is_dir() and p.name.startswith(tuple(folders))]
        files = [f for p in wanted for f in p.rglob("*")] if wanted else list(place.iterdir())
    digest = blake2b(digest_size=8)
    for file in sorted(f for f in files if f.is_file() and f.suffix in SUFFIXES):
        digest.update(f"{file.relative_to(place)} {file.stat().st_size} ".encode())
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
    try:  # what loading would download, should the branch have moved
        if ask_hub:
            return f"commit {HfApi().model_info(repository, revision=revision, timeout=10).sha}"
    except Exception:  # offline, or no access; loading then takes what is here, or says what is wrong
        pass
    name = f"models--{repository.replace('/', '--')}"
    reference = Path(constants.HF_HUB_CACHE) / name / "refs" / (revision or "main")
    if reference.is_file():
        return f"commit {reference.read_text().strip()}"
    return None
