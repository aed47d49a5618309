"""A run from its first step to its last: logs, checkpoints, resuming, interruption."""

import itertools
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tiny import tiny_backbone

from longalign.compose import build_from_config
from longalign.config import load_config, override
from longalign.data.stream import Stream
from longalign.encoders.base import PromptReport, TruncationWarning, raise_or_warn_truncated
from longalign.errors import ConfigError, RunError
from longalign.registry import PartConfig, data, encoders, rewards
from longalign.rewards.guard import NonFiniteReward
from longalign.trainers.batches import Batches, collate, load_batches
from longalign.trainers.loop import _compiled, fit
from longalign.trainers.resume import check_same_run, random_state, set_random_state


def run(config, resume=None):
    return build_from_config(config).fit(resume=resume)


def lines(output):
    found = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


def weights(checkpoint):
    return load_file(checkpoint / "longalign.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("trainer", ["align", "reward"])
def test_resumed_is_uninterrupted_bit_by_bit(world, tmp_path, trainer):
    make = getattr(world, f"{trainer}_config")
    settings = {"accumulation": 2, "ema": 0.9, "warmup": 3} if trainer == "align" else {}
    whole = run(make(tmp_path / "whole", **settings))
    assert (whole.step, whole.interrupted) == (4, False)
    assert whole.checkpoint == tmp_path / "whole" / "checkpoint-000004"

    run(make(tmp_path / "cut", **{**settings, "steps": 2}))
    rest = run(make(tmp_path / "cut", **settings), resume=tmp_path / "cut")
    assert same(weights(whole.checkpoint), weights(rest.checkpoint))
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    assert [line["step"] for line in lines(tmp_path / "cut")] == [1, 2, 3, 4]
    one, two = (
        torch.load(tmp_path / name / "checkpoint-000004" / "resume" / "shared.pt", weights_only=True)
        for name in ("whole", "cut")
    )
    assert all(torch.equal(p, q) for p, q in zip(one["parameters"], two["parameters"], strict=True))


def test_log_and_weights_of_an_align_run(world, tmp_path):
    result = run(world.align_config(tmp_path, steps=3, keep=2, save_every=1, ema=0.9, warmup=2))
    first = lines(tmp_path)[0]
    assert set(first) == {"step", "loss", "noise_loss", "grad_norm", "lr"}
    assert first["loss"] == first["noise_loss"]
    assert [line["lr"] for line in lines(tmp_path)] == [5e-3, 1e-2, 1e-2]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-000002", "checkpoint-000003"]
    assert not list(tmp_path.glob(".checkpoint*"))
    saved = weights(result.checkpoint)
    assert {k.split(".")[0] for k in saved} == {"lora", "encoder"}
    # the file holds the average, the resume state the weights themselves
    raw = torch.load(result.checkpoint / "resume" / "shared.pt", weights_only=True)["parameters"]
    names = [k for k in saved if k.endswith("lora_B.weight")]
    assert names and all(saved[name].abs().sum() > 0 for name in names)
    assert not any(any(torch.equal(saved[name], p) for p in raw if p.shape == saved[name].shape) for name in names)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_step_and_writes_a_checkpoint(world, tmp_path, caplog, number):
    calls = []

    def pressing(images, prompts):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), number)
        return world.red(images, prompts)

    # Started by nohup, or in a shell's background, these signals are ignored.
    handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    outside = signal.signal(number, handler)
    rewards.register("pressing", pressing)
    try:
        config = {**world.reward_config(tmp_path, save_every=None), "rewards": ["pressing"]}
        result = run(config)
        assert (result.step, result.interrupted, result.signal) == (1, True, number)
        assert result.checkpoint == tmp_path / "checkpoint-000001"
        assert "stopped after step 1 of 4; to resume: longalign train" in caplog.text
        assert signal.getsignal(number) is handler
        rest = run(config, resume=result.checkpoint)
        assert (rest.step, rest.signal) == (4, None)
    finally:
        signal.signal(number, outside)
        rewards.unregister("pressing")


def test_a_changed_config_is_not_resumed(world, tmp_path, caplog):
    config = load_config(world.align_config(tmp_path, steps=1))
    run(config)
    with pytest.raises(ValueError, match=r"another config:\n  loop.lr: 0.01 in the checkpoint, 0.5 now\n"):
        run(override(config, {"loop.lr": 0.5}), resume=tmp_path)
    assert run(override(config, {"loop.steps": 2}), resume=tmp_path).step == 2
    assert "loop.steps was 1 before and is 2 now" in caplog.text
    assert check_same_run(config, override(config, {"output": "elsewhere"})) == {}
    with pytest.raises(ValueError, match=r"there is a run in .* already, with a different config:\n    loop.st"):
        run(config)


