"""No network in tests: a download is a failure, not a delay. One thread, and the same random numbers in each test."""

import os
import sys
from functools import partial

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Each test starts with the same state of torch's generator, whatever ran before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def smooth_adamw(monkeypatch):
    """AdamW with an eps far above what rounding makes of a gradient, so that equal runs reach equal weights. With its
    own, 1e-8, the sign of a rounding error is a whole step."""
    import torch

    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-2))


@pytest.fixture
def brightness():
    """The name of a reward that is there for one test."""
    from longalign.registry import rewards

    rewards.register("brightness", lambda images, prompts: images.mean((1, 2, 3)))
    yield "brightness"
    rewards.unregister("brightness")
