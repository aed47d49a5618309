"""Test setup: no network access, one thread, and a fixed random seed for each test."""

import gc
import os
import sys
from functools import partial

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin slow down those of the other test processes


def pytest_collection_finish():
    """Exempts the imported modules from garbage collection, which accelerate runs completely at the end of each run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seed():
    """Seeds torch's generator before each test, independent of test order."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def smooth_adamw(monkeypatch):
    """AdamW with an eps far above rounding errors of gradients, so that equivalent runs reach equal weights.

    With the default eps of 1e-8, the sign of a rounding error changes a weight by a full step.
    """
    import torch

    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=1e-2))


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Function that writes a distribution: metadata and modules. Modules named ``fake_*`` are unloaded afterwards."""
    before = set(sys.modules)

    def write(name, entries, version="1.0", requires=(), **modules):
        site = tmp_path / name
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        metadata += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text("\n".join([*metadata, ""]))
        (info / "entry_points.txt").write_text(entries)
        for module, text in modules.items():
            (site / f"{module}.py").write_text(text)
        monkeypatch.syspath_prepend(str(site))

    yield write
    for module in set(sys.modules) - before:
        if module.startswith("fake_"):
            del sys.modules[module]


@pytest.fixture
def brightness():
    """Name of a reward that is registered for one test."""
    from longalign.registry import rewards

    rewards.register("brightness", lambda images, prompts: images.mean((1, 2, 3)))
    yield "brightness"
    rewards.unregister("brightness")


@pytest.fixture
def world():
    """Registers the parts of `worlds` for one test."""
    import worlds

    worlds.register()
    yield worlds
    worlds.unregister()


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A tiny CLIP checkpoint."""
    from longalign.testing.tiny import tiny_clip

    return str(tiny_clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture
def known():
    """An embedding reward with known text embeddings."""
    from toys import TableReward

    return TableReward(
        {"up": [0.6, 0.8, 0.0], "down": [0.6, -0.8, 0.0], "along": [1.0, 0.0, 0.0], "in": [0.0, 0.6, 0.8]}
    )