def test_a_broken_reward_is_kept_for_inspection(world, tmp_path):
    rewards.register("broken", lambda images, prompts: images.mean((1, 2, 3)) * float("inf"))
    try:
        with pytest.raises(NonFiniteReward, match="kept in"):
            run({**world.reward_config(tmp_path), "rewards": ["broken"]})
    finally:
        rewards.unregister("broken")
    folder = tmp_path / "non-finite" / "process-0"
    assert (folder / "image.png").is_file() and (folder / "prompt.txt").read_text()


def test_validation_images_leave_the_training_alone(world, tmp_path):
    with_images, without = tmp_path / "with", tmp_path / "without"
    config = world.align_config(with_images, steps=2)
    run({**config, "validation": {"prompts": ["ab", "cd"], "every": 1, "num_steps": 2, "guidance": 2.0}})
    run(world.align_config(without, steps=2))
    assert sorted(p.name for p in (with_images / "validation").iterdir()) == ["000000", "000001", "000002"]
    assert sorted(p.name for p in (with_images / "validation" / "000001").iterdir()) == ["00.png", "01.png"]
    assert lines(with_images) == lines(without)


def test_validation_is_sampled_at_the_start_and_the_end_and_after_the_checkpoint(world, tmp_path, monkeypatch):
    saved = []

    def sampling(backbone, encoder, settings, prompts, folder, step):
        saved.append((step, sorted(int(p.name[-6:]) for p in tmp_path.glob("checkpoint-*"))))
        if step == 4:
            raise RuntimeError("no image")

    monkeypatch.setattr("longalign.trainers.loop.draw", sampling)
    config = {**world.align_config(tmp_path), "validation": {"prompts": ["ab"], "every": 100}}
    with pytest.raises(RuntimeError, match="no image") as caught:
        run(config)
    assert saved == [(0, []), (4, [2, 4])]
    assert (
        "to resume: longalign train" in caught.value.__notes__[0] and "checkpoint-000004" in caught.value.__notes__[0]
    )


def test_a_missing_file_of_validation_prompts_is_found_before_anything_is_built(world, tmp_path):
    composition = build_from_config({**world.align_config(tmp_path), "validation": {"prompts": "nope.txt"}})
    for training in (composition.fit, lambda: fit(composition)):
        with pytest.raises((ConfigError, FileNotFoundError), match=r"nope\.txt"):
            training()
    assert not composition._built and not list(tmp_path.iterdir())


def test_tensorboard_takes_the_images_of_the_validation(world, tmp_path, caplog):
    config = world.align_config(tmp_path, steps=1, trackers=["tensorboard"])
    run({**config, "validation": {"prompts": ["ab", "cd"], "num_steps": 1, "guidance": 1}})
    assert "tracker" not in caplog.text
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = sorted({path.parent for path in tmp_path.rglob("events.out.tfevents*")})
    read = [EventAccumulator(str(folder)).Reload() for folder in folders]
    (found,) = [events for events in read if events.Tags()["images"]]
    assert [(image.step, image.width, image.height) for image in found.Images("validation")] == [(0, 16, 8), (1, 16, 8)]
    assert [scalar.step for scalar in found.Scalars("loss")] == [1]


def test_a_tracker_that_fails_does_not_end_the_run(world, tmp_path, caplog, monkeypatch):
    from accelerate.tracking import TensorBoardTracker

    def fail(*args, **kwargs):
        raise AssertionError("no tracker today")

    for name in ("log", "log_images", "finish"):
        monkeypatch.setattr(TensorBoardTracker, name, fail)
    config = world.align_config(tmp_path, steps=1, trackers=["tensorboard"])
    assert run({**config, "validation": {"prompts": ["ab"], "num_steps": 1, "guidance": 1}}).step == 1
    monkeypatch.setattr(TensorBoardTracker, "start", fail, raising=False)
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", fail)
    assert run(world.align_config(tmp_path / "2", steps=1, trackers=["tensorboard"])).step == 1
    assert [record.getMessage().split(" (")[0] for record in caplog.records if "tracker" in record.getMessage()] == [
        "a tracker did not take the images",
        "a tracker did not take the numbers",
        "a tracker did not take the images",
        "a tracker cannot be ended",
        "a tracker cannot be started",
    ]


