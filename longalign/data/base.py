"""The interface of data: a map-style dataset of prompts, most with an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from longalign.errors import ConfigError
from longalign.store import key_of

if TYPE_CHECKING:
    from longalign.config import RunConfig
    from longalign.registry import PartConfig


class Data(Dataset[dict[str, Any]]):
    """Base of data.

    An item is ``{"prompt": str, "image": FloatTensor (3, h, w) in [0, 1]}``, without ``image`` where there are prompts
    alone. Item i is always the same one: what is random is drawn from the index, so that a resumed run sees what an
    uninterrupted one would have seen.
    """

    #: whether items have images
    has_images: bool = True

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        raise NotImplementedError

    def prompt(self, index: int) -> str:
        """The prompt of an item, without loading or drawing its image."""
        return self[index]["prompt"]

    # What caches ask for

    def load_item(self, index: int) -> dict[str, Any] | None:
        """Item ``index`` itself: None where it cannot be read, so that another takes its place."""
        return self[index]

    def image_key(self, index: int) -> bytes:
        """16 bytes that stand for the content that the image of an item is made from."""
        return key_of(self[index]["image"].contiguous().numpy().tobytes())

    def image_stamp(self, index: int) -> int:
        """A number that tells cheaply whether that content may have changed; 0 where nothing but the config can."""
        return 0


def check_index(index: int, length: int) -> int:
    """The index counted from 0, for one that may be counted from the end. Raises `IndexError`, which ends a loop."""
    if not -length <= index < length:
        raise IndexError(f"item {index} of {length}")
    return index % length


def sized(run: RunConfig) -> PartConfig:
    """The config of a run's data, with the backbone's own resolution where it has none.

    Raises:
        ConfigError: if the backbone does not tell its own.
    """
    config, backbone = run.data, run.backbone
    assert config is not None
    if getattr(config, "resolution", 0) is not None or not getattr(config, "has_images", True):
        return config
    own = getattr(backbone, "resolution", None)
    if own is None:
        who = "there is no backbone" if backbone is None else f"the backbone '{backbone.name}' does not tell its own"
        raise ConfigError([("data.resolution", f"{who}; give a number of pixels, e.g. 512")])
    return config.model_copy(update={"resolution": own() if callable(own) else own})
