"""Runs that are killed, signalled, and short of disk, at random moments and before each operation on a file.

Each run is a fork of this process, in which all libraries are imported.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "trainers"))

import worlds

from longalign import weights
from longalign.compose import build_from_config
from longalign.trainers.folder import checkpoints

pytestmark = pytest.mark.reliability
STEPS = 5


@pytest.fixture(autouse=True)
def world():
    worlds.register()
    torch.set_num_threads(1)
    yield
    worlds.unregister()


def config(output, **changes):
    loop = {"steps": STEPS, "save_every": 1, "keep": 1, "ema": 0.9, "warmup": 2, "log_every": 2}
    return {**worlds.align_config(output, **loop), **changes}


def forked(action):
    """Runs an action in a fork of this process; returns the fork's id. Its status is 0, or 3 where it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks beside threads
        child = os.fork()
    if child:
        return child
    status = 3
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        result = action()
        status = 128 + (result.signal or 0) if result.interrupted else 0
    except BaseException as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        Path(f"{action.output}.error").write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(status)


class Train:
    """A run of ``settings``, resumed where it was.

    Args:
        settings: of the run.
        resume: whether it resumes its own folder.
        before: called first in the new process.
    """

    def __init__(self, settings, resume=True, before=lambda: None):
        self.settings, self.resume, self.before, self.output = settings, resume, before, settings["output"]

    def __call__(self):
        self.before()
        return build_from_config(self.settings).fit(resume=self.output if self.resume else None)


def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ended(output):
    """What a run leaves: all tensors of its last checkpoint and its log without times."""
    (checkpoint,) = checkpoints(Path(output))
    assert not list(Path(output).glob(".checkpoint*"))
    shared = torch.load(checkpoint / "resume" / "shared.pt", weights_only=True)
    tensors = list(weights.load_tensors(checkpoint / "longalign.safetensors").values())
    tensors += [*shared["parameters"], *shared["ema"]["shadow_params"]]
    tensors += [v for state in shared["optimizer"]["state"].values() for v in state.values()]
    lines = [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]
    return tensors, [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def same(one, other):
    return one[1] == other[1] and all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))


@pytest.fixture
def whole(tmp_path):
    output = tmp_path / "whole"
    assert status(forked(Train(config(output)))) == 0
    return ended(output)


