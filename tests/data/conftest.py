"""An image that is damaged where Pillow does not expect it."""

from io import BytesIO

import pytest
from PIL import Image


@pytest.fixture
def damaged():
    """A PNG whose EXIF data are cut short, which is no OSError and no ValueError to Pillow."""
    buffer = BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG", exif=b"Exif\x00\x00II*\x00")
    return buffer.getvalue()
