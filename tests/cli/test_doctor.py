import json

import pytest
import torch

from longalign.checkpoints.convert import ADAPTER, LORAS
from longalign.checkpoints.redaction import redact_report
from longalign.cli.main import main
from longalign.diagnostics import installation
from longalign.diagnostics.checks import Unavailable, compare, failed, run_step
from longalign.diagnostics.published import PUBLISHED, local_status
from longalign.rewards.hpsv2.weights import FILES
from longalign.testing.tiny import tiny_clip, tiny_sd


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder with a Hub cache, and the bundled weights replaced by tiny ones."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home" / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:pass@hub.example")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def cached(home, checkpoint, *files):
    folder = home / "hf" / "hub" / f"models--{checkpoint.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    for file in files:
        path = folder / "snapshots" / "abc" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_doctor_reports_environment_files_and_runs(home, tmp_path, capsys):
    tiny_sd(tmp_path / "mini" / "sd", width=128)
    tiny_clip(tmp_path / "mini" / "denscore")
    cached(home, "luping-liu/Denscore", "config.json", "model.safetensors")
    cached(home, "luping-liu/LongSD", "s28750_lora_vis.pt")
    assert main(["doctor", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    rows = dict(line.strip().split(maxsplit=1) for line in text.partition("published files")[0].splitlines()[1:])
    assert rows["torch"] == torch.__version__ and "threads" in rows["cpu"]
    assert "offline, token set" in text and "~/hf/hub" in text and "https://***@hub.example" in text
    assert "hf_abc" not in text and "pass@" not in text and str(home) not in text
    for check in ("packages", "parts", "device", "encode", "score", "train"):
        assert f"  ok      {check}: " in text
    assert local_status()["denscore (luping-liu/Denscore)"] == "found"
    assert "incomplete: s28750_adapter/config.json, sd15-reward-3750.pt" in text and "not found" in text


def test_doctor_json_fails_for_broken_plugin(home, install, capsys):
    install("fake-broken", "[longalign_rewards]\nbroken = fake_broken:Config\n", fake_broken="raise RuntimeError('no')")
    assert main(["doctor", "--no-run", "--json", "--device", "cpu"]) == 1
    report = json.loads(capsys.readouterr().out)
    status = {row["check"]: row["status"] for row in report["checks"]}
    assert status == {"packages": "ok", "parts": "failed", "device": "ok", "torch.compile": "info"}
    (row,) = [row for row in report["checks"] if row["check"] == "parts"]
    assert "broken" in row["result"] and report["environment"]["plugin fake-broken 1.0"] == "rewards/broken"


def test_published_names_match_loaders():
    files = {entry.name: entry.files for entry in PUBLISHED}
    assert (files["hpsv2"], files["hpsv2.1"]) == ((FILES["v2"],), (FILES["v2.1"],))
    assert files["longsd"] == (f"{ADAPTER}/config.json", *(file for file, _ in LORAS.values()))


def test_steps_continue_after_errors():
    def missing():
        yield compare("first", True, "1", "1")
        raise Unavailable("not here")

    def broken():
        raise KeyError("x")

    rows = [row for step in (missing, broken) for row in run_step("step", lambda step=step: step())]
    assert [row.status for row in rows] == ["ok", "missing", "failed"] and failed(rows) and not failed(rows[:2])
    assert rows[2].result == "KeyError: 'x'"


def test_check_packages_names_unmet_requirements(monkeypatch):
    lines = ["torch>=999", 'nothing; extra == "dev"', "no-such-package>=1"]
    monkeypatch.setattr("longalign.diagnostics.environment.metadata.requires", lambda name: lines)
    (row,) = installation.check_packages()
    assert row.status == "failed" and "expected >=999" in row.result and "no-such-package not installed" in row.result
    assert "nothing" not in row.result


def test_redact_report_removes_names_and_tokens(home):
    text = f"{home}/a, /home/ann/b, /Users/bob c, C:\\Users\\Eve\\d, hf_0123456789, http://u:p@host"
    assert redact_report(text) == "~/a, /home/***/b, /Users/*** c, C:\\Users\\***\\d, ***, http://***@host"
