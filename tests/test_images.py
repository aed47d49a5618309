import numpy as np
import pytest
import torch
from PIL import Image

from longalign.images import CLIP_MEAN, CLIP_STD, ImagePreprocessor, check_range, random_crop, resize, resize_to_input


def ramp(height: int, width: int) -> torch.Tensor:
    """An image whose values are its column numbers, so that places can be read off."""
    return torch.arange(width, dtype=torch.float32).expand(1, 3, height, width).contiguous()


def test_normalisation_by_hand():
    pixels = ImagePreprocessor((2, 2), mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))(torch.full((1, 3, 2, 2), 0.75))
    assert torch.allclose(pixels[0, :, 0, 0], torch.tensor([0.5, 2.0, 0.375]))


def test_clip_statistics_are_the_default():
    pixels = ImagePreprocessor((1, 1))(torch.ones(1, 3, 1, 1)).flatten()
    assert torch.allclose(pixels, (1 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD))


def test_resize_agrees_with_pil():
    values = np.random.default_rng(0).integers(0, 256, (96, 80, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(values).resize((40, 32), Image.Resampling.BICUBIC)) / 255
    images = torch.from_numpy(values).permute(2, 0, 1)[None].float() / 255
    got = resize(images, (32, 40))[0].permute(1, 2, 0).clamp(0, 1)
    assert (got - torch.from_numpy(expected)).abs().max() < 2 / 255


def test_an_image_of_the_models_size_is_left_as_it_is():
    images = torch.rand(2, 3, 8, 8)
    assert resize_to_input(images, (8, 8)) is images


def test_other_shapes_crop_pad_or_squash():
    wide = ramp(4, 8)
    assert torch.equal(resize_to_input(wide, (4, 4), "crop"), wide[..., 2:6])
    padded = resize_to_input(torch.ones(1, 3, 4, 8), (8, 8), "pad")
    assert torch.equal(padded[0, 0, :, 0], torch.tensor([0.0, 0, 1, 1, 1, 1, 0, 0]))
    squashed = resize_to_input(wide, (4, 4), "squash")
    assert squashed.shape == (1, 3, 4, 4)
    assert squashed[0, 0, 0, 0] < 2 < 5 < squashed[0, 0, 0, -1]


@pytest.mark.parametrize("aspect", ["crop", "pad", "squash"])
@pytest.mark.parametrize("shape", [(17, 64), (64, 17), (33, 32), (1, 1), (223, 224), (299, 301)])
def test_any_resolution_comes_out_in_the_models_size(shape, aspect):
    assert ImagePreprocessor((32, 32), aspect=aspect)(torch.rand(1, 3, *shape)).shape == (1, 3, 32, 32)


def test_gradient_reaches_every_pixel():
    images = torch.rand(2, 3, 20, 20, requires_grad=True)
    ImagePreprocessor((8, 8))(images).square().sum().backward()
    assert images.grad is not None
    assert (images.grad != 0).float().mean() > 0.99


def test_random_crops_are_windows_of_their_own_image():
    images = ramp(8, 16).repeat(4, 1, 1, 1) + 100 * torch.arange(4.0).view(4, 1, 1, 1)
    cut = random_crop(images, 6, torch.Generator().manual_seed(0))
    assert cut.shape == (4, 3, 6, 6)
    assert torch.equal(cut[:, 0, 0, 0] // 100, torch.arange(4.0))
    assert torch.equal(cut.diff(dim=-1), torch.ones(4, 3, 6, 5))
    assert len(cut[:, 0, 0, 0].remainder(100).unique()) > 1
    assert random_crop(images, 0.5).shape == (4, 3, 4, 8)


def test_only_a_random_crop_is_random():
    images = torch.rand(3, 3, 16, 16)
    plain, cropped = ImagePreprocessor((8, 8)), ImagePreprocessor((8, 8), crop=12)
    assert torch.equal(plain(images), plain(images))
    assert torch.equal(cropped(images, random=False), plain(images))
    first, again, other = (cropped(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_double_precision_is_kept():
    assert ImagePreprocessor((4, 4))(torch.rand(1, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64
    assert ImagePreprocessor((4, 4))(torch.rand(1, 3, 8, 8, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("images", [torch.rand(3, 8, 8), torch.rand(1, 4, 8, 8), torch.zeros(1, 3, 8, 8).byte()])
def test_wrong_images_are_refused(images):
    with pytest.raises(ValueError, match=r"\(b, 3, h, w\)"):
        ImagePreprocessor((4, 4))(images)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="aspect must be one of crop, pad, squash"):
        ImagePreprocessor((4, 4), aspect="fill")
    with pytest.raises(ValueError, match=r"between 0 and 1, not 1\.5"):
        ImagePreprocessor((4, 4), crop=1.5)
    with pytest.raises(ValueError, match="at least one pixel"):
        ImagePreprocessor((4, 4), crop=0)
    with pytest.raises(ValueError, match="cannot crop 504x504 pixels from images of 64x64"):
        random_crop(torch.rand(1, 3, 64, 64), 504)


def test_values_far_outside_of_the_range_are_refused():
    check_range(torch.rand(2, 3, 4, 4) * 1.1 - 0.05)  # as a bicubic resize leaves them
    check_range(torch.full((1, 3, 2, 2), float("nan")))  # which the score's own check names
    check_range(torch.rand(0, 3, 4, 4))
    for images, advice in ((torch.rand(1, 3, 4, 4) * 255, "divide 8-bit values by 255"), (ramp(2, 2) * 2 - 1, "-1, 1")):
        with pytest.raises(ValueError, match=rf"in \[0, 1\], got values from .*{advice}"):
            check_range(images)