def test_what_is_logged_is_the_mean_since_the_last_line(world, tmp_path):
    run(world.align_config(tmp_path / "each", steps=5))
    run(world.align_config(tmp_path / "some", steps=3, log_every=2, save_every=1))
    run(world.align_config(tmp_path / "some", steps=5, log_every=2), resume=tmp_path / "some")
    each, some = lines(tmp_path / "each"), lines(tmp_path / "some")
    assert [line["step"] for line in some] == [2, 3, 4, 5]
    for line, of in zip(some, ([0, 1], [2], [3], [4]), strict=True):
        for key in ("loss", "noise_loss", "grad_norm"):
            assert line[key] == pytest.approx(sum(each[i][key] for i in of) / len(of))
        assert line["lr"] == each[of[-1]]["lr"]


def test_means_survive_a_checkpoint_between_two_lines(world, tmp_path):
    whole = world.align_config(tmp_path / "whole", steps=4, log_every=4)
    run(whole)
    cut = {"output": str(tmp_path / "cut"), "loop.save_every": 1, "loop.keep": None}
    run(override(load_config(whole), cut))
    again = override(load_config(whole), {"output": str(tmp_path / "again")})
    run(again, resume=tmp_path / "cut" / "checkpoint-000003")
    assert lines(tmp_path / "again") == lines(tmp_path / "whole") == lines(tmp_path / "cut")


