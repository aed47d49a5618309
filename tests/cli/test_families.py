"""A tiny model of each family is trained, exported, reloaded and sampled by the command line."""

import pytest
import yaml

from longalign.cli.main import main
from longalign.testing import tiny

FAMILIES = {
    "sd": (tiny.tiny_sd, {"name": "clip-segment"}, {}),
    "sdxl": (tiny.tiny_sdxl, {"name": "clip-segment-sdxl"}, {}),
    "sd3": (tiny.tiny_sd3, {"name": "clip-segment-sd3", "width": 32}, {}),
    "flux": (tiny.tiny_flux, {"name": "t5-flux"}, {"image_size": 32}),
    "pixart": (tiny.tiny_pixart, {"name": "t5", "mask": True}, {}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_training_export_and_sampling(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write, encoder, settings = FAMILIES[name]
    checkpoint = str(write(tmp_path / name))
    run = {
        "backbone": {"name": name, "checkpoint": checkpoint, **settings},
        "encoder": {"checkpoint": checkpoint, **encoder},
        "trainer": {"name": "align", "lora": {"rank": 2, "dropout": 0.0}},
        "data": {"name": "scenes", "size": 2},
        "loop": {"steps": 1, "batch_size": 2, "lr": 0.1},
        "output": "run",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert main(["train", "run.yaml"]) == 0
    assert main(["export", "run", "model"]) == 0
    images = ["--prompt", "A fox. A hen.", "--num-steps", "1", "--guidance", "1", "--output", "images"]
    assert main(["generate", "--checkpoint", "model", *images]) == 0
    assert len(list((tmp_path / "images").glob("*.png"))) == 1
