"""Base class of data: a map-style dataset of prompts, usually with images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from longalign.caching.store import key_of
from longalign.errors import ConfigError

if TYPE_CHECKING:
    from longalign.config.run import RunConfig
    from longalign.registry import PartConfig


class Data(Dataset[dict[str, Any]]):
    """Base class of map-style data.

    An item is ``{"prompt": str, "image": FloatTensor (3, h, w) in [0, 1]}``; prompt-only data has no ``image``. Item i
    must be the same on every read: seed any randomness with the index, so that a resumed run sees the same data.
    """

    #: whether items have an image
    has_images: bool = True

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def prompt(self, index: int) -> str:
        """Prompt of an item, without loading or rendering its image."""
        return self[index]["prompt"]

    # Used by caches

    def load_item(self, index: int) -> dict[str, Any] | None:
        """Item ``index``, or None if it cannot be read and the next item replaces it."""
        return self[index]

    def image_key(self, index: int) -> bytes:
        """16-byte hash of the content that an item's image is made from."""
        return key_of(self[index]["image"].contiguous().numpy().tobytes())

    def image_stamp(self, index: int) -> int:
        """Cheap change stamp of that content (hash of size and mtime); 0 if the config alone determines the content."""
        return 0


def check_index(index: int, length: int) -> int:
    """Returns ``index`` as a non-negative index. Raises `IndexError` if it is out of range."""
    if not -length <= index < length:
        raise IndexError(f"item {index} is out of range for {length} items")
    return index % length


def resolve_resolution(run: RunConfig) -> PartConfig:
    """Data config of a run, with the backbone's native resolution if ``data.resolution`` is null.

    Raises:
        ConfigError: if the backbone's native resolution is needed and not known.
    """
    config, backbone = run.data, run.backbone
    assert config is not None
    if getattr(config, "resolution", 0) is not None or not getattr(config, "has_images", True):
        return config
    resolution = None if backbone is None else backbone.resolution()
    if resolution is None:
        reason = (
            "no backbone is set" if backbone is None else f"the backbone '{backbone.name}' has no native resolution"
        )
        raise ConfigError([("data.resolution", f"{reason}; set a number of pixels, e.g. 512")])
    return config.model_copy(update={"resolution": resolution})
