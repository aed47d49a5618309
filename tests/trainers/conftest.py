import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def world():
    """Registers the parts of `worlds` for one test."""
    import worlds

    worlds.register()
    yield worlds
    worlds.unregister()
