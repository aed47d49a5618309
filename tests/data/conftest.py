"""Fixtures of damaged images."""

from io import BytesIO

import pytest
from PIL import Image


@pytest.fixture
def damaged():
    """A PNG with truncated EXIF data, for which Pillow raises neither OSError nor ValueError."""
    buffer = BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG", exif=b"Exif\x00\x00II*\x00")
    return buffer.getvalue()
