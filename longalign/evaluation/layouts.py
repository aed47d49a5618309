"""Copies the images of a folder to where the official scorer of a prompt set reads them."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from longalign.data.prompts.formats import Prompt
from longalign.data.prompts.sets import PromptSet
from longalign.files.atomic import atomic_write
from longalign.files.lines import inside
from longalign.image_folder import read_images
from longalign.image_io import decode

log = logging.getLogger(__name__)

#: file name of an image of `longalign.image_folder.image_row`: index of the prompt, and seed
_IMAGE = re.compile(r"(\d+)-(\d+)\.png")
_ONEIG_FOLDERS = {
    "Anime_Stylization": "anime",
    "Portrait": "human",
    "General_Object": "object",
    "Text_Rendering": "text",
    "Knowledge_Reasoning": "reasoning",
    "Multilingualism": "multilingualism",
}


@dataclass(frozen=True)
class Layout:
    """Where the official scorer of a prompt set reads images.

    Attributes:
        samples: number of images of each prompt that the scorer reads; None for any number.
        path: function (prompt, index of the prompt in the set, index of the image among those of the prompt, name of
            the model) -> path of the image file. All paths contain the model's name, so that models can share a folder.
        grid: whether the four images of a prompt are joined to one image of two rows and two columns.
    """

    samples: int | None
    path: Callable[[Prompt, int, int, str], str]
    grid: bool = False


LAYOUTS = {
    "dpg-bench": Layout(4, lambda prompt, number, sample, model: f"{model}/{prompt.id}.png", grid=True),
    "unigenbench": Layout(
        4, lambda prompt, number, sample, model: f"{model}_{prompt.labels['length'][0]}/{prompt.pair}_{sample}.png"
    ),
    "longbench-t2i": Layout(
        1, lambda prompt, number, sample, model: f"outputs/{model}/{number}/step0/generated_image_0.jpg"
    ),
    "detailmaster": Layout(1, lambda prompt, number, sample, model: f"{model}/{number:05d}.png"),
    "tiif": Layout(
        1,
        lambda prompt, number, sample, model: (
            f"{prompt.row['type']}/{model}/{prompt.row['length']}_description/{prompt.row['index']}.png"
        ),
    ),
    "geneval": Layout(None, lambda prompt, number, sample, model: f"{model}/{number:05d}/samples/{sample:04d}.png"),
    "oneig": Layout(
        4,
        lambda prompt, number, sample, model: f"{_oneig_folder(prompt)}/{model}/{prompt.id.split('/')[1]}.webp",
        grid=True,
    ),
}
"""Name of the prompt set -> layout."""


def _oneig_folder(prompt: Prompt) -> str:
    category = prompt.row["category"]
    if category not in _ONEIG_FOLDERS:
        raise ValueError(
            f"the prompt {prompt.id} has the category {category!r}; expected one of {', '.join(_ONEIG_FOLDERS)}. "
            "Correct its row in the prompt set"
        )
    return _ONEIG_FOLDERS[category]


def arrange(images: Path | str, prompts: PromptSet, output: Path | str, model: str) -> list[Path]:
    """Copies images to where the official scorer of their prompt set reads them.

    Where the scorer reads single PNG files, files are copied unchanged; otherwise images are converted or joined. If a
    prompt has more images than the scorer reads, its first images are used, in the order of ``metadata.jsonl``. Prompts
    without images are skipped. Both cases log a warning. Files of an earlier call are replaced, so that an interrupted
    call can be repeated.

    Args:
        images: a folder that ``longalign generate`` wrote for these prompts.
        prompts: the prompt set.
        output: folder for the copies; created if missing.
        model: name of the model, which is part of all paths. It must be valid as the name of a folder.

    Returns:
        The paths of the written images.

    Raises:
        ValueError: if the set has no layout (see `LAYOUTS`), ``model`` is invalid, or the folder was generated from
            different prompts. Also if two images would have the same path, a prompt has fewer images than the scorer
            reads, or images to be joined differ in size.
        FileNotFoundError: if an image or the list of images does not exist.
    """
    if prompts.name not in LAYOUTS:
        raise ValueError(
            f"no layout for the prompt set '{prompts.name}'; give the prompts of one of the sets {', '.join(LAYOUTS)}"
        )
    if not model or model in (".", "..") or re.search(r"[/\\\\:]", model):
        raise ValueError(
            f"expected a model name that can name a folder: not empty, not . or .., without /, \\ and :; got {model!r}"
        )
    layout, output = LAYOUTS[prompts.name], Path(output)
    by_number = _images_by_number(Path(images), prompts)
    plan = list(_plan(layout, by_number, prompts, model))
    if repeated := [name for name, count in Counter(name.lower() for name, _ in plan).items() if count > 1]:
        raise ValueError(
            f"{len(repeated)} files would be written twice, e.g. {repeated[0]}; make the prompts' ids unique"
        )
    if missing := len(prompts.prompts) - len(by_number):
        log.warning("%d of %d prompts have no images and are skipped", missing, len(prompts.prompts))
    most = max(map(len, by_number.values()))
    if layout.samples and most > layout.samples:
        log.warning("the scorer reads only the first %d of %d images of each prompt", layout.samples, most)
    targets = [inside(output, name) for name, _ in plan]
    for target, (_, sources) in zip(targets, plan, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        _write(target, sources)
    _write_metadata(output, model, prompts, sorted(by_number))
    return targets


def _images_by_number(folder: Path, prompts: PromptSet) -> dict[int, list[Path]]:
    """Returns the images in a folder, as index of the prompt in the set -> files."""
    found: dict[int, list[Path]] = {}
    for path, text, _ in read_images(folder):
        match = _IMAGE.fullmatch(path.name)
        number = int(match[1]) if match else -1
        if not 0 <= number < len(prompts.prompts) or prompts.prompts[number].text != text:
            raise ValueError(
                f"{path} was not generated from this prompt set: the number in the file name and the text fit none of "
                f"its {len(prompts.prompts)} prompts; give the prompts that the images were generated from"
            )
        found.setdefault(number, []).append(path)
    return found


def _plan(
    layout: Layout, images: dict[int, list[Path]], prompts: PromptSet, model: str
) -> Iterator[tuple[str, list[Path]]]:
    """Yields (path of a file to write, images that the file is made of)."""
    for number, paths in sorted(images.items()):
        prompt, samples = prompts.prompts[number], layout.samples or len(paths)
        if len(paths) < samples:
            raise ValueError(
                f"the scorer of {prompts.name} reads {samples} images of each prompt, but prompt {number} "
                f"({prompt.id}) has {len(paths)}; generate with --seed {' '.join(map(str, range(samples)))}"
            )
        if layout.grid:
            yield layout.path(prompt, number, 0, model), paths[:samples]
        else:
            yield from ((layout.path(prompt, number, i, model), [path]) for i, path in enumerate(paths[:samples]))


def _write(target: Path, sources: Sequence[Path]) -> None:
    with atomic_write(target) as unfinished:
        if len(sources) == 1 and target.suffix == sources[0].suffix:
            shutil.copyfile(sources[0], unfinished)
            return
        image = decode(sources[0]) if len(sources) == 1 else _grid(sources)
        if target.suffix == ".jpg":
            image.save(unfinished, "JPEG", quality=95, subsampling=0)
        else:
            image.save(unfinished, target.suffix[1:], lossless=True)  # PNG has no such option and ignores it


def _grid(sources: Sequence[Path]) -> Image.Image:
    """Returns four images of one size as one image, in two rows of two."""
    images = [decode(source) for source in sources]
    width, height = images[0].size
    if any(image.size != (width, height) for image in images):
        raise ValueError(
            f"the images of one prompt have different sizes: {', '.join(map(str, sources))}; generate all in one size"
        )
    grid = Image.new("RGB", (2 * width, 2 * height))
    for i, image in enumerate(images):
        grid.paste(image, (i % 2 * width, i // 2 * height))
    return grid


def _write_metadata(output: Path, model: str, prompts: PromptSet, numbers: Sequence[int]) -> None:
    """Writes the metadata files that the scorer reads beside the images of the prompts with these indices."""
    if prompts.name == "geneval":
        for number in numbers:
            text = json.dumps(prompts.prompts[number].row, ensure_ascii=False) + "\n"
            (output / model / f"{number:05d}" / "metadata.jsonl").write_text(text, encoding="utf-8")
    elif prompts.name == "detailmaster":
        rows = [{"output_image_name": f"{n:05d}.png", "image_id": prompts.prompts[n].id} for n in numbers]
        (output / f"{model}.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
