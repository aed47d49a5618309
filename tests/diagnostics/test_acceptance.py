"""The acceptance run of the published checkpoints, with tiny checkpoints in the published layouts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from longsd import write_longsd
from PIL import Image
from transformers import AutoTokenizer

from longalign.diagnostics.acceptance import Acceptance, main, run
from longalign.testing.tiny import (
    tiny_adapter,
    tiny_clip,
    tiny_hpsv2,
    tiny_longclip_file,
    tiny_sd15,
    tiny_t5,
)

SCRIPT = Path(__file__).parents[2] / "examples" / "acceptance.sh"
RANDOM = ("matching prompt", "published score")
"""Checks that random weights satisfy or not by chance."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Environment variables of the script: every checkpoint but PickScore's."""
    folder = tmp_path_factory.mktemp("published")
    write_longsd(folder / "LongSD")
    sd15 = tiny_sd15(folder / "sd15")
    tiny_adapter(folder / "LaVi-Bridge" / "t5_unet" / "adapter")
    for version in ("v2", "v2.1"):
        tiny_hpsv2(folder / "HPSv2", f"HPS_{version}_compressed.pt")
    (folder / "LongCLIP").mkdir()
    vocabulary = len(AutoTokenizer.from_pretrained(sd15 / "tokenizer"))
    tiny_longclip_file(folder / "LongCLIP" / "longclip-L.pt", vocabulary)
    Image.new("RGB", (64, 40), (200, 90, 30)).save(folder / "demo_image.jpg")
    return {
        "DENSCORE": str(tiny_clip(folder / "Denscore", tokenizer=False)), "CLIP_H": str(tiny_clip(folder / "CLIP-H")),
        "PICKSCORE": str(folder / "PickScore"), "HPSV2": str(folder / "HPSv2"), "LONGCLIP": str(folder / "LongCLIP"),
        "SD15": str(sd15), "T5": str(tiny_t5(folder / "t5")), "LAVI_BRIDGE": str(folder / "LaVi-Bridge"),
        "LONGSD": str(folder / "LongSD"), "HPS_IMAGES": str(folder),
    }  # fmt: skip


@pytest.mark.processes
def test_acceptance_script_checks_published_layouts(checkpoints, tmp_path):
    settings = {"OUT": str(tmp_path), "DEVICE": "cpu", "NUM_STEPS": "2", "PYTHON": sys.executable}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **checkpoints, **settings}
    done = subprocess.run(
        ["sh", str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode in (0, 1), done.stderr
    rows = json.loads((tmp_path / "acceptance.json").read_text())["rows"]
    wrong = [row for row in rows if row["status"] not in ("ok", "info") and not row["check"].startswith(RANDOM)]
    assert [(row["step"], row["status"]) for row in wrong] == [("pickscore", "missing")], done.stderr
    steps = {row["step"] for row in rows}
    assert steps == {
        "longsd", "sd15", "t5", "longclip", "generate", "denscore", "pickscore", "clip-h", "hpsv2", "hpsv2.1"
    }  # fmt: skip
    checks = [row["check"] for row in rows]
    assert checks.count("scores, generated") == 4 and "published score of demo_image.jpg" in checks
    assert sum(check.startswith("image ") for check in checks) == 3
    assert done.returncode == any(row["status"] == "failed" for row in rows)
    text = (tmp_path / "acceptance.md").read_text()
    assert text in done.stdout and "| longsd | s28750_lora_vis.pt, tensors | ok | 448 | 448 |" in text


def test_acceptance_reports_missing_and_wrong_checkpoints(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "LongSD").mkdir()
    rows = run(
        Acceptance({"longclip": str(empty), "sd15": checkpoints["T5"]}, tmp_path, "cpu"), ["longclip", "sd15", "t5"]
    )
    results = {step: (row.status, row.result) for step, row in rows}
    assert results["longclip"][0] == "missing" and "longclip-L.pt" in results["longclip"][1]
    assert results["sd15"][0] == "missing" and "unet/config.json" in results["sd15"][1]
    assert results["t5"][0] == "missing" and "HF_HUB_OFFLINE" in results["t5"][1]
    with pytest.raises(SystemExit):
        main(["densscore=x"])


def test_acceptance_fails_for_damaged_lists(checkpoints, tmp_path):
    import torch

    source = write_longsd(tmp_path / "LongSD")
    tensors = torch.load(source / "s28750_lora_vis.pt")
    torch.save(tensors[:-2], source / "s28750_lora_vis.pt")
    given = {"longsd": str(source), "sd15": checkpoints["SD15"], "t5": checkpoints["T5"]}
    rows = [row for _, row in run(Acceptance(given, tmp_path / "out", "cpu"), ["longsd", "generate"])]
    assert (rows[0].status, rows[0].result) == ("failed", "446")
    assert [row.status for row in rows[-2:]] == ["failed", "missing"] and "446 tensors" in rows[-2].result
