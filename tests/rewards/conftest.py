"""A tiny HPSv2 checkpoint, built once per session."""

import pytest

from longalign.testing import tiny


@pytest.fixture(scope="session")
def hpsv2_folder(tmp_path_factory):
    return str(tiny.tiny_hpsv2(tmp_path_factory.mktemp("hpsv2")))
