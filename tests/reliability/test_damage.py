"""Damaged, invalid and malicious files, for each function that reads files."""

import json
import os
import pickle
import random
import shutil

import pytest
import torch
import worlds

from longalign.checkpoints.checkpoint import load_weights, read_config
from longalign.checkpoints.convert import read_tensors
from longalign.encoders.clip.longclip import read_original
from longalign.encoders.t5.adapter import TextAdapter
from longalign.loop.fit import fit
from longalign.loop.resume_state import load_state
from longalign.registry import backbones, encoders, rewards
from longalign.rewards.hpsv2.weights import read_state
from longalign.testing.tiny import tiny_adapter, tiny_clip, tiny_clip_text, tiny_hpsv2, tiny_sd, tiny_t5

pytestmark = pytest.mark.reliability


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    worlds.register()
    output = tmp_path_factory.mktemp("run")
    yield fit(worlds.align_config(output, steps=1)).checkpoint
    worlds.unregister()


def damages(content, rng, flips=400):
    """Yields descriptions and damaged copies of a file: truncated, extended, or with a flipped bit."""
    for length in sorted({0, 1, 7, 8, 9, 100, len(content) - 1, *(len(content) * i // 12 for i in range(12))}):
        yield f"truncated to {length}", content[:length]
    for extra in (1, 8, 1000):
        yield f"{extra} extra bytes", content + bytes(extra)
    for number in range(flips):
        damaged = bytearray(content)
        # half of the flips are in the first bytes, which contain the headers
        at = rng.randrange(min(len(content), 4000) if number % 2 else len(content))
        damaged[at] ^= 1 << rng.randrange(8)
        yield f"bit of byte {at}", bytes(damaged)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("name", ["longalign.safetensors", "resume/shared.pt", "resume/process-0.pt"])
def test_load_damaged_checkpoint_fails_or_is_unchanged(checkpoint, tmp_path, name):
    copy = tmp_path / "checkpoint-000001"
    shutil.copytree(checkpoint, copy)
    path, original = copy / name, load_state(checkpoint)
    weights = load_weights(checkpoint)
    tensors = [*(lora.state for lora in weights.loras), weights.adapter]
    counts = {"rejected": 0, "unchanged": 0}
    for damage, content in damages((checkpoint / name).read_bytes(), random.Random(0)):
        path.write_bytes(content)
        try:
            state = load_state(copy)
            loaded = load_weights(copy)
            read_config(copy)
        except (ValueError, OSError) as error:
            assert path.name in str(error), damage
            assert "weights_only" not in str(error), damage
            counts["rejected"] += 1
            continue
        # e.g. a flip in an unused field of a zip directory, or in the text of the metadata
        assert equal([*(lora.state for lora in loaded.loras), loaded.adapter], tensors), damage
        assert equal(state.shared["parameters"], original.shared["parameters"]), damage
        assert equal(state.own[0]["torch"], original.own[0]["torch"]), damage
        counts["unchanged"] += 1
    print(name, counts)
    assert counts["rejected"] > 200


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
            assert load_weights(path).loras == []  # a checkpoint without weights
        except (ValueError, OSError) as error:
            assert path.name in str(error), metadata
    print(len(METADATA), "kinds of metadata")


class Payload:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


def pickle_readers(folder, checkpoint):
    """Yields the path of each file that may be a pickle, and the function that reads it."""
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
    marker = tmp_path / "executed"
    calls = {"mkdir": (os.mkdir, (str(marker),)), "eval": (eval, (f"__import__('os').mkdir({str(marker)!r})",))}
    tried = 0
    for path, read in pickle_readers(tmp_path, checkpoint):
        path.parent.mkdir(parents=True, exist_ok=True)
        for call in calls.values():
            for raw in (False, True):
                content = {"state_dict": {"a": Payload(call)}, "b": [Payload(call)]}
                path.write_bytes(pickle.dumps(content, protocol=2)) if raw else torch.save(content, path)
                with pytest.raises((ValueError, OSError)) as caught:
                    read()
                assert "weights_only" not in str(caught.value), (path, str(caught.value))
                assert not marker.exists(), path
                tried += 1
    print(tried, "payloads, none executed")
    assert tried == 52
