"""Images of the command line: files, or folders written by ``longalign generate``."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from longalign.cli.options import count
from longalign.data.lines import IMAGE_SUFFIXES, inside, read_jsonl, text_of


def images_and_prompts(arguments: Sequence[str]) -> tuple[list[Path], list[str] | None]:
    """Image files, with their prompts if the folder has a ``metadata.jsonl``, else None."""
    paths = [Path(path) for path in arguments]
    if len(paths) == 1 and paths[0].is_dir():
        if (paths[0] / "metadata.jsonl").exists():
            rows = listed_images(paths[0])
            return [path for path, _, _ in rows], [prompt for _, prompt, _ in rows]
        paths = sorted(p for p in paths[0].iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            raise ValueError(f"{arguments[0]} contains no images ({', '.join(IMAGE_SUFFIXES)})")
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no image {path}")
    return paths, None


def listed_images(folder: Path) -> list[tuple[Path, str, Any]]:
    """File, prompt and seed of each image in a folder written by ``longalign generate``."""
    out = []
    for where, row in read_jsonl(folder / "metadata.jsonl"):
        if not isinstance(row.get("file_name"), str):
            raise ValueError(f"{where} has no 'file_name'")
        path = inside(folder, row["file_name"], where)
        if not path.is_file():
            problem = "is not a regular file" if path.exists() else "does not exist"
            raise FileNotFoundError(f"the image {path} of {where} {problem}")
        out.append((path, text_of(row, where), row.get("seed")))
    if not out:
        raise ValueError(f"{folder / 'metadata.jsonl'} lists no images")
    return out


def check_images(paths: Sequence[Path]) -> None:
    """Reads all images in parallel. Raises ValueError that lists the unreadable ones."""
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
        raise ValueError(f"{count(len(problems), 'image')} cannot be read:\n  " + "\n  ".join(problems[:10]) + rest)
