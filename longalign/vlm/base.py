"""Interface of vision-language models: requests, and the parsing of replies."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from io import BytesIO

from PIL import Image
from torch import Tensor, nn

from longalign.image_io import to_pil


class HashedImage:
    """An image with its hash and its PNG file, each computed once.

    Args:
        image: an RGB image.
    """

    def __init__(self, image: Image.Image):
        self.image = image

    @classmethod
    def of(cls, image: Tensor) -> HashedImage:
        """Returns the image of a tensor ``(3, h, w)`` in [0, 1]."""
        return cls(to_pil(image))

    @cached_property
    def digest(self) -> str:
        """Hash of size and 8-bit pixels. It does not depend on the PNG encoder."""
        return sha256(repr(self.image.size).encode() + self.image.tobytes()).hexdigest()

    @cached_property
    def png(self) -> bytes:
        """The image as a PNG file."""
        file = BytesIO()
        self.image.save(file, "PNG")
        return file.getvalue()


@dataclass(frozen=True)
class Request:
    """A question about one or more images, with the allowed answers."""

    text: str
    images: tuple[HashedImage, ...]
    options: tuple[str, ...]


class VLM(nn.Module):
    """A vision-language model that answers requests with one of their options.

    A module, so that a local model moves with the metric that uses it.
    """

    #: model and settings that determine the answers, without credentials; part of the key of stored answers
    identity: str

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, str | None]]:
        """Yields ``(index of the request, answer)`` as the answers arrive, in any order.

        An answer is one of the request's options, or None if the reply contains none of them.
        """
        raise NotImplementedError


def option_in(reply: str, options: Sequence[str]) -> str | None:
    """Returns the first option in the last line of a reply, ignoring case and punctuation; None if there is none.

    Only the last line is read, because reasoning models give their answer at the end.
    """
    lines = [line for line in reply.splitlines() if line.strip()]
    words = "|".join(map(re.escape, options))
    match = re.search(rf"(?<!\w)(?:{words})(?!\w)", lines[-1], re.IGNORECASE) if lines else None
    return next((o for o in options if match and o.lower() == match[0].lower()), None)
