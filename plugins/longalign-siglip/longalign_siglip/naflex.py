"""Images of flexible resolution for the NaFlex checkpoints of SigLIP 2 (arXiv 2502.14786, section 2.4.2)."""

from __future__ import annotations

from dataclasses import dataclass

from longalign.functional import ImagePreprocessor, random_crop
from torch import Generator, Tensor


def grid_size(height: int, width: int, max_num_patches: int) -> tuple[int, int]:
    """Returns the number of rows and columns of the patches of an image of ``height`` by ``width`` pixels.

    The image is scaled by one factor, and both sides are rounded up to whole patches. The factor is the largest one
    that gives at most ``max_num_patches`` patches, as in the published preprocessing.
    """
    # the largest factor makes one side a whole number n of patches; it is proportional to n / side
    patches = range(1, max_num_patches + 1)
    grids = [(n * width, n, -(-width * n // height)) for n in patches]
    grids += [(n * height, -(-height * n // width), n) for n in patches]
    _, rows, columns = max(grid for grid in grids if grid[1] * grid[2] <= max_num_patches)
    return rows, columns


@dataclass(frozen=True)
class NaflexPreprocessor(ImagePreprocessor):
    """Resizes images to whole patches, which changes their aspect ratio only a little, and normalizes them.

    The attributes of `longalign.functional.ImagePreprocessor` apply too, except the size.

    Attributes:
        patch_size: side of a patch in pixels.
        max_num_patches: maximum number of patches of an image.
    """

    patch_size: int = 16
    max_num_patches: int = 256

    def __call__(self, images: Tensor, generator: Generator | None = None, random: bool = True) -> Tensor:
        """Maps images to normalized pixels ``(b, 3, rows * patch_size, columns * patch_size)``; see `grid_size`.

        Args:
            images: ``(b, 3, h, w)`` in [0, 1].
            generator: random generator of the crop; None uses torch's global one.
            random: whether to crop at random if a crop is set; False omits the crop.
        """
        if self.crop is not None and random:
            images = random_crop(images, self.crop, generator, self.crop_position)
        height, width = images.shape[-2:]
        rows, columns = grid_size(height, width, self.max_num_patches)
        size = rows * self.patch_size, columns * self.patch_size
        fixed = ImagePreprocessor(size, self.mean, self.std, self.aspect, interpolation=self.interpolation)
        return fixed(images)


def patchify(pixels: Tensor, patch_size: int) -> Tensor:
    """Cuts images into square patches, row by row.

    Args:
        pixels: ``(b, 3, h, w)`` normalized pixels; h and w are multiples of p.
        patch_size: side p of a patch in pixels.

    Returns:
        ``(b, h w / p^2, 3 p^2)``: each patch as its pixels row by row, with the three channels of each pixel together.
    """
    patches = pixels.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    return patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
