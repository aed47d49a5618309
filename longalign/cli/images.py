"""Reads the images given on the command line: files, or folders written by ``longalign generate``."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from longalign.image_folder import IMAGE_SUFFIXES, INDEX, read_images
from longalign.names import count


def images_and_prompts(arguments: Sequence[str]) -> tuple[list[Path], list[str] | None]:
    """Returns the image files given on the command line, and their prompts or None.

    Args:
        arguments: image files, or one folder. If the folder has a ``metadata.jsonl``, that file lists the images and
            prompts. Otherwise the images are all files with a suffix in `IMAGE_SUFFIXES`, and the prompts are None.

    Raises:
        ValueError: if the folder contains no images, or ``metadata.jsonl`` is invalid.
        FileNotFoundError: if a file does not exist.
    """
    paths = [Path(path) for path in arguments]
    if len(paths) == 1 and paths[0].is_dir():
        if (paths[0] / INDEX).exists():
            rows = read_images(paths[0])
            return [path for path, _, _ in rows], [prompt for _, prompt, _ in rows]
        paths = sorted(p for p in paths[0].iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            raise ValueError(f"{arguments[0]} contains no images; give a folder of {', '.join(IMAGE_SUFFIXES)} files")
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no image {path}; expected image files, or one folder of images")
    return paths, None


def check_images(paths: Sequence[Path]) -> None:
    """Reads all images in parallel. Raises ValueError if any cannot be read; the message lists the first 10 of them."""
    from longalign.image_io import load_image

    def problem(path: Path) -> str | None:
        try:
            load_image(path)
        except (OSError, ValueError) as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        problems = [text for text in pool.map(problem, paths) if text]
    if problems:
        rest = f"\n  and {len(problems) - 10} more" if len(problems) > 10 else ""
        lines = "\n  ".join(problems[:10])
        raise ValueError(f"{count(len(problems), 'image')} cannot be read; replace or remove them:\n  {lines}{rest}")
