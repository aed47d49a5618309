"""Checkpoint folders of a run: locking, atomic publishing, recovery after kills, damaged files."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from longalign.config.changes import override
from longalign.config.run import load_config
from longalign.files import locks, weights
from longalign.files.locks import Lock
from longalign.files.paths import checkpoints, step_of
from longalign.loop import folder
from longalign.loop.fit import fit


def run(config, resume=None):
    return fit(config, resume=resume)


def names(output):
    return [p.name for p in checkpoints(output)]


def content(output):
    return {
        p.relative_to(output): (p.stat().st_ino, p.stat().st_mtime_ns) for p in output.rglob("*") if p.name != ".lock"
    }


def steps(output):
    return [json.loads(line)["step"] for line in (output / "log.jsonl").read_text().splitlines()]


def test_fit_rejects_locked_folder_until_its_process_is_killed(world, tmp_path):
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); "
    code += "f.write('process 7 on x'); f.flush(); print('locked', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / ".lock")], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline()
        with pytest.raises(ValueError, match=f"process 7 on x is writing to {tmp_path}"):
            run(world.align_config(tmp_path, steps=1))
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]
        other.send_signal(signal.SIGKILL)
    assert run(world.align_config(tmp_path, steps=1)).step == 1
    lock = Lock(tmp_path)  # the run has released it
    assert (tmp_path / ".lock").read_text().startswith("process ")
    lock.release()


def test_fit_releases_lock_after_error(world, tmp_path):
    config = world.align_config(tmp_path, steps=1)
    with pytest.raises(ValueError, match=r"images.*prompts"):
        run({**config, "data": "bare-words"})
    assert run(config).step == 1


def test_lock_warns_on_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise OSError("No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", fail)
    Lock(tmp_path).release()
    assert "No locks available" in caplog.text


def test_fit_starts_and_resumes_in_folder_without_checkpoint(world, tmp_path, caplog):
    for name, resumed in (("started", False), ("resumed", True)):
        output = tmp_path / name
        output.mkdir()
        (output / "log.jsonl").write_text('{"step": 1, "loss": 5}\n{"st')
        result = run(world.align_config(output, steps=2), resume=output if resumed else None)
        assert result.step == 2 and steps(output) == [1, 2]
    assert f"{tmp_path / 'resumed'} yet" in caplog.text
    assert run(world.align_config(tmp_path / "new", steps=1), resume=tmp_path / "new").step == 1
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path / 'nowhere'}.*checkpoint-<step>"):
        run(world.align_config(tmp_path / "other"), resume=tmp_path / "nowhere")


def test_fit_rejects_folder_with_checkpoints_of_another_config(world, tmp_path):
    run(world.align_config(tmp_path, steps=2, log_every=10, save_every=1, keep=None))
    (tmp_path / "log.jsonl").unlink()
    with pytest.raises(ValueError, match=r"loop\.lr: .*0\.01.*0\.5"):
        run(world.align_config(tmp_path, steps=2, log_every=10, save_every=1, keep=None, lr=0.5))
    assert names(tmp_path) == ["checkpoint-000001", "checkpoint-000002"]


def test_prune_keeps_checkpoints_later_than_the_resumed_one(world, tmp_path):
    config = load_config(world.align_config(tmp_path, steps=4, save_every=1, keep=2))
    run(override(config, {"loop.keep": None}))
    run(override(config, {"loop.steps": 3}), resume=tmp_path / "checkpoint-000001")
    assert names(tmp_path) == ["checkpoint-000002", "checkpoint-000003", "checkpoint-000004"]


def test_resume_finished_run_changes_no_file(world, tmp_path):
    config = world.align_config(tmp_path, steps=2)
    run(config)
    before = content(tmp_path)
    result = run(config, resume=tmp_path)
    assert (result.step, result.checkpoint) == (2, tmp_path / "checkpoint-000002")
    assert content(tmp_path) == before


class Killed(BaseException):
    pass


@contextmanager
def killed_at(monkeypatch, number):
    """Context manager: raises `Killed` in place of file operation ``number`` and all later ones; yields the calls."""
    calls = []

    def guard(owner, name):
        real = getattr(owner, name)

        def operation(*args, **kwargs):
            calls.append(name)
            if len(calls) > number:
                raise Killed
            return real(*args, **kwargs)

        patch.setattr(owner, name, operation)

    with monkeypatch.context() as patch:
        for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "chmod"), (Path, "touch"), (Path, "unlink")):
            guard(owner, name)
        for owner, name in ((shutil, "rmtree"), (torch, "save"), (weights, "save_file"), (os, "fsync")):
            guard(owner, name)
        yield calls


def unfinished_checkpoint(output, step, text):
    """Writes an unpublished checkpoint; returns its temporary and final paths."""
    path = output / f".checkpoint-{step:06d}.unfinished" / "resume"
    path.mkdir(parents=True)
    (path / "shared.pt").write_text(text)
    (path.parent / "longalign.safetensors").write_text(text)
    return path.parent, output / f"checkpoint-{step:06d}"


@pytest.mark.parametrize(("step", "keep"), [(3, 1), (3, 2), (2, 1), (2, None)])
def test_publish_killed_midway_keeps_newest_checkpoint(tmp_path, monkeypatch, step, keep):
    number, output = 0, tmp_path
    for number in range(100):
        output = tmp_path / f"{number}"
        for old in (1, 2):
            folder.publish(*unfinished_checkpoint(output, old, f"{old}"), None)
        with killed_at(monkeypatch, number) as calls, suppress(Killed):
            folder.publish(*unfinished_checkpoint(output, step, "new"), keep)
        folder.recover(output)
        for checkpoint in checkpoints(output):
            texts = {(checkpoint / name).read_text() for name in ("longalign.safetensors", "resume/shared.pt")}
            assert len(texts) == 1 and texts <= {str(step_of(checkpoint)), "new"}
        assert step_of(checkpoints(output)[-1]) >= 2 and not list(output.glob(".checkpoint*"))
        if len(calls) <= number:
            break
    assert 5 < number < 99
    assert len(checkpoints(output)) == (keep or 2)
    assert (checkpoints(output)[-1] / "longalign.safetensors").read_text() == "new"


def test_recover_restores_checkpoint_being_replaced(world, tmp_path):
    run(world.align_config(tmp_path, steps=1))
    (tmp_path / "checkpoint-000001").rename(tmp_path / ".checkpoint-000001.replaced")
    (tmp_path / ".checkpoint-000001.unfinished").mkdir()
    (tmp_path / ".checkpoint-000000.removed" / "resume").mkdir(parents=True)
    folder.recover(tmp_path)
    assert names(tmp_path) == ["checkpoint-000001"] and not list(tmp_path.glob(".checkpoint*"))


@pytest.mark.parametrize("name", ["longalign.safetensors", "resume/shared.pt", "resume/process-0.pt"])
def test_resume_skips_damaged_checkpoint_with_warning(world, tmp_path, caplog, name):
    config = world.align_config(tmp_path, steps=2, save_every=1)
    run(config)
    damaged = tmp_path / "checkpoint-000002" / name
    damaged.write_bytes(damaged.read_bytes()[:-10])
    with pytest.raises(ValueError, match=Path(name).name):
        run(config, resume=tmp_path / "checkpoint-000002")
    assert run(config, resume=tmp_path).step == 2 and steps(tmp_path) == [1, 2]
    assert any("checkpoint-000002 " in m and str(damaged) in m for m in caplog.messages)
    for checkpoint in checkpoints(tmp_path):
        (checkpoint / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"checkpoint-000002.*{Path(name).name}"):
        run(config, resume=tmp_path)


def test_log_jsonl_damaged_lines_are_removed_with_warning(world, tmp_path, caplog):
    config = load_config(world.align_config(tmp_path, steps=2))
    run(config)
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b"\0" * 40 + b"\n[1]\n\xff{}\n" + b'{"step": 9}\n{"step": 2')
    run(override(config, {"loop.steps": 3}), resume=tmp_path)
    assert steps(tmp_path) == [1, 2, 3]
    messages = [message for message in caplog.messages if "log.jsonl, line" in message]
    assert [int(message.split("line ")[1].split()[0]) for message in messages] == [3, 4, 5, 7]


def test_resume_rejects_changed_data_and_warns_of_changed_versions(world, tmp_path, monkeypatch, caplog):
    config = world.align_config(tmp_path, steps=2)
    run({**config, "loop": {**config["loop"], "steps": 1}})
    with monkeypatch.context() as patch:
        patch.setattr(world.Squares, "__len__", lambda squares: 5)
        with pytest.raises(ValueError, match=r"data\.items: 10 .*5 "):
            run(config, resume=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(world.Squares, "prompt", lambda squares, index: f"other {index}")
        with pytest.raises(ValueError, match=r":\n  data\.prompts: \w+ "):
            run(config, resume=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("longalign.loop.resume_checks.versions", lambda: {"torch": "1.0"})
        assert run(config, resume=tmp_path).step == 2
    (message,) = [m for m in caplog.messages if "results may differ" in m]
    assert torch.__version__.split("+")[0] in message and "with 1.0;" in message


def test_resume_rejects_changed_init_from_weights(world, tmp_path):
    run(world.align_config(tmp_path / "first", steps=1))
    config = {**world.align_config(tmp_path / "second", steps=2, save_every=1), "init_from": str(tmp_path / "first")}
    run({**config, "loop": {**config["loop"], "steps": 1}})
    run(world.align_config(tmp_path / "first", steps=2), resume=tmp_path / "first")
    with pytest.raises(ValueError, match=r"weights\.init_from: \w+"):
        run(config, resume=tmp_path / "second")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        RuntimeError("basic_ios::clear: iostream error"),
    ],
)
def test_save_on_full_disk_raises_and_removes_partial_checkpoint(world, tmp_path, monkeypatch, error):
    config = world.align_config(tmp_path, steps=2, save_every=1)
    run({**config, "loop": {**config["loop"], "steps": 1}})

    def full(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=rf"step 2 .*{tmp_path}.*loop\.keep.*checkpoint-000001 --resume"):
            run(config, resume=tmp_path)
    assert names(tmp_path) == ["checkpoint-000001"] and not list(tmp_path.glob(".checkpoint*"))
    assert run(config, resume=tmp_path).step == 2


def test_resume_prunes_checkpoints_left_by_a_kill(world, tmp_path):
    run(world.align_config(tmp_path, steps=2, save_every=1, keep=None))
    assert run(world.align_config(tmp_path, steps=2, save_every=1, keep=1), resume=tmp_path).step == 2
    assert names(tmp_path) == ["checkpoint-000002"]


def test_checkpoint_contains_no_credentials(world, tmp_path):
    run(world.align_config(tmp_path / "start", steps=1))
    start = str(tmp_path / "start" / "checkpoint-000001")
    config = {**world.align_config(tmp_path / "run", steps=1), "init_from": start, "monitor": None}
    config["monitor"] = {"prompts": ["see https://me:secret@host/x?token=abc"], "num_steps": 1, "guidance": 1}
    result = run(config)
    assert b"secret" not in (result.checkpoint / "longalign.safetensors").read_bytes()
    assert run(config, resume=result.checkpoint).step == 1
