"""Recovers synthetic scenes from the pixels of images with matched filters, and checks facts, without a learned model.

Each place of the grid is read alone. The mask of every kind of object (the fraction of each pixel that it covers),
without its constant and linear part, is fitted to the pixels by least squares. The kind whose mask explains most
variance is the object. The fitted amplitude plus the colour of the background is the colour of the object.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from longalign.mini.captions import Caption, Fact
from longalign.mini.scenes import COLOURS, GROUNDS, IMAGE_SIZE, MASK_KEYS, PLACES, Scene, Thing, object_masks

MIN_CONTRAST = 0.12
"""Contrast below which a place counts as empty: Euclidean distance of the RGB colours of object and background, with
values in [0, 1]."""


def read_scenes(images: np.ndarray) -> list[Scene]:
    """Returns the scene that each image shows. Tint and vignette are not recovered; they are 0 in the scenes.

    Args:
        images: ``(b, 3, 64, 64)`` in [0, 1].

    Raises:
        ValueError: if ``images`` has a different shape.
    """
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(f"expected images of shape (b, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), got {images.shape}")
    background = images[:, :, _never_covered()].mean(-1)
    names, palette = tuple(GROUNDS), np.array(list(GROUNDS.values()), np.float32)
    grounds = ((background[:, None] - palette) ** 2).sum(-1).argmin(-1)
    light = (background + 0.05) / (palette[grounds] + 0.05)
    places = [_read_place(images, place, palette[grounds], light) for place in range(len(PLACES))]
    return [
        Scene(tuple(t for place in places if (t := place[i]) is not None), names[grounds[i]])
        for i in range(len(images))
    ]


def _read_place(images: np.ndarray, place: int, ground: np.ndarray, light: np.ndarray) -> list[Thing | None]:
    rows, columns, filters, masks = _filters()[place]
    x = images[:, :, rows, columns].reshape(len(images), 3, -1)
    energy = (filters**2).sum(-1)
    amplitude = np.einsum("bcp,kp->bkc", x, filters) / energy[:, None]
    best = ((amplitude**2).sum(-1) * energy).argmax(-1)
    contrast = amplitude[np.arange(len(x)), best]
    # the mean residual of the fit is the ground under the light at this place
    under = (x - contrast[:, :, None] * masks[best][:, None]).mean(-1)
    tint = np.clip((under + 0.05) / (ground + 0.05), 0.6, 1.3) * 0.5 + np.clip(light, 0.6, 1.3) * 0.5
    colour = (under + contrast) / tint
    names, palette = tuple(COLOURS), np.array(list(COLOURS.values()), np.float32)
    nearest = ((colour[:, None] - palette) ** 2).sum(-1).argmin(-1)
    out: list[Thing | None] = []
    for i, kind in enumerate(best):
        shape, size, fill = MASK_KEYS[kind]
        empty = np.linalg.norm(contrast[i]) < MIN_CONTRAST
        out.append(None if empty else Thing(PLACES[place], shape, names[nearest[i]], size, fill))
    return out


@cache
def _never_covered() -> np.ndarray:
    """Returns the mask of pixels that no object can cover: bool ``(64, 64)``."""
    return object_masks().max((0, 1)) < 1e-3


@cache
def _filters() -> list[tuple[slice, slice, np.ndarray, np.ndarray]]:
    """Returns for each place: its rows and columns of the image, the filters ``(30, p)``, and the masks ``(30, p)``.

    A filter is the mask of a kind of object (see `MASK_KEYS`) at the place's ``p`` pixels, without its constant and
    linear part.
    """
    edges = [0, 21, 43, 64]
    out = []
    for place in range(len(PLACES)):
        row, column = divmod(place, 3)
        rows, columns = slice(edges[row], edges[row + 1]), slice(edges[column], edges[column + 1])
        masks = object_masks()[place][:, rows, columns]
        y, x = np.mgrid[-1 : 1 : masks.shape[1] * 1j, -1 : 1 : masks.shape[2] * 1j]
        basis, _ = np.linalg.qr(np.stack([np.ones_like(x), x, y], -1).reshape(-1, 3))
        flat = masks.reshape(len(masks), -1)
        out.append((rows, columns, np.float32(flat - flat @ basis @ basis.T), flat))
    return out


def holds(fact: Fact, scene: Scene) -> bool:
    """Returns whether a fact is true of a scene."""
    if fact.kind == "ground":
        return scene.ground == fact.value
    thing = scene.at(fact.place)
    if fact.kind == "empty":
        return thing is None
    return thing is not None and getattr(thing, fact.kind) == fact.value


def verdicts(images: np.ndarray, captions: Sequence[Caption]) -> list[list[list[bool]]]:
    """Returns whether each fact of a caption holds in the image: image -> sentence of its caption -> fact -> bool.

    Args:
        images: ``(b, 3, 64, 64)`` in [0, 1].
        captions: the ``b`` captions.

    Raises:
        ValueError: if the numbers of images and captions differ, or ``images`` has a different shape.
    """
    if len(images) != len(captions):
        raise ValueError(f"expected one caption per image, got {len(images)} images and {len(captions)} captions")
    scenes = read_scenes(images)
    return [
        [[holds(fact, scene) for fact in sentence.facts] for sentence in caption.sentences]
        for scene, caption in zip(scenes, captions, strict=True)
    ]


def fact_accuracy(images: np.ndarray, captions: Sequence[Caption]) -> np.ndarray:
    """Returns the fraction of the facts of each caption that hold in the image: float64 ``(b,)``, NaN without facts.

    Arguments and errors are those of `verdicts`.
    """
    out = []
    for sentences in verdicts(images, captions):
        flat = [fact_holds for sentence in sentences for fact_holds in sentence]
        out.append(float(np.mean(flat)) if flat else float("nan"))
    return np.array(out)
