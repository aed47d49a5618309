"""Base classes of data configs. Importing this module does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt

from longalign.backbones.config import BackboneConfig
from longalign.errors import ConfigError, ConfigProblem
from longalign.registry import PartConfig

Text = Annotated[str, Field(min_length=1)]


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


#: one text or several
Texts = Annotated[tuple[Text, ...], BeforeValidator(_as_tuple, json_schema_input_type=Text | tuple[Text, ...])]


class DataConfig(PartConfig):
    """Base class of data configs. Its properties describe the data before anything is loaded."""

    #: whether items have two images and a preference
    has_pairs: ClassVar[bool] = False

    @property
    def has_images(self) -> bool:
        """Whether items have an image; otherwise only a prompt."""
        return True

    @property
    def is_stream(self) -> bool:
        """Whether items are read sequentially (`longalign.data.stream.Stream`) instead of by index."""
        return False

    @property
    def image_size(self) -> int | None:
        """Side of the images in pixels; None if it varies, is unknown, or is the backbone's native resolution."""
        return None

    def for_backbone(self, backbone: BackboneConfig | None) -> Self:
        """Returns this config, with the image size of the run's backbone if none is set.

        Raises:
            ConfigError: if the backbone's native resolution is needed and not known.
        """
        return self

    def held_out(self, count: int) -> Self | None:
        """Returns data with ``count`` prompts that are not in this data; None if there is none."""
        return None


class ImagesConfig(DataConfig):
    """Base class of configs of stored images."""

    resolution: PositiveInt | None = None
    """centre-crop and resize images to this many pixels; null: the backbone's native resolution. Smaller images are
    scaled up, with a warning.
    """
    empty: Literal["skip", "keep"] = "skip"
    """what to do with images with an empty caption: "skip" them, or "keep" them as unconditional examples."""
    max_unreadable: NonNegativeInt = 10
    """number of unreadable images, caption files and shards to replace by the next one, each with a warning; one more
    stops the run. Each data loading process counts its own.
    """

    @property
    def image_size(self) -> int | None:
        return self.resolution

    def for_backbone(self, backbone: BackboneConfig | None) -> Self:
        if self.resolution is not None or not self.has_images:
            return self
        resolution = None if backbone is None else backbone.resolution()
        if resolution is None:
            reason = (
                "no backbone is set" if backbone is None else f"the backbone '{backbone.name}' has no native resolution"
            )
            raise ConfigError([("data.resolution", f"{reason}; set a number of pixels, e.g. 512")])
        return self.model_copy(update={"resolution": resolution})


def folder_problems(key: str, folder: str | None) -> list[ConfigProblem]:
    """Returns a list with one problem if the folder of a key does not exist, otherwise an empty list."""
    return [(key, f"no folder {folder}")] if folder is not None and not Path(folder).is_dir() else []
