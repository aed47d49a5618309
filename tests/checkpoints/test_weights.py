"""Tensor files: atomic writes, reads without code execution, messages on damage."""

import os
import pickle
import re
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from longalign.files import atomic, weights
from longalign.files.weights import load_pickle, load_tensors, reading, save_tensors


class Payload:
    """Runs a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("position", ["root", "nested", "key"])
def test_load_pickle_runs_no_code_and_advises_safetensors(tmp_path, raw, position):
    path, mark = tmp_path / "model.pt", tmp_path / "executed"
    payload = Payload(os.mkdir, str(mark))
    contents = {"root": payload, "nested": {"state_dict": {"a": 1.0, "b": [payload]}}, "key": {payload: 1}}
    if raw:
        path.write_bytes(pickle.dumps(contents[position], protocol=2))
    else:
        torch.save(contents[position], path)
    for checked in {False, not raw}:
        with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
            load_pickle(path, checked)
        assert "mkdir" in str(caught.value) and "code" in str(caught.value)
        assert "weights_only" not in str(caught.value) and caught.value.__cause__ is None
    assert not mark.exists()


@pytest.mark.parametrize("checked", [False, True])
def test_load_pickle_names_damaged_files(tmp_path, checked):
    path = tmp_path / "shared.pt"
    torch.save({"a": torch.randn(500), "step": 3}, path)
    raw_file = path.read_bytes()
    assert load_pickle(path, checked)["step"] == 3
    for size in (0, 1, 100, len(raw_file) // 2, len(raw_file) - 1):
        path.write_bytes(raw_file[:size])
        with pytest.raises(ValueError, match=r"shared\.pt.*damaged"):
            load_pickle(path, checked)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(ValueError, match=r"other\.zip.*damaged"):
        load_pickle(tmp_path / "other.zip", checked)
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        load_pickle(tmp_path / "nothing.pt", checked)


def test_load_detects_flipped_bits(tmp_path):
    pickled, tensors = tmp_path / "a.pt", tmp_path / "a.safetensors"
    content = {"a": torch.arange(1000, dtype=torch.float32), "b": torch.tensor(1.0), "c": torch.ones(3).bfloat16()}
    torch.save(content, pickled)
    save_tensors(tensors, content)
    for path, read in ((pickled, lambda p: load_pickle(p, checked=True)), (tensors, load_tensors)):
        assert all(torch.equal(read(path)[k], v) for k, v in content.items())
        raw_file = bytearray(path.read_bytes())
        raw_file[raw_file.find(content["a"].numpy().tobytes()) + 2000] ^= 1
        path.write_bytes(raw_file)
        with pytest.raises(ValueError, match=rf"{path.name}.*damaged"):
            read(path)


def test_load_tensors_names_damaged_files(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(8)}, path)
    raw_file = path.read_bytes()
    assert torch.equal(load_tensors(path)["a"], torch.ones(8))  # a foreign file without checksum
    for content in (
        b"",
        raw_file[:4],
        raw_file[:40],
        raw_file[:-1],
        raw_file + b"0",
        b"\xff" * 100,
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.safetensors.*damaged"):
            load_tensors(path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        load_tensors(tmp_path / "nothing.safetensors")


def test_save_tensors_uses_default_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {"about": "x"})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_save_tensors_syncs_before_rename_and_keeps_old_file_on_error(tmp_path, monkeypatch):
    path, order = tmp_path / "x.safetensors", []
    sync = atomic.sync
    monkeypatch.setattr(atomic, "sync", lambda p: order.append((p.name, path.exists())) or sync(p))
    save_tensors(path, {"a": torch.ones(1)})
    assert order == [(f".x.safetensors.{os.getpid()}.unfinished", False), (tmp_path.name, True)]

    def full(*args):
        raise weights.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match=r"x\.safetensors.*No space left"):
        save_tensors(path, {"a": torch.zeros(1)})
    assert torch.equal(load_file(path)["a"], torch.ones(1)) and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_reading_passes_errors_of_the_model_through():
    with pytest.raises(RuntimeError, match="size mismatch"), reading("x"):
        raise RuntimeError("size mismatch for a")
    with pytest.raises(ValueError, match=r"the weights in 'x'.*zip archive"), reading("the weights in 'x'"):
        raise RuntimeError("PytorchStreamReader failed reading zip archive: not a ZIP archive")
