"""Base classes of data configs. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, model_validator

from longalign.backbones.config import BackboneConfig
from longalign.errors import ConfigError, ConfigProblem
from longalign.registry import PartConfig
from longalign.sizes import ImageSize, Size, aspect_buckets, parse_size

Text = Annotated[str, Field(min_length=1)]


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


#: default of `ImagesConfig.multiple_of`
MULTIPLE_OF = 64

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
    def image_sizes(self) -> Mapping[str, Sequence[Size]]:
        """Image sizes that the backbone must support, by the config key that sets them.

        Empty if they are unknown or the backbone's native resolution.
        """
        return {}

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
    """width and height in pixels to which images are resized and centre-cropped; null: the backbone's native
    resolution. Smaller images are scaled up, with a warning.
    """
    max_aspect_ratio: Annotated[float, Field(gt=1)] | None = None
    """largest ratio of the long to the short side of the buckets into which images are sorted. A bucket has at most as
    many pixels as the square of side ``resolution``. An image is resized and cropped to the bucket of the nearest
    aspect ratio, and a batch has images of one bucket. null: all images are square.
    """
    multiple_of: PositiveInt | None = None
    """number of pixels that divides the sides of the buckets of ``max_aspect_ratio``; null: 64."""
    buckets: Annotated[tuple[ImageSize, ...], Field(min_length=1)] | None = None
    """the buckets themselves, e.g. ``[512, 640x384, 384x640]`` (width x height), instead of ``resolution`` and
    ``max_aspect_ratio``.
    """
    empty: Literal["skip", "keep"] = "skip"
    """what to do with images with an empty caption: "skip" them, or "keep" them as unconditional examples."""
    max_unreadable: NonNegativeInt = 10
    """number of unreadable images, caption files and shards to replace by the next one, each with a warning; one more
    stops the run. Each data loading process counts its own.
    """

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        keys = ("resolution", "max_aspect_ratio", "multiple_of")
        ignored = [key for key in keys if getattr(self, key) is not None]
        if self.buckets is not None and ignored:
            raise ValueError(f"'{ignored[0]}' has no effect with 'buckets'; remove one of them")
        if self.multiple_of is not None and self.max_aspect_ratio is None:
            raise ValueError("'multiple_of' needs a 'max_aspect_ratio'; set it or remove 'multiple_of'")
        _ = self.sizes
        return self

    @property
    def sizes(self) -> tuple[Size, ...] | None:
        """Sizes of the images, one per bucket; None for the backbone's native resolution."""
        if self.buckets is not None:
            return tuple(dict.fromkeys(map(parse_size, self.buckets)))
        if self.resolution is None:
            return None
        if self.max_aspect_ratio is None:
            return (Size(self.resolution, self.resolution),)
        return aspect_buckets(self.resolution, self.multiple_of or MULTIPLE_OF, self.max_aspect_ratio)

    @property
    def image_sizes(self) -> Mapping[str, Sequence[Size]]:
        if self.buckets is not None:
            return {"buckets": self.sizes or ()}
        if self.max_aspect_ratio is not None:
            return {"multiple_of": [parse_size(self.multiple_of or MULTIPLE_OF)]}
        return {"resolution": self.sizes or ()}

    def for_backbone(self, backbone: BackboneConfig | None) -> Self:
        if self.resolution is not None or self.buckets is not None or not self.has_images:
            return self
        resolution = None if backbone is None else backbone.resolution()
        if resolution is None:
            reason = (
                "no backbone is set" if backbone is None else f"the backbone '{backbone.name}' has no native resolution"
            )
            raise ConfigError([("data.resolution", f"{reason}; set a number of pixels, e.g. 512")])
        config = self.model_copy(update={"resolution": resolution})
        try:
            _ = config.sizes
        except ValueError as error:
            raise ConfigError([("data.multiple_of", f"{error}; the resolution is the backbone's")]) from None
        return config


def folder_problems(key: str, folder: str | None) -> list[ConfigProblem]:
    """Returns a list with one problem if the folder of a key does not exist, otherwise an empty list."""
    return [(key, f"no folder {folder}")] if folder is not None and not Path(folder).is_dir() else []
