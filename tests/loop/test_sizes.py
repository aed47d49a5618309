"""Runs on images of several shapes: resuming, caches, and sizes that are sampled."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longalign.caching import precompute as caching
from longalign.config.changes import override
from longalign.config.run import load_config
from longalign.image_io import ImageFiles, write_png
from longalign.loop.fit import fit
from longalign.runtime import Runtime

SHAPES = [(8, 8), (16, 4), (9, 9), (20, 5), (8, 9), (18, 4), (4, 15)]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, (width, height) in enumerate(SHAPES):
        write_png(folder / f"{i}.png", torch.rand(3, height, width, generator=torch.Generator().manual_seed(i)))
    rows = [json.dumps({"file_name": f"{i}.png", "text": f"{i}"}) for i in range(len(SHAPES))]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return {"name": "folder", "folder": str(folder), "buckets": [8, "16x4", "4x16"]}


def losses(output):
    return [json.loads(line)["noise_loss"] for line in Path(output, "log.jsonl").read_text().splitlines()]


def test_run_on_buckets_resumes_bit_by_bit_and_from_a_cache(world, images, tmp_path):
    def config(name, **loop):
        made = {**world.align_config(tmp_path / name, steps=6, batch_size=2, save_every=3, **loop), "data": images}
        return load_config(made)

    whole = fit(config("whole"))
    resumed = fit(config("resumed"), resume=tmp_path / "whole" / "checkpoint-000003")
    ours, theirs = (load_file(run.checkpoint / "longalign.safetensors") for run in (whole, resumed))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert losses(tmp_path / "whole")[3:] == losses(tmp_path / "resumed")
    cached = override(config("cached"), {"cache": {"folder": str(tmp_path / "cache"), "prompts": False}})
    assert caching.make_caches(cached, Runtime(), 2)["latents"] == (7, 7)
    assert caching.make_caches(cached, Runtime(), 2)["latents"] == (7, 0)
    fit(cached)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    write_png(Path(images["folder"]) / "0.png", torch.zeros(3, 4, 16))
    with pytest.raises(ValueError, match=r"have changed.*\n.*data\.buckets"):
        fit(override(config("resumed"), {"loop.steps": 8}), resume=tmp_path / "resumed")


def test_reward_run_samples_sizes_and_resumes(world, images, tmp_path):
    trainer = {"resolution": [8, "16x4", "4x16"], "regularizer": "pretraining", "regularizer_weight": 1.0}
    monitor = {"prompts": ["ab"], "num_steps": 1, "size": "16x4", "every": 4}

    def config(name):
        made = world.reward_config(tmp_path / name, trainer, steps=4, batch_size=2, save_every=2)
        return load_config({**made, "data": images, "monitor": monitor})

    whole = fit(config("whole"))
    resumed = fit(config("resumed"), resume=tmp_path / "whole" / "checkpoint-000002")
    ours, theirs = (load_file(run.checkpoint / "longalign.safetensors") for run in (whole, resumed))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    (image,) = ImageFiles([tmp_path / "whole" / "monitor" / "000004" / "00000-0.png"])
    assert image.shape == (3, 4, 16)
