import numpy as np
import pytest
import torch
from PIL import Image

from longalign.functional.images import (
    CLIP_MEAN,
    CLIP_STD,
    ImagePreprocessor,
    check_range,
    random_crop,
    resize,
    resize_to_input,
)


def ramp(height: int, width: int) -> torch.Tensor:
    """An image whose values are its column indices, which identify positions."""
    return torch.arange(width, dtype=torch.float32).expand(1, 3, height, width).contiguous()


def test_preprocessor_normalisation_values():
    pixels = ImagePreprocessor((2, 2), mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))(torch.full((1, 3, 2, 2), 0.75))
    assert torch.allclose(pixels[0, :, 0, 0], torch.tensor([0.5, 2.0, 0.375]))


def test_preprocessor_default_statistics_are_clip():
    pixels = ImagePreprocessor((1, 1))(torch.ones(1, 3, 1, 1)).flatten()
    assert torch.allclose(pixels, (1 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resize_equals_pil(interpolation):
    values = np.random.default_rng(0).integers(0, 256, (96, 80, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(values).resize((40, 32), Image.Resampling[interpolation.upper()])) / 255
    images = torch.from_numpy(values).permute(2, 0, 1)[None].float() / 255
    got = resize(images, (32, 40), interpolation)[0].permute(1, 2, 0).clamp(0, 1)
    assert (got - torch.from_numpy(expected)).abs().max() < 2 / 255


def test_resize_to_input_returns_same_size_unchanged():
    images = torch.rand(2, 3, 8, 8)
    assert resize_to_input(images, (8, 8), "crop") is images


def test_resize_to_input_crop_pad_squash():
    wide = ramp(4, 8)
    assert torch.equal(resize_to_input(wide, (4, 4), "crop"), wide[..., 2:6])
    padded = resize_to_input(torch.ones(1, 3, 4, 8), (8, 8), "pad")
    assert torch.equal(padded[0, 0, :, 0], torch.tensor([0.0, 0, 1, 1, 1, 1, 0, 0]))
    squashed = resize_to_input(wide, (4, 4), "squash")
    assert squashed.shape == (1, 3, 4, 4)
    assert squashed[0, 0, 0, 0] < 2 < 5 < squashed[0, 0, 0, -1]


@pytest.mark.parametrize("aspect", ["crop", "pad", "squash"])
@pytest.mark.parametrize("shape", [(17, 64), (64, 17), (33, 32), (1, 1), (223, 224), (299, 301)])
def test_preprocessor_output_size_for_any_resolution(shape, aspect):
    assert ImagePreprocessor((32, 32), aspect=aspect)(torch.rand(1, 3, *shape)).shape == (1, 3, 32, 32)


def test_preprocessor_gradient_reaches_every_pixel():
    images = torch.rand(2, 3, 20, 20, requires_grad=True)
    ImagePreprocessor((8, 8))(images).square().sum().backward()
    assert images.grad is not None
    assert (images.grad != 0).float().mean() > 0.99


def test_random_crop_positions_differ_per_image():
    images = ramp(8, 16).repeat(4, 1, 1, 1) + 100 * torch.arange(4.0).view(4, 1, 1, 1)
    crops = random_crop(images, 6, torch.Generator().manual_seed(0))
    assert crops.shape == (4, 3, 6, 6)
    assert torch.equal(crops[:, 0, 0, 0] // 100, torch.arange(4.0))
    assert torch.equal(crops.diff(dim=-1), torch.ones(4, 3, 6, 5))
    assert len(crops[:, 0, 0, 0].remainder(100).unique()) > 1
    assert random_crop(images, 0.5).shape == (4, 3, 4, 8)


def test_random_crop_of_batch_is_at_one_position():
    images = ramp(8, 16).repeat(5, 1, 1, 1)
    crops = random_crop(images, 6, torch.Generator().manual_seed(0), "batch")
    assert crops.shape == (5, 3, 6, 6) and len(crops[:, 0, 0, 0].unique()) == 1
    lefts = {random_crop(images, 6, position="batch")[0, 0, 0, 0].item() for _ in range(20)}
    assert len(lefts) > 1


def test_preprocessor_random_only_with_random_crop():
    images = torch.rand(3, 3, 16, 16)
    plain, cropped = ImagePreprocessor((8, 8)), ImagePreprocessor((8, 8), crop=12)
    assert torch.equal(plain(images), plain(images))
    assert torch.equal(cropped(images, random=False), plain(images))
    crops, same_seed, other_seed = (cropped(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(crops, same_seed)
    assert not torch.equal(crops, other_seed)


def test_preprocessor_keeps_float64():
    assert ImagePreprocessor((4, 4))(torch.rand(1, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64
    assert ImagePreprocessor((4, 4))(torch.rand(1, 3, 8, 8, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("images", [torch.rand(3, 8, 8), torch.rand(1, 4, 8, 8), torch.zeros(1, 3, 8, 8).byte()])
def test_preprocessor_rejects_wrong_shape_or_dtype(images):
    with pytest.raises(ValueError, match=r"\(b, 3, h, w\)"):
        ImagePreprocessor((4, 4))(images)


def test_preprocessor_and_random_crop_reject_wrong_settings():
    with pytest.raises(ValueError, match=r"aspect.*crop, pad, squash.*'fill'"):
        ImagePreprocessor((4, 4), aspect="fill")
    with pytest.raises(ValueError, match=r"interpolation.*bicubic, bilinear.*'nearest'"):
        ImagePreprocessor((4, 4), interpolation="nearest")
    for crop, pixels in ((504, "504x504"), (0, "0x0"), (1.5, "96x96")):
        with pytest.raises(ValueError, match=rf"{pixels} .*64x64"):
            random_crop(torch.rand(1, 3, 64, 64), crop)


def test_check_range_rejects_values_far_outside():
    check_range(torch.rand(2, 3, 4, 4) * 1.1 - 0.05)  # a bicubic resize may overshoot
    check_range(torch.full((1, 3, 2, 2), float("nan")))  # reported by the check of scores
    check_range(torch.rand(0, 3, 4, 4))
    for images, hint in ((torch.rand(1, 3, 4, 4) * 255, "255"), (ramp(2, 2) * 2 - 1, r"\[-1, 1\]")):
        with pytest.raises(ValueError, match=rf"\[0, 1\], got .*{hint}"):
            check_range(images)