def test_an_infinite_loss_with_a_finite_gradient_is_found_before_the_next_checkpoint(world, tmp_path, monkeypatch):
    from longalign.trainers.align import AlignTrainer

    losses, calls = AlignTrainer.losses, []

    def infinite(trainer, batch):
        calls.append(1)
        return {**losses(trainer, batch), "other_loss": torch.tensor(float("inf") if len(calls) == 3 else 0.0)}

    monkeypatch.setattr(AlignTrainer, "losses", infinite)
    with pytest.raises(
        RunError, match=r"the loss is not finite .*'other_loss': inf.* at step 4.*checkpoint-000002"
    ) as told:
        run(world.align_config(tmp_path, steps=8, log_every=8, save_every=2))
    assert "batch.json" in str(told.value)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-000002"]
    assert not list(tmp_path.glob(".checkpoint*"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tri"
        ),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_to_lower(world, tmp_path, error):
    calls = []

    def greedy(images, prompts):
        calls.append(1)
        if len(calls) == 4:
            raise error
        return world.red(images, prompts)

    rewards.register("greedy", greedy)
    try:
        with pytest.raises(RunError) as caught:
            run({**world.reward_config(tmp_path), "rewards": ["greedy"]})
    finally:
        rewards.unregister("greedy")
    told = str(caught.value)
    for key in ("loop.batch_size", "loop.gradient_checkpointing", "trainer.denoise_batch", "trainer.decode_batch"):
        assert key in told
    assert f"longalign train {tmp_path}/checkpoint-000002 --resume" in told and caught.value.__cause__ is error


def test_a_reward_that_fails_keeps_its_error_and_says_how_to_resume(world, tmp_path):
    def failing(images, prompts):
        raise LookupError("mine")

    rewards.register("failing", failing)
    try:
        with pytest.raises(LookupError, match="mine") as caught:
            run({**world.reward_config(tmp_path), "rewards": ["failing"]})
    finally:
        rewards.unregister("failing")
    assert "there is no checkpoint in" in caught.value.__notes__[0]


def test_a_process_that_loads_data_and_is_killed_is_named(world, tmp_path, monkeypatch):
    def killed(squares, index):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(world.Squares, "__getitem__", killed)
    with pytest.raises(RunError, match=r"DataLoader worker.*lower loop\.workers \(now 1\)"):
        run(world.align_config(tmp_path, workers=1))


def test_a_run_says_what_it_is_before_it_starts(world, tmp_path, caplog):
    caplog.set_level("INFO", "longalign")
    run(world.align_config(tmp_path, steps=2, batch_size=12, accumulation=2))
    told = caplog.text
    for part in (
        "cpu",
        "10 items; 2 steps are 4.80 epochs",
        "12 items x 2 micro-steps x 1 processes = 24 a step",
        str(tmp_path),
    ):
        assert part in told
    trained = sum(p.numel() for p in build_from_config(world.align_config(tmp_path / "x")).trainer.trainable())
    assert f"{trained:,} of " in told
    assert "a batch holds 12 items and the data 10" in told


def test_a_large_model_on_a_cpu_is_warned_of(world, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("longalign.trainers.header.LARGE", 100)
    run(world.align_config(tmp_path, steps=1))
    assert "on a CPU takes days" in caplog.text


def test_tensorboard_and_half_precision_with_checkpointed_gradients(world, tmp_path):
    loop = {"steps": 1, "precision": "bf16", "gradient_checkpointing": True, "trackers": ["tensorboard"]}
    composition = build_from_config(world.align_config(tmp_path, **loop))
    assert fit(composition).step == 1
    assert list(tmp_path.rglob("events.out.tfevents*"))
    assert {p.dtype for p in composition.trainer.trainable()} == {torch.float32}
    run(world.align_config(tmp_path / "plain", steps=1))  # and back to full precision in the same process


class Compiled(torch.nn.Module):
    """What `torch.compile` gives, without compiling: a module that holds the other one."""

    def __init__(self, module, **about):
        super().__init__()
        self._orig_mod, self.about, self.graded = module, about, []

    def forward(self, *inputs, **named):
        self.graded.append(torch.is_grad_enabled())
        return self._orig_mod(*inputs, **named)


def test_a_compiled_denoiser_is_trained_and_saved_under_its_own_names(world, tmp_path, monkeypatch):
    made = []
    plain = run(world.reward_config(tmp_path / "plain", steps=1))
    composition = build_from_config(world.reward_config(tmp_path / "compiled", steps=1, compile=True))
    monkeypatch.setattr(torch, "compile", lambda *module, **about: made.append(Compiled(*module, **about)) or made[0])
    result = fit(composition)
    assert made[0]._orig_mod is composition.backbone.denoiser and composition.backbone.lora_names == ["reward"]
    assert made[0].about == {"backend": "inductor", "options": {"fallback_random": True}}
    assert made[0].graded == [False, False, True]
    assert same(weights(result.checkpoint), weights(plain.checkpoint))


def test_compiling_by_a_backend_of_torch():
    module = torch.nn.Linear(2, 2)
    compiled = _compiled(module, "eager")
    assert torch.equal(compiled(torch.ones(1, 2)), module(torch.ones(1, 2))) and compiled is not module
    assert _compiled(module, False) is module


@pytest.mark.parametrize("lora", [{"rank": 2, "dropout": 0}, None])
def test_channels_last_is_the_same_training_and_is_saved_as_usual(world, tmp_path, lora):
    losses, saved = [], {}
    for name, settings in (("plain", {}), ("last", {"channels_last": True})):
        config = world.align_config(tmp_path / name, steps=2, lr=1e-3, **settings)
        composition = build_from_config({**config, "trainer": {"name": "align", "lora": lora}})
        saved = weights(fit(composition).checkpoint)
        losses.append([line["loss"] for line in lines(tmp_path / name)])
        for part in (composition.backbone.denoiser, composition.backbone.vae.decoder):
            kernels = [p for p in part.parameters() if p.ndim == 4 and min(p.shape[1], *p.shape[2:]) > 1]
            assert kernels
            assert all(p.is_contiguous(memory_format=torch.channels_last) == bool(settings) for p in kernels)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    trained = {k: p for k, p in composition.backbone.denoiser.named_parameters() if p.requires_grad}
    named = {f"lora.0.{k.replace('.align.', '.')}" if lora else f"denoiser.{k}": p for k, p in trained.items()}
    assert named and all(torch.equal(saved[key], parameter) for key, parameter in named.items())


def test_channels_last_and_compilers_that_do_not_fit(world, tmp_path):
    config = world.align_config(tmp_path, channels_last=True)
    with pytest.raises(ConfigError, match=r"loop.channels_last: it is a layout of convolutions, and 'sd3' is a trans"):
        load_config({**config, "backbone": {"name": "sd3", "checkpoint": "x"}})
    denscore = Path(__file__).parents[2] / "examples" / "longalign-denscore.yaml"
    with pytest.raises(ConfigError, match=r"loop.compile: it is for a backbone, and 'denscore' uses none; set it to"):
        override(denscore, {"loop.compile": True})
    backbone = tiny_backbone()
    backbone.denoiser = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="a layout of convolutions, and Linear has none"):
        backbone.use_channels_last()
    with pytest.raises(ConfigError, match=r"loop\.compile"):
        load_config(world.align_config(tmp_path, compile="fast"))


def test_dynamo_of_accelerate_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    with pytest.raises(ValueError, match=r"set loop\.compile"):
        run(world.align_config(tmp_path))


def test_a_missing_tracker_is_named(monkeypatch, world, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tracker 'wandb' needs a package that is not installed.*pip install wandb"):
        run(world.align_config(tmp_path, trackers=["wandb"]))


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_gradient_that_is_not_finite_stops_the_run_before_it_is_applied(world, tmp_path, clip):
    composition = build_from_config(world.align_config(tmp_path, lr=1e30, clip=clip, steps=4))
    with pytest.raises(RunError, match=r"the gradient is not finite at step 2; its prompts are in .*no checkpoint"):
        composition.fit()
    kept = json.loads((tmp_path / "non-finite" / "process-0" / "batch.json").read_text())
    assert kept["step"] == 2 and len(kept["prompts"][0]) == 3
    assert all(p.isfinite().all() for p in composition.trainer.trainable())
    assert not list(tmp_path.glob("checkpoint-*"))


def test_what_is_cut_of_prompts_is_warned_of_once_and_counted(world, tmp_path):
    class Short(world.ToyEncoder):
        """Says that it leaves out the end of every second prompt."""

        def encode(self, prompts):
            reports = [PromptReport((p,), (1,), "end" if i % 2 else "") for i, p in enumerate(prompts)]
            raise_or_warn_truncated(reports, "truncate", 4, f"call them otherwise than {prompts}")
            return replace(super().encode(prompts), reports=tuple(reports))

    class ShortConfig(PartConfig):
        name: str = "short"

        def build(self, runtime):
            return Short()

    encoders.register("short", ShortConfig)
    try:
        with pytest.warns(TruncationWarning) as told:
            run({**world.align_config(tmp_path), "encoder": "short"})
    finally:
        encoders.unregister("short")
    assert len([w for w in told if w.category is TruncationWarning]) == 1
    assert [line["truncated_prompts"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_workers_of_a_stream_stay_as_they_were(world, tmp_path):
    class Endless(Stream):
        num_shards = 2

        def items(self, seed, part=0, num_parts=1, skip=0, images=True):
            yield from (world.Squares()[i % 10] for i in itertools.count(skip))

    class EndlessConfig(PartConfig):
        name: str = "endless"

        def build(self, runtime):
            return Endless()

    data.register("endless", EndlessConfig)
    try:
        config = {**world.align_config(tmp_path, steps=2), "data": "endless"}
        run(config)
        with pytest.raises(ValueError, match=r"loop\.workers was 0 before"):
            run(override(config, {"loop.workers": 2, "loop.steps": 4}), resume=tmp_path)
    finally:
        data.unregister("endless")


def test_processes_share_out_each_pass():
    alone = iter(Batches(12, 4, seed=0))
    both = [iter(Batches(12, 2, seed=0, rank=r, processes=2)) for r in range(2)]
    for _ in range(7):
        whole = next(alone)
        assert whole == [i for part in both for i in next(part)]
    batches = iter(Batches(12, 4, seed=0))
    first_pass = [i for _ in range(3) for i in next(batches)]
    second_pass = [i for _ in range(3) for i in next(batches)]
    assert sorted(first_pass) == sorted(second_pass) == list(range(12)) and first_pass != second_pass


def test_batches_can_start_anywhere():
    batches = iter(Batches(5, 2, seed=1))
    whole = [next(batches) for _ in range(6)]
    later = iter(Batches(5, 2, seed=1, start=4))
    assert [next(later), next(later)] == whole[4:]
    other = iter(Batches(5, 2, seed=2))
    assert [next(other) for _ in range(6)] != whole
    with pytest.raises(ValueError, match="the data is empty"):
        Batches(0, 2, seed=0)


def test_batches_of_data(world):
    before = torch.get_rng_state()
    batch = next(load_batches(world.Squares(), Batches(10, 2, seed=0), True, 0))
    assert batch["image"].shape == (2, 3, 8, 8) and len(batch["prompt"]) == 2
    assert set(next(load_batches(world.Squares(), Batches(10, 2, seed=0), False, 0))) == {"prompt"}
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="needs images, and the data has prompts only"):
        load_batches(world.BareWords(), Batches(10, 2, seed=0), True, 0)
    with pytest.raises(ValueError, match=r"one size in a batch, got \[\(3, 4, 4\), \(3, 8, 8\)\]"):
        collate([{"prompt": "a", "image": torch.zeros(3, 8, 8)}, {"prompt": "b", "image": torch.zeros(3, 4, 4)}])


def test_random_state_comes_back():
    import random

    import numpy as np

    state = random_state()
    drawn = (random.random(), np.random.rand(), torch.rand(1).item())
    set_random_state(state)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == drawn
