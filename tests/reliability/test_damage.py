"""Damaged, foreign and malicious files in each place that reads one."""

import json
import os
import pickle
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_adapter, tiny_clip, tiny_clip_text, tiny_hpsv2, tiny_sd, tiny_t5

sys.path.insert(0, str(Path(__file__).parents[1] / "trainers"))

import worlds

from longalign.checkpoint import load_weights, read_config
from longalign.compose import build_from_config
from longalign.convert import read_tensors
from longalign.encoders.adapter import TextAdapter
from longalign.encoders.longclip import read_original
from longalign.registry import backbones, encoders, rewards
from longalign.rewards.hpsv2 import read_state
from longalign.trainers.resume import load_state

pytestmark = pytest.mark.reliability


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    worlds.register()
    output = tmp_path_factory.mktemp("run")
    yield build_from_config(worlds.align_config(output, steps=1)).fit().checkpoint
    worlds.unregister()


def damages(content, generator, flips=400):
    """Contents that a disk or a transfer may make of a file's content: cut, lengthened, with flipped bits."""
    for length in sorted({0, 1, 7, 8, 9, 100, len(content) - 1, *(len(content) * i // 12 for i in range(12))}):
        yield f"cut to {length}", content[:length]
    for more in (1, 8, 1000):
        yield f"{more} bytes more", content + bytes(more)
    for number in range(flips):
        changed = bytearray(content)
        # half of them in the first bytes, where headers are
        at = generator.randrange(min(len(content), 4000) if number % 2 else len(content))
        changed[at] ^= 1 << generator.randrange(8)
        yield f"bit of byte {at}", bytes(changed)


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("name", ["longalign.safetensors", "resume/shared.pt", "resume/process-0.pt"])
def test_load_damaged_checkpoint_fails_or_is_unchanged(checkpoint, tmp_path, name):
    copy = tmp_path / "checkpoint-000001"
    shutil.copytree(checkpoint, copy)
    path, before = copy / name, load_state(checkpoint)
    weights = load_weights(checkpoint)
    tensors = [*(stack.state for stack in weights.loras), weights.adapter]
    counts = {"named": 0, "unharmed": 0}
    for what, content in damages((checkpoint / name).read_bytes(), random.Random(0)):
        path.write_bytes(content)
        try:
            found = load_state(copy)
            loaded = load_weights(copy)
            read_config(copy)
        except (ValueError, OSError) as error:
            assert path.name in str(error), what
            assert "weights_only" not in str(error), what
            counts["named"] += 1
            continue
        # e.g. a flip in an unused field of a zip's directory, or in the metadata's text
        assert equal([*(stack.state for stack in loaded.loras), loaded.adapter], tensors), what
        assert equal(found.shared["parameters"], before.shared["parameters"]), what
        assert equal(found.own[0]["torch"], before.own[0]["torch"]), what
        counts["unharmed"] += 1
    print(name, counts)
    assert counts["named"] > 200


METADATA = [None, [], 1, "x", {}, {"format": "1"}, {"format": 1}, {"format": "1", "config": "{}", "loras": "[]"}]
METADATA += [{"format": "1", "config": c, "loras": "[]"} for c in ("", "[]", "null", "[" * 5000, "{" * 5000, "\\ud800")]
METADATA += [{"config": 5}, {"config": None}, {"format": "1", "config": "{}", "loras": "null"}, {"a": {"b": 1}}]


def test_read_config_names_file_with_invalid_metadata(tmp_path):
    for number, metadata in enumerate(METADATA):
        path = tmp_path / f"{number}.safetensors"
        header = json.dumps({"__metadata__": metadata}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises((ValueError, OSError)) as caught:
            read_config(path)
        assert path.name in str(caught.value), metadata
        try:
            assert load_weights(path).loras == []  # a checkpoint of nothing
        except (ValueError, OSError) as error:
            assert path.name in str(error), metadata
    print(len(METADATA), "kinds of metadata")


class Payload:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


def places(folder, checkpoint):
    """Each file that may be a pickle: its path and what reads it."""
    copy = folder / "checkpoint-000001"
    shutil.copytree(checkpoint, copy)
    yield copy / "resume" / "shared.pt", lambda: load_state(copy)
    yield copy / "resume" / "process-0.pt", lambda: load_state(copy)
    hpsv2 = tiny_hpsv2(folder / "hpsv2") / "HPS_v2.1_compressed.pt"
    yield hpsv2, lambda: read_state(hpsv2)
    yield hpsv2, lambda: rewards.build({"name": "hpsv2", "checkpoint": str(hpsv2.parent)})
    longclip = folder / "longclip-L.pt"
    yield longclip, lambda: read_original(longclip)
    yield longclip, lambda: encoders.build({"name": "longclip", "checkpoint": str(longclip)})
    lora = folder / "s28750_lora_vis.pt"
    yield lora, lambda: read_tensors(lora)
    adapter = folder / "adapter"
    tiny_adapter(adapter)
    (adapter / "diffusion_pytorch_model.safetensors").unlink(missing_ok=True)
    yield adapter / "diffusion_pytorch_model.bin", lambda: TextAdapter.load(str(adapter))
    clip = tiny_clip(folder / "clip")
    (clip / "model.safetensors").unlink()
    yield clip / "pytorch_model.bin", lambda: rewards.build({"name": "clip", "checkpoint": str(clip)})
    text = tiny_clip_text(folder / "text")
    (text / "text_encoder" / "model.safetensors").unlink()
    segment = {"name": "clip-segment", "checkpoint": str(text)}
    yield text / "text_encoder" / "pytorch_model.bin", lambda: encoders.build(segment)
    t5 = tiny_t5(folder / "t5")
    (t5 / "model.safetensors").unlink()
    yield t5 / "pytorch_model.bin", lambda: encoders.build({"name": "t5", "checkpoint": str(t5)})
    for part in ("unet", "vae"):
        sd = tiny_sd(folder / f"sd-{part}")
        (sd / part / "diffusion_pytorch_model.safetensors").unlink()
        build = lambda sd=sd: backbones.build({"name": "sd", "checkpoint": str(sd)})  # noqa: E731
        yield sd / part / "diffusion_pytorch_model.bin", build


def test_loading_pickles_executes_no_code(checkpoint, tmp_path):
    mark = tmp_path / "executed"
    calls = {"mkdir": (os.mkdir, (str(mark),)), "eval": (eval, (f"__import__('os').mkdir({str(mark)!r})",))}
    tried = 0
    for path, read in places(tmp_path, checkpoint):
        path.parent.mkdir(parents=True, exist_ok=True)
        for call in calls.values():
            for raw in (False, True):
                held = {"state_dict": {"a": Payload(call)}, "b": [Payload(call)]}
                path.write_bytes(pickle.dumps(held, protocol=2)) if raw else torch.save(held, path)
                with pytest.raises((ValueError, OSError)) as caught:
                    read()
                assert "weights_only" not in str(caught.value), (path, str(caught.value))
                assert not mark.exists(), path
                tried += 1
    print(tried, "payloads, none executed")
    assert tried == 52
