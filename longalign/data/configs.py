"""Configs of the bundled data; importing this module does not import torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from longalign.registry import PartConfig
from longalign.runtime import Runtime

Text = Annotated[str, Field(min_length=1)]


def _rising(value: tuple[int, int], what: str) -> tuple[int, int]:
    if value[0] > value[1]:
        raise ValueError(f"{what} must be [lowest, highest], got {list(value)}")
    return value


class DataConfig(PartConfig):
    """Base of data configs. ``has_images`` says whether the items have images, or prompts alone."""

    has_images: ClassVar[bool] = True


class ScenesConfig(DataConfig):
    """Scenes of the bundled small world with captions of chosen length; drawn when asked for, nothing is stored.

    Attributes:
        size: number of scenes. Scene i of a seed is always the same one.
        seed: another seed gives other scenes; give held-out sets another one than training sets.
        objects: lowest and highest number of objects in a scene, within 0 and 9.
        words: lowest and highest length aimed at of a caption, in words; each length between is equally likely.
        style: "plain" (each sentence can be read alone), "referring" ("It is red."), or "mixed" (either, evenly).
    """

    name: Literal["scenes"] = "scenes"
    size: PositiveInt = 10_000
    seed: NonNegativeInt = 0
    objects: tuple[Annotated[int, Field(ge=0, le=9)], Annotated[int, Field(ge=0, le=9)]] = (1, 9)
    words: tuple[PositiveInt, PositiveInt] = (20, 250)
    style: Literal["plain", "referring", "mixed"] = "plain"

    @field_validator("objects", "words")
    @classmethod
    def _check_ranges(cls, value: tuple[int, int], info: Any) -> tuple[int, int]:
        return _rising(value, info.field_name)

    def build(self, runtime: Runtime) -> Any:
        from longalign.data.scenes import Scenes

        return Scenes.from_config(self, runtime)


class FolderConfig(DataConfig):
    """Images of a folder, each with a caption, in the layout that ``longalign generate`` writes.

    Attributes:
        folder: the folder; ``metadata.jsonl`` in it has one line per image, with "file_name" and "text" (or "prompt").
        resolution: side in pixels of the square that is cut out of the middle of each image and scaled.
        empty: what to do with an empty caption: "skip" its image, or "keep" it as an unconditional example.
        max_unreadable: how many unreadable images are named in a warning and replaced by the next one in the folder;
            one more stops the run. Each loading process counts its own.
    """

    name: Literal["folder"] = "folder"
    folder: Text
    resolution: PositiveInt = 512
    empty: Literal["skip", "keep"] = "skip"
    max_unreadable: NonNegativeInt = 10

    def build(self, runtime: Runtime) -> Any:
        from longalign.data.folder import Folder

        return Folder.from_config(self, runtime)


class PromptsConfig(DataConfig):
    """Prompts of a file, without images: for reward fine-tuning, which draws its own.

    Attributes:
        file: a .txt file with one prompt per line, or a .jsonl file with "prompt" (or "text") in each line; the latter
            for prompts of several paragraphs.
        empty: what to do with an empty prompt: "skip" or "keep" it.
    """

    has_images: ClassVar[bool] = False

    name: Literal["prompts"] = "prompts"
    file: Text
    empty: Literal["skip", "keep"] = "skip"

    def build(self, runtime: Runtime) -> Any:
        from longalign.data.prompts import Prompts

        return Prompts.from_config(self, runtime)
