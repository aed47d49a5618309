"""Differentiable preprocessing of images for vision models: crop, antialiased resize, normalization."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Generator, Tensor
from torch.nn import functional as F

#: mean of CLIP's training images in [0, 1], for red, green and blue; `CLIP_STD` is the standard deviation
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

ASPECTS = ("crop", "pad", "squash")
INTERPOLATIONS = ("bicubic", "bilinear")
CROP_POSITIONS = ("image", "batch")


@dataclass(frozen=True)
class ImagePreprocessor:
    """Preprocesses images for a vision model: random crop, resize and normalization, with gradient.

    Attributes:
        size: height and width of the model's input in pixels.
        mean: mean per channel that is subtracted, for images in [0, 1].
        std: standard deviation per channel by which the difference is divided, for images in [0, 1].
        aspect: how images of a different aspect ratio are resized. ``"crop"`` covers the input and keeps the centre
            (CLIP). ``"pad"`` fits the image into the input and pads it with black (HPSv2). ``"squash"`` scales height
            and width separately (SigLIP).
        crop: side of a random crop before the resize: an int in pixels, or a float as a fraction of each side. None
            disables the crop. A crop discourages reward hacking through blocky artifacts; the LongAlign authors' code
            uses 504 of 512 pixels.
        interpolation: interpolation of the resize, which is antialiased: ``"bicubic"`` (PIL, CLIP's processor) or
            ``"bilinear"`` (LongAlign authors' code).
        crop_position: ``"image"`` crops each image at a different random position, ``"batch"`` all images of a call at
            one position (LongAlign authors' code).

    Raises:
        ValueError: if ``aspect``, ``interpolation`` or ``crop_position`` is not one of these values.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    aspect: str = "crop"
    crop: int | float | None = None
    interpolation: str = "bicubic"
    crop_position: str = "image"

    def __post_init__(self) -> None:
        allowed = {"aspect": ASPECTS, "interpolation": INTERPOLATIONS, "crop_position": CROP_POSITIONS}
        for key, values in allowed.items():
            if getattr(self, key) not in values:
                raise ValueError(f"{key} must be one of {', '.join(values)}, got {getattr(self, key)!r}")

    def __call__(self, images: Tensor, generator: Generator | None = None, random: bool = True) -> Tensor:
        """Maps images ``(b, 3, h, w)`` in [0, 1] to pixels ``(b, 3, *size)``: float32, or float64 for float64 images.

        Args:
            images: images of any resolution; the result is differentiable with respect to the images.
            generator: CPU generator for the crop positions. None uses torch's global generator.
            random: whether to apply the random crop.

        Raises:
            ValueError: if the images have a wrong shape or dtype, or are smaller than the crop.
        """
        check_images(images)
        images = at_least_float32(images)
        if self.crop is not None and random:
            images = random_crop(images, self.crop, generator, self.crop_position)
        images = resize_to_input(images, self.size, self.aspect, self.interpolation)
        mean, std = (rearrange(images.new_tensor(v), "c -> c 1 1") for v in (self.mean, self.std))
        return (images - mean) / std


def at_least_float32(tensor: Tensor) -> Tensor:
    """Casts a tensor to float32, unless it is float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_images(images: Tensor) -> None:
    """Raises ValueError unless ``images`` is a floating-point batch ``(b, 3, h, w)``. Values are not checked."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(
            f"expected float images (b, 3, h, w) in [0, 1], got {images.dtype} of shape {tuple(images.shape)}; "
            "add a batch dimension with images[None], and divide 8-bit images by 255"
        )


class ImageCheck:
    """Callable that checks batches of images ``(b, 3, h, w)``: shape and dtype by `check_images`, then `check_range`.

    On a GPU, the values of the first batch only are checked, because this check synchronizes with the GPU.

    Raises:
        ValueError: when called with images that one of the checks rejects.
    """

    def __init__(self) -> None:
        self._range_checked = False

    def __call__(self, images: Tensor) -> None:
        check_images(images)
        if images.device.type == "cpu" or not self._range_checked:
            check_range(images)
            self._range_checked = True


def check_range(images: Tensor) -> None:
    """Raises ValueError if a value of a batch of images is below -0.1 or above 1.1.

    Images are expected in [0, 1], but bicubic resizing exceeds this range slightly. A batch with a NaN or infinite
    value is not checked.
    """
    if not images.numel():
        return
    low, high = torch.stack(images.detach().aminmax()).tolist()
    if math.isfinite(low + high) and (low < -0.1 or high > 1.1):
        hint = "divide 8-bit values by 255" if high > 3 else "map [-1, 1] by images / 2 + 0.5, or undo normalization"
        raise ValueError(f"expected images in [0, 1], got values from {low:.4g} to {high:.4g}; {hint}")


def random_crop(
    images: Tensor, crop: int | float, generator: Generator | None = None, position: str = "image"
) -> Tensor:
    """Crops images ``(b, c, h, w)`` at random positions.

    Args:
        images: batch of images.
        crop: side of the square crop in pixels (int), or height and width of the crop as a fraction of those of the
            images (float).
        generator: CPU generator. None uses torch's global generator.
        position: ``"image"`` for a position per image, ``"batch"`` for one position for all images.

    Returns:
        The crops, shape ``(b, c, height, width)``.

    Raises:
        ValueError: if the crop is empty or larger than the images.
    """
    size = [crop if isinstance(crop, int) else max(1, round(crop * side)) for side in images.shape[-2:]]
    if not all(0 < target <= side for target, side in zip(size, images.shape[-2:], strict=True)):
        raise ValueError(
            f"cannot crop {size[0]}x{size[1]} pixels from images of {images.shape[-2]}x{images.shape[-1]}; "
            "use a smaller crop, or a fraction such as 0.984"
        )
    height, width = size
    tops, lefts = (
        torch.randint(side - target + 1, (1 if position == "batch" else len(images),), generator=generator).tolist()
        for target, side in zip(size, images.shape[-2:], strict=True)
    )
    if position == "batch":
        return images[..., tops[0] : tops[0] + height, lefts[0] : lefts[0] + width]
    crops = [
        image[:, top : top + height, left : left + width] for image, top, left in zip(images, tops, lefts, strict=True)
    ]
    return torch.stack(crops) if crops else images[..., :height, :width]


def resize_to_input(images: Tensor, size: tuple[int, int], aspect: str, interpolation: str = "bicubic") -> Tensor:
    """Resizes images ``(b, c, h, w)`` to ``(b, c, *size)``. Values are not clamped, so every pixel receives gradient.

    Args:
        images: the images.
        size: height and width of the result in pixels.
        aspect: what to do if the aspect ratio of the images is not that of ``size``: ``"crop"``, ``"pad"`` or
            ``"squash"``; see `ImagePreprocessor`.
        interpolation: ``"bicubic"`` or ``"bilinear"``, with antialiasing.
    """
    height, width = images.shape[-2:]
    if aspect == "squash" or height * size[1] == width * size[0]:
        return resize(images, size, interpolation)
    # rounding as in the published processors; max and min keep the limiting side exact
    if aspect == "crop":
        scale = max(size[0] / height, size[1] / width)
        scaled = max(size[0], int(height * scale)), max(size[1], int(width * scale))
        top, left = round((scaled[0] - size[0]) / 2), round((scaled[1] - size[1]) / 2)
        return resize(images, scaled, interpolation)[..., top : top + size[0], left : left + size[1]]
    scale = min(size[0] / height, size[1] / width)
    scaled = min(size[0], max(1, round(height * scale))), min(size[1], max(1, round(width * scale)))
    top, left = (size[0] - scaled[0]) // 2, (size[1] - scaled[1]) // 2
    border = (left, size[1] - scaled[1] - left, top, size[0] - scaled[0] - top)
    return F.pad(resize(images, scaled, interpolation), border)


def resize(images: Tensor, size: tuple[int, int], interpolation: str = "bicubic") -> Tensor:
    """Resizes images ``(b, c, h, w)`` to height and width ``size`` in pixels, with antialiasing.

    ``interpolation`` is ``"bicubic"``, as in PIL and CLIP's processor, or ``"bilinear"``. Images that already have the
    requested size are returned unchanged. Values are not clamped.
    """
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size, mode=interpolation, align_corners=False, antialias=True)
