"""No network in tests: a download is a failure, not a delay."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture
def brightness():
    """The name of a reward that is there for one test."""
    from longalign.registry import rewards

    rewards.register("brightness", lambda images, prompts: images.mean((1, 2, 3)))
    yield "brightness"
    rewards.unregister("brightness")
