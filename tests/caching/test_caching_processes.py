"""Building one cache in several processes: separate shards, the content of a single process, interruptions."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from longalign.caching import precompute as caching
from longalign.compose import build_from_config
from longalign.config.changes import override
from longalign.config.run import load_config, to_yaml
from longalign.data.cached import UNREADABLE, read_items
from longalign.files import store
from longalign.image_io import write_png
from longalign.runtime import Runtime
from longalign.testing.tiny import tiny_sd

CAPTIONS = ("A red fox sleeps on a wall.", "A wall.", "The sky.", "A fox is red.", "A fox.", "The sky is red.", "Red.")
BROKEN = 3
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "longalign"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run on seven images, one of them unreadable; the tests set the cache folder."""
    folder = tmp_path_factory.mktemp("run")
    tiny_sd(folder / "sd")
    images = folder / "images"
    images.mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(len(CAPTIONS)):
        write_png(images / f"{i}.png", torch.rand(3, 20, 24, generator=generator))
    (images / f"{BROKEN}.png").write_bytes(b"no image")
    rows = [json.dumps({"file_name": f"{i}.png", "text": caption}) for i, caption in enumerate(CAPTIONS)]
    (images / "metadata.jsonl").write_text("\n".join(rows))
    return load_config(
        {
            "backbone": {"name": "sd", "checkpoint": str(folder / "sd")},
            "encoder": {"name": "clip-segment", "checkpoint": str(folder / "sd"), "max_tokens": 40},
            "trainer": {"name": "align", "lora": {"rank": 2}},
            "data": {"name": "folder", "folder": str(images), "resolution": 16},
            "cache": {"folder": str(folder / "cache")},
            "output": str(folder / "output"),
        }
    )


PARTS = {"latents": len(CAPTIONS) - 1, "prompts-clip-segment": len(CAPTIONS) + 1}


def cache_in(config, folder):
    return override(config, {"cache.folder": str(folder)})


@pytest.fixture(scope="module")
def reference(config, tmp_path_factory):
    """The cache built by a single process."""
    folder = tmp_path_factory.mktemp("reference")
    assert caching.make_caches(cache_in(config, folder), Runtime(), 2) == {part: (n, n) for part, n in PARTS.items()}
    return folder


def assert_same(folder, expected):
    for part, count in PARTS.items():
        identity = json.loads((folder / part / "identity.json").read_text())
        assert identity == json.loads((expected / part / "identity.json").read_text())
        del identity["format"]
        ours, theirs = (store.Store(home / part, identity) for home in (folder, expected))
        assert set(ours) == set(theirs) and len(ours) == count
        for key in theirs:
            for name, tensor in theirs[key].items():
                torch.testing.assert_close(ours[key][name], tensor, rtol=1e-4, atol=1e-5)
    (keys, stamps, _), (their_keys, their_stamps, _) = (read_items(home / "latents") for home in (folder, expected))
    assert keys == their_keys and torch.equal(stamps, their_stamps)
    assert [i for i, key in enumerate(keys) if key == UNREADABLE] == [BROKEN]


class ProcessThreads:
    """Simulates processes with threads; one runs at a time, until it waits for the others in ``gather``."""

    def __init__(self, processes):
        self.processes, self.gathered = processes, [None] * processes
        self.turn, self.barrier = threading.Lock(), threading.Barrier(processes, timeout=300)

    def run(self, call):
        with ThreadPoolExecutor(self.processes) as pool:
            return list(pool.map(lambda rank: self._run_rank(call, rank), range(self.processes)))

    def _run_rank(self, call, rank):
        def gather(tensor):
            self.gathered[rank] = tensor
            self.turn.release()
            self.barrier.wait()
            result = torch.cat(self.gathered)
            self.barrier.wait()
            self.turn.acquire()
            return result

        threading.current_thread().name = f"process {rank}"
        with self.turn:
            return call(Runtime(gather=gather, rank=rank, world_size=self.processes))


@pytest.mark.parametrize("interrupted", [False, True])
def test_make_caches_in_threads_writes_separate_shards(config, reference, tmp_path, monkeypatch, interrupted):
    """One entry per shard; with ``interrupted``, a first call stops after three shards."""
    config, real, saved = cache_in(config, tmp_path), store.save_tensors, []

    def save(path, tensors):
        if interrupted and threading.current_thread() is threading.main_thread() and len(saved) == 3:
            raise KeyboardInterrupt
        saved.append((threading.current_thread().name, path.parent.name, path.name))
        real(path, tensors)

    monkeypatch.setattr(store, "save_tensors", save)
    before = {}
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            caching.make_caches(config, Runtime(), 1, shard_bytes=1)
        saved.clear()
        before = {path: path.read_bytes() for path in tmp_path.glob("*/0*.safetensors")}
        assert len(before) == 3
    counts = ProcessThreads(3).run(lambda runtime: caching.make_caches(config, runtime, 1, shard_bytes=1))
    new = {"latents": PARTS["latents"] - len(before), "prompts-clip-segment": PARTS["prompts-clip-segment"]}
    assert counts == [{part: (PARTS[part], new[part]) for part in PARTS}] * 3
    assert len(saved) == sum(new.values()) == len({(part, name) for _, part, name in saved})
    assert {thread for thread, _, _ in saved} == {f"process {rank}" for rank in range(3)}
    assert all(path.read_bytes() == content for path, content in before.items())
    monkeypatch.undo()
    assert_same(tmp_path, reference)
    again = ProcessThreads(2).run(lambda runtime: caching.make_caches(config, runtime, 4))
    assert again == [{part: (n, 0) for part, n in PARTS.items()}] * 2


def test_make_caches_with_more_processes_than_items(config, reference, tmp_path):
    ProcessThreads(len(CAPTIONS) + 3).run(lambda runtime: caching.make_caches(cache_in(config, tmp_path), runtime, 16))
    assert_same(tmp_path, reference)


@pytest.mark.processes
def test_cache_command_in_two_processes(config, reference, tmp_path):
    config = cache_in(config, tmp_path / "cache")
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = str(Path(caching.__file__).parents[2])
    done = subprocess.run(
        [*LAUNCH, "cache", str(tmp_path / "run.yaml"), "--batch", "1"],
        env=environment, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for part, count in PARTS.items():
        assert done.stdout.count(f"{part}: {count} entries, {count} of them new") == 1
        shards = sorted((tmp_path / "cache" / part).glob("0*.safetensors"))
        assert [path.stem for path in shards] == ["000000", "000001"]  # one per process
    assert_same(tmp_path / "cache", reference)
    item = build_from_config(config, Runtime()).data[0]
    assert item["prompt"] == CAPTIONS[0] and item["posterior"].shape == (8, 2, 2)
