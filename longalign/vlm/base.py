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
    """An 8-bit RGB image, with its hash and its PNG file, which are computed once when first needed.

    Args:
        image: an RGB image of PIL.
    """

    def __init__(self, image: Image.Image):
        self.image = image

    @classmethod
    def of(cls, image: Tensor) -> HashedImage:
        """Returns the image of a tensor ``(3, h, w)`` in [0, 1], rounded to 8 bits."""
        return cls(to_pil(image))

    @cached_property
    def digest(self) -> str:
        """SHA-256 hash of the image's size and 8-bit pixels, in hexadecimal. Does not depend on the PNG encoder."""
        return sha256(repr(self.image.size).encode() + self.image.tobytes()).hexdigest()

    @cached_property
    def png(self) -> bytes:
        """The content of the image as a PNG file."""
        file = BytesIO()
        self.image.save(file, "PNG")
        return file.getvalue()


@dataclass(frozen=True)
class Request:
    """A question about one or more images, with the allowed answers.

    Attributes:
        text: the question, as sent to the model after the images.
        images: the images, in the order in which they are sent.
        options: the allowed answers, e.g. ``("yes", "no")``.
    """

    text: str
    images: tuple[HashedImage, ...]
    options: tuple[str, ...]


class VLM(nn.Module):
    """Base class of vision-language models that answer a `Request` with one of its options.

    It is an ``nn.Module``, so that a metric that is moved to a device takes its local model along.
    """

    #: text that identifies the model and the settings that affect answers, without credentials. Stored answers
    #: (`longalign.vlm.store.StoredAnswers`) are valid for an equal ``identity`` only
    identity: str

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, str | None]]:
        """Yields ``(i, answer)`` for each request ``requests[i]``, as the answers arrive, in any order.

        An answer is one of the request's options, or None if the model's reply contains none of the options.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement answers")


def option_in(reply: str, options: Sequence[str]) -> str | None:
    """Returns the option that occurs first, as a whole word in any case, in the last non-empty line of a reply.

    Returns None if no option occurs. Only the last line is read, because reasoning models give their answer at the end.
    """
    lines = [line for line in reply.splitlines() if line.strip()]
    words = "|".join(map(re.escape, options))
    match = re.search(rf"(?<!\w)(?:{words})(?!\w)", lines[-1], re.IGNORECASE) if lines else None
    return next((o for o in options if match and o.lower() == match[0].lower()), None)
