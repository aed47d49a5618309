"""Reading image files of all formats and modes, and errors for unreadable files."""

import os
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from longalign.image_io import FORMATS, load_image

RAMP = np.linspace(0, 1, 256)[None].repeat(8, 0)


def save_and_load(path, image, **settings):
    image.save(path, **settings)
    return load_image(path)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_load_image_keeps_16_bit_greyscale_tones(tmp_path, suffix):
    image = Image.fromarray((RAMP * 65535).round().astype(np.uint16))
    image = save_and_load(tmp_path / f"a.{suffix}", image)
    np.testing.assert_allclose(image.numpy(), RAMP[None].repeat(3, 0), atol=1 / 255)


def test_load_image_reads_16_bit_pgm_and_big_endian_tiff(tmp_path):
    values = (RAMP * 65535).round().astype(">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 256 8 65535\n" + values.tobytes())
    big = Image.frombytes("I;16B", (256, 8), values.tobytes())
    for image in (load_image(tmp_path / "a.pgm"), save_and_load(tmp_path / "b.tiff", big)):
        np.testing.assert_allclose(image.numpy(), RAMP[None].repeat(3, 0), atol=1 / 255)


def test_load_image_accepts_floats_from_0_to_1_only(tmp_path):
    image = save_and_load(tmp_path / "a.tiff", Image.fromarray(RAMP.astype(np.float32)))
    np.testing.assert_allclose(image.numpy(), RAMP[None].repeat(3, 0), atol=1 / 255)
    for values in (RAMP * 255, RAMP - 0.5, RAMP * np.nan):
        with pytest.raises(ValueError, match=r"a\.tiff.*float.*(\d|nan) to (\d|nan)"):
            save_and_load(tmp_path / "a.tiff", Image.fromarray(values.astype(np.float32)))


def test_load_image_rejects_32_bit_integers(tmp_path):
    with pytest.raises(ValueError, match=r"a\.tiff.*32"):
        save_and_load(tmp_path / "a.tiff", Image.fromarray((RAMP * 2**30).astype(np.int32)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_load_image_converts_other_modes_to_rgb(tmp_path, mode):
    red = Image.new("RGB", (4, 4), (255, 0, 0)).convert("RGBA" if mode in ("LA", "RGBA") else "RGB")
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "YCbCr") else "a.png")
    red.convert(mode).save(path)
    if mode == "YCbCr":
        try:
            with Image.open(path) as image:
                image.load()
        except OSError:
            pytest.skip("Pillow before 12.1 cannot read the YCbCr TIFF that it wrote")
    image = save_and_load(path, red.convert(mode))
    assert image.shape == (3, 4, 4)
    if mode not in ("1", "L", "LA"):
        assert image[0].min() > 0.95 and image[1:].max() < 0.05


def test_load_image_drops_transparency(tmp_path):
    image = save_and_load(tmp_path / "a.png", Image.new("RGBA", (2, 2), (255, 0, 0, 0)))
    assert image[:, 0, 0].tolist() == [1, 0, 0]


def test_load_image_rejects_pipes_and_folders(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png.*regular file.*a pipe"):
        load_image(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="a folder"):
        load_image(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "a.png")


def test_load_image_raises_above_max_image_pixels(tmp_path, monkeypatch):
    Image.new("L", (30, 10)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 299)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ValueError, match=r"a\.png.*30 by 10.* 299"),
    ):
        load_image(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 149)
    with pytest.raises(ValueError, match="DecompressionBombError"):
        load_image(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(tmp_path / "a.png").shape == (3, 10, 30)


def test_load_image_never_calls_ghostscript(tmp_path, monkeypatch):
    """Pillow decodes EPS with Ghostscript."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **k: pytest.fail("Ghostscript"))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    os.rename(tmp_path / "a.eps", tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png.*identify"):
        load_image(tmp_path / "a.png")
    assert not {"EPS", "PSD", "WMF"} & set(FORMATS)


def test_load_image_rejects_oversized_png_text(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("a", " " * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    buffer = BytesIO()
    Image.new("L", (2, 2)).save(buffer, "PNG", pnginfo=info)
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert (tmp_path / "a.png").stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"a\.png"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF"])
def test_load_image_reads_damaged_files_or_names_them(tmp_path, kind):
    """tests/reliability/test_images_and_data.py has a longer version."""
    buffer = BytesIO()
    Image.fromarray((RAMP * 255).astype(np.uint8)).convert("RGB").save(buffer, kind)
    rng, rejected = np.random.default_rng(0), 0
    for number in range(40):
        content = bytearray(buffer.getvalue())
        position = int(rng.integers(len(content)))
        if number % 2:
            del content[position:]
        else:
            content[position] ^= int(rng.integers(1, 256))
        (tmp_path / "a").write_bytes(content)
        try:
            assert load_image(tmp_path / "a").shape[0] == 3
        except ValueError as error:
            assert str(tmp_path / "a") in str(error)
            rejected += 1
    assert rejected > 5
