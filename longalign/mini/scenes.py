"""Samples and renders synthetic scenes: objects on a three by three grid, at 64 x 64 pixels.

Captions state *facts*: the colour of the background (ground), and for each place of the grid the shape, colour, size
and fill of the object, or that the place is empty. They never describe the *look*: a warm or cold tint and a vignette
(dark corners), which determine the taste in `longalign.mini.preferences`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

IMAGE_SIZE = 64
"""Width and height of an image in pixels."""
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
FILLS = ("solid", "striped", "hollow")
SIZES = {"small": 5.5, "large": 9.6}
"""Name of a size -> half the width of an object in pixels."""
COLOURS = {
    "red": (0.86, 0.12, 0.12),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.98, 0.92, 0.20),
    "green": (0.10, 0.68, 0.20),
    "blue": (0.15, 0.40, 0.96),
    "purple": (0.58, 0.16, 0.75),
    "pink": (1.00, 0.60, 0.80),
    "white": (0.97, 0.97, 0.97),
}
GROUNDS = {
    "black": (0.06, 0.06, 0.06),
    "grey": (0.42, 0.42, 0.42),
    "brown": (0.38, 0.22, 0.10),
    "navy": (0.05, 0.08, 0.32),
    "teal": (0.02, 0.33, 0.33),
}
ATTRIBUTES = ("shape", "colour", "size", "fill")
VALUES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": tuple(SIZES), "fill": FILLS, "ground": tuple(GROUNDS)}
MASK_KEYS = tuple((shape, size, fill) for shape in SHAPES for size in SIZES for fill in FILLS)


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        place: the cell of the grid, one of `PLACES`.
        shape: one of `SHAPES`.
        colour: a key of `COLOURS`.
        size: a key of `SIZES`.
        fill: one of `FILLS`.
    """

    place: str
    shape: str
    colour: str
    size: str
    fill: str


@dataclass(frozen=True)
class Scene:
    """Content of a synthetic image.

    Attributes:
        things: the objects, at most one per grid cell, in the order of `PLACES`.
        ground: name of the background colour, a key of `GROUNDS`.
        tint: -1 (cold) to 1 (warm); not described by captions.
        vignette: 0 (even light) to 1 (dark corners); not described by captions.
    """

    things: tuple[Thing, ...]
    ground: str
    tint: float = 0.0
    vignette: float = 0.0

    def at(self, place: str) -> Thing | None:
        """Returns the object at ``place``, one of `PLACES`; None if the place is empty."""
        return next((t for t in self.things if t.place == place), None)


def sample_scene(rng: np.random.Generator, num_things: tuple[int, int] = (1, 9)) -> Scene:
    """Samples a scene. Its properties, such as the number of objects and their attributes, have uniform distributions.

    Args:
        rng: source of the random numbers.
        num_things: lowest and highest number of objects, both included, each from 0 to 9.

    Raises:
        ValueError: if a number of ``num_things`` is not from 0 to 9, or the lowest is above the highest.
    """
    low, high = num_things
    if not 0 <= low <= high <= len(PLACES):
        raise ValueError(f"expected num_things as (lowest, highest) from 0 to {len(PLACES)}, got {num_things}")
    places = sorted(rng.choice(len(PLACES), int(rng.integers(low, high + 1)), replace=False))
    pick = {a: rng.integers(len(VALUES[a]), size=len(places)) for a in ATTRIBUTES}
    things = tuple(
        Thing(PLACES[place], **{a: VALUES[a][int(pick[a][i])] for a in ATTRIBUTES}) for i, place in enumerate(places)
    )
    ground = VALUES["ground"][int(rng.integers(len(GROUNDS)))]
    return Scene(things, ground, float(rng.uniform(-1, 1)), float(rng.uniform(0, 1)))


def render(scene: Scene) -> np.ndarray:
    """Renders a scene as an RGB image: float32 ``(64, 64, 3)`` in [0, 1]."""
    image = np.broadcast_to(np.array(GROUNDS[scene.ground], np.float32), (IMAGE_SIZE, IMAGE_SIZE, 3)).copy()
    masks = object_masks()
    for thing in scene.things:
        mask = masks[PLACES.index(thing.place), MASK_KEYS.index((thing.shape, thing.size, thing.fill)), :, :, None]
        image += mask * (np.array(COLOURS[thing.colour], np.float32) - image)
    image *= np.array([1 + 0.12 * scene.tint, 1.0, 1 - 0.12 * scene.tint], np.float32)
    image *= 1 - 0.3 * np.float32(scene.vignette) * _radius()[:, :, None] ** 2
    return image.clip(0, 1)


def render_batch(scenes: Sequence[Scene]) -> np.ndarray:
    """Renders ``b`` scenes as RGB images with the channels first: float32 ``(b, 3, 64, 64)`` in [0, 1]."""
    return np.stack([render(scene) for scene in scenes]).transpose(0, 3, 1, 2).copy()


@cache
def object_masks() -> np.ndarray:
    """Returns which fraction of each pixel an object covers, for all objects: float32 ``(9, 30, 64, 64)`` in [0, 1].

    The axes are the place (as in `PLACES`), the kind of object (shape, size and fill as in `MASK_KEYS`), and the row
    and the column of the pixel. A pixel in the faint bands of a striped object has the value 0.3.
    """
    fine = 4
    axis = (np.arange(IMAGE_SIZE * fine, dtype=np.float32) + 0.5) / fine
    out = np.zeros((len(PLACES), len(MASK_KEYS), IMAGE_SIZE, IMAGE_SIZE), np.float32)
    for place in range(len(PLACES)):
        row, column = divmod(place, 3)
        y = (axis - (2 * row + 1) * IMAGE_SIZE / 6)[:, None]
        x = (axis - (2 * column + 1) * IMAGE_SIZE / 6)[None, :]
        for kind, (shape, size, fill) in enumerate(MASK_KEYS):
            half = SIZES[size]
            mask = _inside(shape, x, y, half)
            if fill == "hollow":
                mask = mask & ~_inside(shape, x, y, half - (2.6 if shape == "circle" or shape == "square" else 3.0))
            elif fill == "striped":
                mask = mask * np.where((y + 1.1) % 4.4 < 2.2, 1.0, 0.3)  # faint bands keep the outline readable
            out[place, kind] = mask.reshape(IMAGE_SIZE, fine, IMAGE_SIZE, fine).mean((1, 3))
    return out


def _inside(shape: str, x: np.ndarray, y: np.ndarray, half: float) -> np.ndarray:
    if shape == "circle":
        return x**2 + y**2 < half**2
    if shape == "square":
        return (abs(x) < 0.9 * half) & (abs(y) < 0.9 * half)
    if shape == "triangle":
        return (y < 0.8 * half) & (y > -half + 1.8 * abs(x))
    if shape == "diamond":
        return abs(x) + abs(y) < half
    return ((abs(x) < 0.36 * half) & (abs(y) < half)) | ((abs(y) < 0.36 * half) & (abs(x) < half))


@cache
def _radius() -> np.ndarray:
    """Returns the distance of each pixel from the image centre, 1 in the corners: float32 ``(64, 64)``."""
    axis = (np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5) / IMAGE_SIZE * 2 - 1
    return np.hypot(axis[:, None], axis[None, :]) / np.float32(2**0.5)