def killed_before(number):
    """Makes this process kill itself before its ``number``-th operation on files."""
    done = [0]

    def guard(owner, name):
        real = getattr(owner, name)

        def operation(*args, **kwargs):
            if done[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            done[0] += 1
            return real(*args, **kwargs)

        setattr(owner, name, operation)

    for owner, names in ((Path, "rename replace chmod touch unlink mkdir"), (os, "fsync"), (shutil, "rmtree")):
        for name in names.split():
            guard(owner, name)
    guard(torch, "save")
    guard(weights, "save_file")


@pytest.mark.parametrize("finished", [False, True])
def test_resume_after_kill_before_each_file_operation(tmp_path, whole, finished):
    kills = 0
    for number in range(0, 1000, 4):
        output = tmp_path / f"{number}"
        if finished:
            assert status(forked(Train(config(output)))) == 0
        code = status(forked(Train(config(output), before=lambda number=number: killed_before(number))))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        assert status(forked(Train(config(output)))) == 0
        assert same(ended(output), whole), f"killed before operation {number}"
        shutil.rmtree(output)
    print(f"{kills} kills")
    assert kills > (0 if finished else 10)


def test_resume_after_kill_at_random_time(tmp_path, whole):
    generator, kills = random.Random(0), 0
    for number in range(8):
        output = tmp_path / f"{number}"
        for _ in range(8):
            child = forked(Train(config(output)))
            time.sleep(generator.uniform(0, 1.5))
            os.kill(child, signal.SIGKILL)
            kills += (code := status(child)) == -signal.SIGKILL
            if code == 0:
                break
        else:
            assert status(forked(Train(config(output)))) == 0
        assert same(ended(output), whole)
    print(f"{kills} kills")
    assert kills > 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_resume_after_signal_at_random_time(tmp_path, whole, number):
    generator, saved = random.Random(number), 0
    for run in range(6):
        output, twice = tmp_path / f"{run}", run % 3 == 0
        child = forked(Train(config(output)))
        time.sleep(generator.uniform(0, 1.5))
        for _ in range(1 + twice):
            try:
                os.kill(child, number)
            except ProcessLookupError:
                break
        code = status(child)
        assert code in (0, 3, 128 + number, -number)  # over, while loading, or granted
        saved += code == 128 + number
        if code == 128 + number:
            assert checkpoints(output)
        assert status(forked(Train(config(output)))) == 0
        assert same(ended(output), whole)
    print(f"{saved} of 6 wrote a checkpoint")


def test_fit_full_disk_keeps_last_checkpoint(tmp_path, whole):
    sizes = [p.stat().st_size for p in (tmp_path / "whole").rglob("*") if p.is_file()]
    stopped = 0
    for number, limit in enumerate(sorted({1, 100, *(max(sizes) * i // 12 for i in (2, 6, 10))})):
        output = tmp_path / f"{number}"
        half = {**config(output), "loop": {**config(output)["loop"], "steps": 2}}
        assert status(forked(Train(half))) == 0
        full = lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))  # noqa: E731
        if status(forked(Train(config(output), before=full))) == 3:
            stopped += 1
            message = Path(f"{output}.error").read_text()
            assert (
                message.startswith("OSError: the checkpoint of step 3 cannot be written into") and "--resume" in message
            )
            assert [p.name for p in checkpoints(output)] == ["checkpoint-000002"]
            assert not list(output.glob(".checkpoint*"))
        assert status(forked(Train(config(output)))) == 0
        found = ended(output)
        assert all(torch.equal(a, b) for a, b in zip(found[0], whole[0], strict=True))
    print(f"stopped {stopped} times")
    assert stopped > 2


def test_fit_two_processes_in_one_folder(tmp_path):
    clean = {}
    for seed in (0, 7):
        assert status(forked(Train(config(tmp_path / f"seed-{seed}", seed=seed)))) == 0
        clean[seed] = ended(tmp_path / f"seed-{seed}")
    for number in range(5):
        output = tmp_path / f"{number}"
        children = {seed: forked(Train(config(output, seed=seed), resume=False)) for seed in clean}
        codes = {seed: status(child) for seed, child in children.items()}
        assert sorted(codes.values()) == [0, 3]
        (winner,) = (seed for seed, code in codes.items() if code == 0)
        assert same(ended(output), clean[winner])
        message = Path(f"{output}.error").read_text()
        assert "is writing to" in message or "there is a run in" in message


def test_resume_two_processes_of_one_run(tmp_path, whole):
    for number in range(5):
        output = tmp_path / f"{number}"
        half = {**config(output), "loop": {**config(output)["loop"], "steps": 2}}
        assert status(forked(Train(half))) == 0
        codes = [status(child) for child in [forked(Train(config(output))) for _ in range(2)]]
        assert 0 in codes and set(codes) <= {0, 3}
        assert same(ended(output), whole) or codes == [0, 0]
        assert all(torch.equal(a, b) for a, b in zip(ended(output)[0], whole[0], strict=True))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_fit_read_only_folder_fails(tmp_path):
    tmp_path.chmod(0o500)
    child = forked(Train(config(tmp_path / "run")))
    tmp_path.chmod(0o700)
    assert status(child) == 3


def test_fit_memory_is_constant_in_long_run(tmp_path):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    def soak():
        sizes = []
        real = torch.save

        def saving(*args):
            sizes.append(resident())
            return real(*args)

        torch.save = saving
        settings = config(tmp_path / "run")
        settings["loop"] |= {"steps": 1000, "save_every": 50}
        result = build_from_config(settings).fit()
        Path(f"{tmp_path}.sizes").write_text(json.dumps(sizes))
        return result

    soak.output = str(tmp_path / "run")
    assert status(forked(soak)) == 0
    sizes = json.loads(Path(f"{tmp_path}.sizes").read_text())
    print(f"{sizes[10]:.0f} MiB at step 250, {sizes[-1]:.0f} MiB at step 1000")
    assert sizes[-1] - sizes[10] < 30
