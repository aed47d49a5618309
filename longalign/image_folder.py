"""Reads and writes folders of images that are listed in ``metadata.jsonl``. Importing this module imports no torch."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longalign.files.lines import inside, read_csv, read_jsonl, read_text, text_of
from longalign.files.paths import check_folder

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
#: file that lists the images of a folder
INDEX = "metadata.jsonl"


def read_captions(folder: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Reads the captions of a folder of images. The images are not opened.

    The captions are the rows of ``metadata.jsonl`` or ``metadata.csv``. If neither exists, each image in the folder and
    its subfolders has its caption in a ``.txt`` file of the same name; images without one are skipped with a warning.

    Returns:
        ``(location, row)`` for each image, in the order of the file, or sorted by path. ``location`` is a text for
        messages, such as file and line. ``row`` is not checked; in a well-formed file, it has ``file_name``, a path
        relative to the folder, and ``text`` or ``prompt``.

    Raises:
        ValueError: if both ``metadata.jsonl`` and ``metadata.csv`` exist, or a file cannot be read.
        FileNotFoundError: if the folder does not exist or contains no captions.
    """
    lines, table = folder / INDEX, folder / "metadata.csv"
    if lines.exists() and table.exists():
        raise ValueError(f"both {lines} and {table} exist; remove one of them")
    if lines.exists():
        return read_jsonl(lines)
    if table.exists():
        return read_csv(table)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; check the path")
    images = [path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES]
    images = sorted(p for p in images if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    captioned = [path for path in images if path.with_suffix(".txt").is_file()]
    if not captioned:
        raise FileNotFoundError(
            f"no file {lines}; expected one line per image, e.g. "
            '{"file_name": "0001.png", "text": "A red fox."}, or a metadata.csv with these columns, or a .txt of the '
            f"same name next to each image (found for none of {len(images)} images)"
        )
    if len(captioned) < len(images):
        skipped = len(images) - len(captioned)
        log.warning("%d of %d images in %s have no .txt and are skipped", skipped, len(images), folder)
    texts = [path.with_suffix(".txt") for path in captioned]
    return [
        (str(text), {"file_name": str(path.relative_to(folder)), "text": read_text(text)})
        for path, text in zip(captioned, texts, strict=True)
    ]


def read_images(folder: Path) -> list[tuple[Path, str, Any]]:
    """Reads ``metadata.jsonl`` of a folder that ``longalign generate`` wrote. The images are not opened.

    Returns:
        ``(path, prompt, seed)`` for each image, in the order of the lines; the seed is None if a line has none.

    Raises:
        ValueError: if no image is listed, a line is invalid, or a file name leads out of the folder.
        FileNotFoundError: if ``metadata.jsonl`` or an image does not exist.
    """
    out = []
    if not (folder / INDEX).exists():
        raise FileNotFoundError(
            f"no file {folder / INDEX}; expected a folder written by `longalign generate`, or a list of images with "
            'a line {"file_name": "1.png", "prompt": "A red fox.", "seed": 0} for each'
        )
    for where, row in read_jsonl(folder / INDEX):
        if not isinstance(row.get("file_name"), str):
            raise ValueError(f"{where} has no 'file_name'; expected a line written by `longalign generate`")
        path = inside(folder, row["file_name"], where)
        if not path.is_file():
            problem = "is not a regular file" if path.exists() else "does not exist"
            raise FileNotFoundError(f"the image {path} of {where} {problem}; generate it again, or remove the line")
        out.append((path, text_of(row, where), row.get("seed")))
    if not out:
        raise ValueError(f"{folder / INDEX} lists no images; generate them with `longalign generate`")
    return out


def new_index(folder: Path | str, overwrite: bool = False) -> Path:
    """Returns the path of ``metadata.jsonl`` in an output folder, after checking that new images can be written there.

    Nothing is written or removed. The folder need not exist.

    Args:
        folder: the output folder.
        overwrite: whether the file may already list images; the caller then has to replace them.

    Raises:
        ValueError: if the file lists images and ``overwrite`` is False, if ``overwrite`` is True and a line of the file
            is invalid, or if ``folder`` is a file.
    """
    check_folder(Path(folder))
    path = Path(folder) / INDEX
    if overwrite:
        if path.exists():
            list(read_jsonl(path))  # raises if the list of images to replace is unreadable
        return path
    count = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n")) if path.exists() else 0
    if count:
        raise ValueError(
            f"{path} lists {count} image{'s' if count > 1 else ''}; choose an empty folder for the new ones, or remove "
            f"{folder} if an interrupted run left it"
        )
    return path


def remove_listed(index: Path) -> None:
    """Removes the file ``index`` (a ``metadata.jsonl``) and the images in its folder that it lists, if it exists."""
    if not index.exists():
        return
    for _, row in read_jsonl(index):
        name = row.get("file_name")
        if isinstance(name, str) and Path(name).name == name:
            (index.parent / name).unlink(missing_ok=True)
    index.unlink()


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises ValueError if a seed occurs twice, since image files are named by prompt number and seed."""
    if repeated := [seed for seed, count in Counter(seeds).items() if count > 1]:
        raise ValueError(
            f"expected different seeds, got {', '.join(map(str, repeated))} more than once; remove the repeated ones"
        )


def image_row(
    number: int, prompt: str, seed: int, negative: str | None = None, truncated: str | None = None
) -> dict[str, Any]:
    """Returns a row of ``metadata.jsonl``, with the file name ``<number>-<seed>.png``.

    Args:
        number: index of the prompt, from 0; five digits in the file name.
        prompt: the prompt.
        seed: seed of the noise.
        negative: negative prompt; None for none.
        truncated: text dropped from the prompt by truncation; empty if nothing was dropped, None if unknown.
    """
    return {
        "file_name": f"{number:05d}-{seed}.png",
        "prompt": prompt,
        "seed": seed,
        "negative_prompt": negative or "",
        "truncated": truncated,
    }


def append_images(
    folder: Path, rows: Sequence[Mapping[str, Any]], images: Iterable[Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes images into a folder and appends their rows to its ``metadata.jsonl``.

    Args:
        folder: an existing folder.
        rows: an `image_row` for each image.
        images: an image ``(3, h, w)`` in [0, 1] for each row.
        metadata: keyword -> text for the PNG metadata of every image. Prompt, negative prompt, seed and truncated text
            of the image's row are added to it.
    """
    from longalign.image_io import write_png

    for row, image in zip(rows, images, strict=True):
        texts = {key: str(row[key]) for key in ("prompt", "negative_prompt", "seed", "truncated")}
        write_png(folder / row["file_name"], image, {**texts, **metadata})
    with (folder / INDEX).open("a", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_images(
    output: Path | str,
    prompts: Sequence[str],
    sample_batch: Callable[[list[str], list[int]], Tensor],
    *,
    seeds: Sequence[int],
    negative: str | None,
    config: Any,
    settings: Mapping[str, Any],
    truncated: Sequence[str | None] = (),
    batch_size: int = 8,
    progress: bool = False,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Samples an image for every prompt and seed, and writes the images and ``metadata.jsonl`` into a folder.

    Args:
        output: folder for the files. Its ``metadata.jsonl`` must not list images, unless ``overwrite`` is set.
        prompts: the prompts.
        sample_batch: called with b prompts and b seeds; returns images ``(b, 3, h, w)`` in [0, 1].
        seeds: seeds of the noise; one image is sampled per prompt and seed.
        negative: negative prompt, which is only recorded in the metadata; None for none.
        config: config of the generating model, a `RunConfig` or a mapping; only recorded in the metadata.
        settings: sampling settings as JSON values; only recorded in the metadata.
        truncated: for each prompt, the text dropped by truncation (``""``: nothing, None: unknown). An empty sequence
            means unknown for all prompts.
        batch_size: number of images sampled at a time.
        progress: whether to show a progress bar.
        overwrite: whether to replace the images that ``metadata.jsonl`` lists. The old images are removed after the
            first new batch is sampled.

    Returns:
        The rows of ``metadata.jsonl``, one `image_row` per image: all seeds of the first prompt, then of the next.

    Raises:
        ValueError: if a seed occurs twice, or ``metadata.jsonl`` lists images and ``overwrite`` is False.
    """
    from tqdm import tqdm

    check_seeds(seeds)
    output, index = Path(output), new_index(output, overwrite)
    jobs = [(i, seed) for i in range(len(prompts)) for seed in seeds]
    metadata = {"config": _config_text(config), "settings": json.dumps(settings), "software": _version()}
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(jobs), desc="images", disable=not progress) as bar:
        for start in range(0, len(jobs), batch_size):
            batch = jobs[start : start + batch_size]
            images = sample_batch([prompts[i] for i, _ in batch], [seed for _, seed in batch])
            output.mkdir(parents=True, exist_ok=True)  # only now: a failed run leaves no folder
            if not rows:
                remove_listed(index)
            batch_rows = [
                image_row(i, prompts[i], seed, negative, truncated[i] if truncated else None) for i, seed in batch
            ]
            append_images(output, batch_rows, images, metadata)
            rows += batch_rows
            bar.update(len(batch))
    return rows


def _config_text(config: Any) -> str:
    return config.model_dump_json() if hasattr(config, "model_dump_json") else json.dumps(config)


def _version() -> str:
    from importlib.metadata import version

    return f"longalign {version('longalign')}"
