"""Image files of all kinds, and what becomes of those that cannot be read."""

import os
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from longalign.image_io import FORMATS, load_image

RAMP = np.linspace(0, 1, 256)[None].repeat(8, 0)


def written(path, image, **settings):
    image.save(path, **settings)
    return load_image(path)


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_grey_of_16_bits_keeps_its_tones(tmp_path, ending):
    image = Image.fromarray((RAMP * 65535).round().astype(np.uint16))
    found = written(tmp_path / f"a.{ending}", image)
    np.testing.assert_allclose(found.numpy(), RAMP[None].repeat(3, 0), atol=1 / 255)


def test_16_bits_come_in_other_ways_too(tmp_path):
    values = (RAMP * 65535).round().astype(">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 256 8 65535\n" + values.tobytes())
    big = Image.frombytes("I;16B", (256, 8), values.tobytes())
    for found in (load_image(tmp_path / "a.pgm"), written(tmp_path / "b.tiff", big)):
        np.testing.assert_allclose(found.numpy(), RAMP[None].repeat(3, 0), atol=1 / 255)


def test_floats_are_taken_from_0_to_1_alone(tmp_path):
    found = written(tmp_path / "a.tiff", Image.fromarray(RAMP.astype(np.float32)))
    np.testing.assert_allclose(found.numpy(), RAMP[None].repeat(3, 0), atol=1 / 255)
    for values in (RAMP * 255, RAMP - 0.5, RAMP * np.nan):
        with pytest.raises(ValueError, match=r"a\.tiff .* floats from .* expected 0 to 1"):
            written(tmp_path / "a.tiff", Image.fromarray(values.astype(np.float32)))


def test_integers_of_32_bits_have_no_known_range(tmp_path):
    with pytest.raises(ValueError, match="integers of 32 bits"):
        written(tmp_path / "a.tiff", Image.fromarray((RAMP * 2**30).astype(np.int32)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_are_read_as_colours(tmp_path, mode):
    red = Image.new("RGB", (4, 4), (255, 0, 0)).convert("RGBA" if mode in ("LA", "RGBA") else "RGB")
    ending = "tiff" if mode in ("CMYK", "YCbCr") else "png"
    found = written(tmp_path / f"a.{ending}", red.convert(mode))
    assert found.shape == (3, 4, 4)
    if mode not in ("1", "L", "LA"):
        assert found[0].min() > 0.95 and found[1:].max() < 0.05


def test_transparency_is_dropped(tmp_path):
    found = written(tmp_path / "a.png", Image.new("RGBA", (2, 2), (255, 0, 0, 0)))
    assert found[:, 0, 0].tolist() == [1, 0, 0]


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="it is a pipe, not a regular file"):
        load_image(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="it is a folder"):
        load_image(tmp_path)
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "a.png")


def test_too_many_pixels_are_an_error_and_not_a_warning(tmp_path, monkeypatch):
    Image.new("L", (30, 10)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 299)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(ValueError, match=r"30 by 10 pixels .* limit of 299"),
    ):
        load_image(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 149)
    with pytest.raises(ValueError, match="DecompressionBombError"):
        load_image(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(tmp_path / "a.png").shape == (3, 10, 30)


def test_postscript_is_handed_to_no_other_program(tmp_path, monkeypatch):
    """Pillow gives EPS to Ghostscript."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *a, **k: pytest.fail("Ghostscript"))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    os.rename(tmp_path / "a.eps", tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image"):
        load_image(tmp_path / "a.png")
    assert not {"EPS", "PSD", "WMF"} & set(FORMATS)


def test_texts_that_unpack_to_much_are_refused(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("a", " " * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    buffer = BytesIO()
    Image.new("L", (2, 2)).save(buffer, "PNG", pnginfo=info)
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert (tmp_path / "a.png").stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"a\.png"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF"])
def test_damaged_files_are_read_or_named(tmp_path, kind):
    """The long form is in tests/reliability/test_images_and_data.py."""
    buffer = BytesIO()
    Image.fromarray((RAMP * 255).astype(np.uint8)).convert("RGB").save(buffer, kind)
    chance, rejected = np.random.default_rng(0), 0
    for number in range(40):
        content = bytearray(buffer.getvalue())
        at = int(chance.integers(len(content)))
        if number % 2:
            del content[at:]
        else:
            content[at] ^= int(chance.integers(1, 256))
        (tmp_path / "a").write_bytes(content)
        try:
            assert load_image(tmp_path / "a").shape[0] == 3
        except ValueError as error:
            assert f"{tmp_path / 'a'} cannot be read as an image" in str(error)
            rejected += 1
    assert rejected > 5
