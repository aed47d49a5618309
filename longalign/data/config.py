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


#: default of `ImagesConfig.multiple_of`, in pixels
MULTIPLE_OF = 64

#: one text or several
Texts = Annotated[tuple[Text, ...], BeforeValidator(_as_tuple, json_schema_input_type=Text | tuple[Text, ...])]


class DataConfig(PartConfig):
    """Base class of data configs. The properties describe the data without loading anything."""

    #: whether the data is preference data: items have two images of one prompt and a preference
    has_pairs: ClassVar[bool] = False

    @property
    def has_images(self) -> bool:
        """Whether items have an image. If not, they have only a prompt."""
        return True

    @property
    def is_stream(self) -> bool:
        """Whether items are read sequentially (`longalign.data.stream.Stream`) instead of by index."""
        return False

    @property
    def image_sizes(self) -> Mapping[str, Sequence[Size]]:
        """Image sizes that the backbone must support: config key -> sizes that the key sets.

        Without sizes to check, the mapping or the list of sizes is empty, e.g. if the backbone's native resolution is
        used.
        """
        return {}

    def for_backbone(self, backbone: BackboneConfig | None) -> Self:
        """Returns this config, or if it sets no image size, a copy with the backbone's native resolution.

        The default is for data that needs no image size, and returns this config unchanged.

        Args:
            backbone: config of the run's backbone; None for a run without one.

        Raises:
            ConfigError: if no image size is set and the native resolution cannot be used: there is no backbone, its
                resolution is unknown, or the resolution does not fit ``multiple_of``.
        """
        return self

    def held_out(self, count: int) -> Self | None:
        """Returns the config of ``count`` items of the same kind that are not among the items of this config.

        The default is None: there are no such items.
        """
        return None


class ImagesConfig(DataConfig):
    """Base class of configs of stored images with captions, with the keys for image sizes and unusable images."""

    resolution: PositiveInt | None = None
    """width and height in pixels to which images are resized and centre-cropped; null: the backbone's native
    resolution. Smaller images are scaled up, with a warning.
    """
    max_aspect_ratio: Annotated[float, Field(gt=1)] | None = None
    """largest ratio of the long to the short side of images. Each image is resized and cropped to one of several sizes,
    called buckets: the one of the nearest aspect ratio. A bucket has at most ``resolution`` squared pixels, and all
    images of a batch are of one bucket. null: all images are square.
    """
    multiple_of: PositiveInt | None = None
    """width and height of all image sizes that ``max_aspect_ratio`` allows are multiples of this number of pixels;
    null: 64.
    """
    buckets: Annotated[tuple[ImageSize, ...], Field(min_length=1)] | None = None
    """list of image sizes (buckets) in pixels, e.g. ``[512, 640x384, 384x640]`` (a square, or width x height), instead
    of ``resolution`` and ``max_aspect_ratio``. null: these two keys set the sizes.
    """
    empty: Literal["skip", "keep"] = "skip"
    """what to do with images with an empty caption: "skip" them, or "keep" them as unconditional examples."""
    max_unreadable: NonNegativeInt = 10
    """number of unreadable images, caption files and shards that are tolerated. Each is replaced by the next one, with
    a warning; one more stops the run. Each data loading process counts its own.
    """

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        keys = ("resolution", "max_aspect_ratio", "multiple_of")
        ignored = [key for key in keys if getattr(self, key) is not None]
        if self.buckets is not None and ignored:
            raise ValueError(f"'{ignored[0]}' has no effect with 'buckets'; remove one of them")
        if self.multiple_of is not None and self.max_aspect_ratio is None:
            raise ValueError("'multiple_of' needs 'max_aspect_ratio'; set 'max_aspect_ratio', or remove 'multiple_of'")
        _ = self.sizes
        return self

    @property
    def sizes(self) -> tuple[Size, ...] | None:
        """Image sizes in pixels, one per bucket; None for the backbone's native resolution, which is not known here."""
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
            message = f"{error} (the resolution is the backbone's native one)"
            raise ConfigError([("data.multiple_of", message)]) from None
        return config


def folder_problems(key: str, folder: str | None) -> list[ConfigProblem]:
    """Returns the problems of ``folder``, the value of the config key ``key``: one if it is not an existing folder.

    The list is empty if the folder exists, or ``folder`` is None.
    """
    if folder is None or Path(folder).is_dir():
        return []
    return [(key, f"no folder {folder}; expected an existing folder, relative to the working directory or absolute")]
