"""Runs that are killed, interrupted or out of disk space, at random times and before each file operation.

Each run is a fork of this process, which has already imported all libraries.
"""

import json
import os
import random
import resource
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
import worlds

from longalign.files import weights
from longalign.files.paths import checkpoints
from longalign.loop.fit import fit

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
    """Runs an action in a fork of this process and returns its process id. The exit status is 3 if it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn about forks with threads
        child = os.fork()
    if child:
        return child
    status = 3
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        result = action()
        status = 128 + (result.signal or 0) if result.interrupted else 0
    except BaseException as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        Path(f"{action.output}.error").write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(status)


class Train:
    """Action that trains a run.

    Args:
        settings: config of the run.
        resume: resume from the output folder.
        setup: called first in the new process.
    """

    def __init__(self, settings, resume=True, setup=lambda: None):
        self.settings, self.resume, self.setup, self.output = settings, resume, setup, settings["output"]

    def __call__(self):
        self.setup()
        return fit(self.settings, resume=self.output if self.resume else None)


def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def read_result(output):
    """Result of a run: all tensors of its last checkpoint, and its log without times."""
    (checkpoint,) = checkpoints(Path(output))
    assert not list(Path(output).glob(".checkpoint*"))
    shared = torch.load(checkpoint / "resume" / "shared.pt", weights_only=True)
    tensors = list(weights.load_tensors(checkpoint / "longalign.safetensors").values())
    tensors += [*shared["parameters"], *shared["ema"]["shadow_params"]]
    tensors += [v for state in shared["optimizer"]["state"].values() for v in state.values()]
    lines = [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]
    return tensors, [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def same(a, b):
    return a[1] == b[1] and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))


@pytest.fixture
def uninterrupted(tmp_path):
    """Result of an uninterrupted run."""
    output = tmp_path / "uninterrupted"
    assert status(forked(Train(config(output)))) == 0
    return read_result(output)


def kill_before(number):
    """Makes this process kill itself before its ``number``-th file operation."""
    count = [0]

    def guard(owner, name):
        original = getattr(owner, name)

        def operation(*args, **kwargs):
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
            return original(*args, **kwargs)

        setattr(owner, name, operation)

    for owner, names in ((Path, "rename replace chmod touch unlink mkdir"), (os, "fsync"), (shutil, "rmtree")):
        for name in names.split():
            guard(owner, name)
    guard(torch, "save")
    guard(weights, "save_file")


@pytest.mark.parametrize("finished", [False, True])
def test_resume_after_kill_before_each_file_operation(tmp_path, uninterrupted, finished):
    kills = 0
    for number in range(0, 1000, 4):
        output = tmp_path / f"{number}"
        if finished:
            assert status(forked(Train(config(output)))) == 0
        code = status(forked(Train(config(output), setup=lambda number=number: kill_before(number))))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        assert status(forked(Train(config(output)))) == 0
        assert same(read_result(output), uninterrupted), f"killed before operation {number}"
        shutil.rmtree(output)
    print(f"{kills} kills")
    assert kills > (0 if finished else 10)


def test_resume_after_kill_at_random_time(tmp_path, uninterrupted):
    rng, kills = random.Random(0), 0
    for number in range(8):
        output = tmp_path / f"{number}"
        for _ in range(8):
            child = forked(Train(config(output)))
            time.sleep(rng.uniform(0, 1.5))
            os.kill(child, signal.SIGKILL)
            kills += (code := status(child)) == -signal.SIGKILL
            if code == 0:
                break
        else:
            assert status(forked(Train(config(output)))) == 0
        assert same(read_result(output), uninterrupted)
    print(f"{kills} kills")
    assert kills > 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_resume_after_signal_at_random_time(tmp_path, uninterrupted, number):
    rng, saved = random.Random(number), 0
    for run in range(6):
        output, twice = tmp_path / f"{run}", run % 3 == 0
        child = forked(Train(config(output)))
        time.sleep(rng.uniform(0, 1.5))
        for _ in range(1 + twice):
            try:
                os.kill(child, number)
            except ProcessLookupError:
                break
        code = status(child)
        assert code in (0, 3, 128 + number, -number)  # finished, interrupted while loading, or stopped by the signal
        saved += code == 128 + number
        if code == 128 + number:
            assert checkpoints(output)
        assert status(forked(Train(config(output)))) == 0
        assert same(read_result(output), uninterrupted)
    print(f"{saved} of 6 wrote a checkpoint")


def test_fit_full_disk_keeps_last_checkpoint(tmp_path, uninterrupted):
    sizes = [p.stat().st_size for p in (tmp_path / "uninterrupted").rglob("*") if p.is_file()]
    stopped = 0
    for number, limit in enumerate(sorted({1, 100, *(max(sizes) * i // 12 for i in (2, 6, 10))})):
        output = tmp_path / f"{number}"
        first_steps = {**config(output), "loop": {**config(output)["loop"], "steps": 2}}
        assert status(forked(Train(first_steps))) == 0
        limit_file_size = lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))  # noqa: E731
        if status(forked(Train(config(output), setup=limit_file_size))) == 3:
            stopped += 1
            message = Path(f"{output}.error").read_text()
            assert message.startswith("OSError: ") and "step 3" in message and "--resume" in message
            assert [p.name for p in checkpoints(output)] == ["checkpoint-000002"]
            assert not list(output.glob(".checkpoint*"))
        assert status(forked(Train(config(output)))) == 0
        tensors, _ = read_result(output)
        assert all(torch.equal(a, b) for a, b in zip(tensors, uninterrupted[0], strict=True))
    print(f"stopped {stopped} times")
    assert stopped > 2


def test_fit_two_processes_in_one_folder(tmp_path):
    results = {}
    for seed in (0, 7):
        assert status(forked(Train(config(tmp_path / f"seed-{seed}", seed=seed)))) == 0
        results[seed] = read_result(tmp_path / f"seed-{seed}")
    for number in range(5):
        output = tmp_path / f"{number}"
        children = {seed: forked(Train(config(output, seed=seed), resume=False)) for seed in results}
        codes = {seed: status(child) for seed, child in children.items()}
        assert sorted(codes.values()) == [0, 3]
        (winner,) = (seed for seed, code in codes.items() if code == 0)
        assert same(read_result(output), results[winner])
        message = Path(f"{output}.error").read_text()
        assert str(output) in message


def test_resume_two_processes_of_one_run(tmp_path, uninterrupted):
    for number in range(5):
        output = tmp_path / f"{number}"
        first_steps = {**config(output), "loop": {**config(output)["loop"], "steps": 2}}
        assert status(forked(Train(first_steps))) == 0
        codes = [status(child) for child in [forked(Train(config(output))) for _ in range(2)]]
        assert 0 in codes and set(codes) <= {0, 3}
        result = read_result(output)
        assert same(result, uninterrupted) or codes == [0, 0]
        assert all(torch.equal(a, b) for a, b in zip(result[0], uninterrupted[0], strict=True))


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
        original = torch.save

        def save(*args):
            sizes.append(resident())
            return original(*args)

        torch.save = save
        settings = config(tmp_path / "run")
        settings["loop"] |= {"steps": 1000, "save_every": 50}
        result = fit(settings)
        Path(f"{tmp_path}.sizes").write_text(json.dumps(sizes))
        return result

    soak.output = str(tmp_path / "run")
    assert status(forked(soak)) == 0
    sizes = json.loads(Path(f"{tmp_path}.sizes").read_text())
    print(f"{sizes[10]:.0f} MiB at step 250, {sizes[-1]:.0f} MiB at step 1000")
    assert sizes[-1] - sizes[10] < 30
