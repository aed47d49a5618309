"""The training loop: logs, checkpoints, resuming, interruption, trackers, batches."""

import itertools
import json
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from longalign.backbones.flops import FlopCount
from longalign.backbones.stable_diffusion.sd import SDBackbone
from longalign.compose import build_from_config
from longalign.config.changes import override
from longalign.config.run import load_config
from longalign.data.config import DataConfig
from longalign.data.stream import Stream
from longalign.encoders.base import Conditioning, PromptReport, TruncationWarning, raise_or_warn_truncated
from longalign.encoders.config import EncoderConfig
from longalign.errors import ConfigError, RunError
from longalign.loop import utilization
from longalign.loop.batches import Batches, collate, load_batches
from longalign.loop.fit import fit
from longalign.loop.optimization import compiler
from longalign.loop.resume_checks import check_same_run
from longalign.loop.resume_state import random_state, set_random_state
from longalign.loop.run import Run
from longalign.registry import data, encoders, rewards
from longalign.rewards.guard import NonFiniteReward
from longalign.runtime import Runtime
from longalign.testing.tiny import tiny_backbone


def run(config, resume=None):
    return fit(config, resume=resume)


def lines(output):
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "mfu")} for row in rows]


def weights(checkpoint):
    return load_file(checkpoint / "longalign.safetensors")


def equal_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("trainer", ["align", "reward"])
def test_resume_equals_uninterrupted_bit_by_bit(world, tmp_path, trainer):
    make = getattr(world, f"{trainer}_config")
    settings = {"accumulation": 2, "ema": 0.9, "warmup": 3} if trainer == "align" else {}
    if trainer == "reward":  # with statistics that must be restored
        plain, total = make, {"name": "sum", "normalize": "running", "terms": [{"reward": "red"}]}
        make = lambda *args, **loop: {**plain(*args, **loop), "rewards": [total]}  # noqa: E731
    uninterrupted = run(make(tmp_path / "uninterrupted", **settings))
    assert (uninterrupted.step, uninterrupted.interrupted) == (4, False)
    assert uninterrupted.checkpoint == tmp_path / "uninterrupted" / "checkpoint-000004"

    run(make(tmp_path / "resumed", **{**settings, "steps": 2}))
    resumed = run(make(tmp_path / "resumed", **settings), resume=tmp_path / "resumed")
    assert equal_tensors(weights(uninterrupted.checkpoint), weights(resumed.checkpoint))
    assert lines(tmp_path / "uninterrupted") == lines(tmp_path / "resumed")
    assert [line["step"] for line in lines(tmp_path / "resumed")] == [1, 2, 3, 4]
    one, two = (
        torch.load(tmp_path / name / "checkpoint-000004" / "resume" / "shared.pt", weights_only=True)
        for name in ("uninterrupted", "resumed")
    )
    assert all(torch.equal(p, q) for p, q in zip(one["parameters"], two["parameters"], strict=True))


def test_fit_align_writes_log_and_averaged_weights(world, tmp_path):
    result = run(world.align_config(tmp_path, steps=3, keep=2, save_every=1, ema=0.9, warmup=2))
    first = lines(tmp_path)[0]
    assert set(first) == {"step", "loss", "noise_loss", "grad_norm", "lr"}
    assert first["loss"] == first["noise_loss"]
    assert [line["lr"] for line in lines(tmp_path)] == [5e-3, 1e-2, 1e-2]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-000002", "checkpoint-000003"]
    assert not list(tmp_path.glob(".checkpoint*"))
    saved = weights(result.checkpoint)
    assert {k.split(".")[0] for k in saved} == {"lora", "encoder"}
    # the weights file contains the average, the resume state the raw weights
    raw = torch.load(result.checkpoint / "resume" / "shared.pt", weights_only=True)["parameters"]
    names = [k for k in saved if k.endswith("lora_B.weight")]
    assert names and all(saved[name].abs().sum() > 0 for name in names)
    assert not any(any(torch.equal(saved[name], p) for p in raw if p.shape == saved[name].shape) for name in names)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_finishes_step_and_writes_checkpoint(world, tmp_path, caplog, number):
    calls = []

    def signalling(images, prompts):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), number)
        return world.red(images, prompts)

    # set explicitly, since under nohup or in the background of a shell these signals are ignored
    handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    previous = signal.signal(number, handler)
    rewards.register("signalling", signalling)
    try:
        config = {**world.reward_config(tmp_path, save_every=None), "rewards": ["signalling"]}
        result = run(config)
        assert (result.step, result.interrupted, result.signal) == (1, True, number)
        assert result.checkpoint == tmp_path / "checkpoint-000001"
        assert any("step 1 of 4" in m and f"longalign train {result.checkpoint} --resume" in m for m in caplog.messages)
        assert signal.getsignal(number) is handler
        resumed = run(config, resume=result.checkpoint)
        assert (resumed.step, resumed.signal) == (4, None)
    finally:
        signal.signal(number, previous)
        rewards.unregister("signalling")


def test_resume_rejects_changed_config(world, tmp_path, caplog):
    config = load_config(world.align_config(tmp_path, steps=1))
    run(config)
    with pytest.raises(ValueError, match=r"\n  loop\.lr: .*0\.01.*0\.5.*\n.*init_from"):
        run(override(config, {"loop.lr": 0.5}), resume=tmp_path)
    assert run(override(config, {"loop.steps": 2}), resume=tmp_path).step == 2
    assert any("loop.steps" in m and "1" in m and "2" in m for m in caplog.messages)
    assert check_same_run(config, override(config, {"output": "elsewhere"})) == {}
    with pytest.raises(ValueError, match=rf"{tmp_path}.*\n    loop\.steps: "):
        run(config)


def test_fit_non_finite_reward_saves_image_and_prompt(world, tmp_path):
    rewards.register("broken", lambda images, prompts: images.mean((1, 2, 3)) * float("inf"))
    try:
        with pytest.raises(NonFiniteReward, match=rf"broken.*{tmp_path}/non-finite/process-0"):
            run({**world.reward_config(tmp_path), "rewards": ["broken"]})
    finally:
        rewards.unregister("broken")
    folder = tmp_path / "non-finite" / "process-0"
    assert (folder / "image.png").is_file() and (folder / "prompt.txt").read_text()


def test_tensorboard_logs_monitor_images(world, tmp_path, caplog):
    config = world.align_config(tmp_path, steps=1, trackers=["tensorboard"])
    run({**config, "monitor": {"prompts": ["ab", "cd"], "num_steps": 1, "guidance": 1}})
    assert "tracker" not in caplog.text
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = sorted({path.parent for path in tmp_path.rglob("events.out.tfevents*")})
    accumulators = [EventAccumulator(str(folder)).Reload() for folder in folders]
    (events,) = [events for events in accumulators if events.Tags()["images"]]
    images = events.Images("monitor")
    assert [(image.step, image.width, image.height) for image in images] == [(0, 16, 8), (1, 16, 8)]
    assert [scalar.step for scalar in events.Scalars("loss")] == [1]


def test_failing_tracker_only_warns(world, tmp_path, caplog, monkeypatch):
    from accelerate.tracking import TensorBoardTracker

    def fail(*args, **kwargs):
        raise AssertionError("tracker failed")

    for name in ("log", "log_images", "finish"):
        monkeypatch.setattr(TensorBoardTracker, name, fail)
    config = world.align_config(tmp_path, steps=1, trackers=["tensorboard"])
    assert run({**config, "monitor": {"prompts": ["ab"], "num_steps": 1, "guidance": 1}}).step == 1
    monkeypatch.setattr(TensorBoardTracker, "start", fail, raising=False)
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", fail)
    assert run(world.align_config(tmp_path / "2", steps=1, trackers=["tensorboard"])).step == 1
    failures = [m.split(" (")[0].split()[-1] for m in caplog.messages if "AssertionError: tracker failed" in m]
    assert failures == ["images", "metrics", "images", "finish", "start"]


def test_mfu_is_logged_from_second_step(world, tmp_path, monkeypatch):
    """Two steps of 0.1 s, as measured by a fake clock, on a device of 1 GFLOP/s."""
    clock = itertools.count(step=0.1)
    monkeypatch.setattr(utilization, "measured_peak", lambda device, dtype: 1e9)
    monkeypatch.setattr(utilization, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    run(world.align_config(tmp_path, steps=2, mfu=True, batch_size=3))
    first, second = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    backbone = tiny_backbone()
    count = FlopCount(backbone.denoiser, backbone.call, trains_weights=False)
    flops = count.of_call(torch.zeros(3, 4, 4, 4), Conditioning(torch.zeros(3, 4, 8)), backward=True)
    assert "mfu" not in first and second["mfu"] == pytest.approx(flops / 1e8, rel=1e-4)


def test_log_every_logs_mean_since_last_line(world, tmp_path):
    run(world.align_config(tmp_path / "each", steps=5))
    run(world.align_config(tmp_path / "some", steps=3, log_every=2, save_every=1))
    run(world.align_config(tmp_path / "some", steps=5, log_every=2), resume=tmp_path / "some")
    each, some = lines(tmp_path / "each"), lines(tmp_path / "some")
    assert [line["step"] for line in some] == [2, 3, 4, 5]
    for line, rows in zip(some, (each[:2], each[2:3], each[3:4], each[4:5]), strict=True):
        for key in ("loss", "noise_loss", "grad_norm"):
            assert line[key] == pytest.approx(sum(row[key] for row in rows) / len(rows))
        assert line["lr"] == rows[-1]["lr"]


def test_resume_restores_means_between_log_lines(world, tmp_path):
    config = load_config(world.align_config(tmp_path / "plain", steps=4, log_every=4))
    run(config)
    run(override(config, {"output": str(tmp_path / "saved"), "loop.save_every": 1, "loop.keep": None}))
    resumed = override(config, {"output": str(tmp_path / "resumed")})
    run(resumed, resume=tmp_path / "saved" / "checkpoint-000003")
    assert lines(tmp_path / "resumed") == lines(tmp_path / "plain") == lines(tmp_path / "saved")


def test_infinite_loss_raises_before_next_checkpoint(world, tmp_path, monkeypatch):
    from longalign.trainers.align.trainer import AlignTrainer

    loss, calls = AlignTrainer.loss, []

    def infinite(trainer, batch):
        calls.append(1)
        return {**loss(trainer, batch), "other_loss": torch.tensor(float("inf") if len(calls) == 3 else 0.0)}

    monkeypatch.setattr(AlignTrainer, "loss", infinite)
    with pytest.raises(RunError, match=r"'other_loss': inf.*\bstep 4\b.*batch\.json.*checkpoint-000002"):
        run(world.align_config(tmp_path, steps=8, log_every=8, save_every=2))
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
def test_out_of_memory_error_lists_keys_to_lower(world, tmp_path, error):
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
    message = str(caught.value)
    for key in ("loop.batch_size", "loop.gradient_checkpointing", "trainer.denoise_batch", "trainer.decode_batch"):
        assert key in message
    assert f"longalign train {tmp_path}/checkpoint-000002 --resume" in message and caught.value.__cause__ is error


def test_reward_error_is_reraised_with_resume_note(world, tmp_path):
    def failing(images, prompts):
        raise LookupError("custom")

    rewards.register("failing", failing)
    try:
        with pytest.raises(LookupError, match="custom") as caught:
            run({**world.reward_config(tmp_path), "rewards": ["failing"]})
    finally:
        rewards.unregister("failing")
    assert f"no checkpoint in {tmp_path}" in caught.value.__notes__[0]


def test_killed_data_worker_raises_with_loop_workers(world, tmp_path, monkeypatch):
    def killed(squares, index):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(world.Squares, "__getitem__", killed)
    with pytest.raises(RunError, match=r"DataLoader worker.*loop\.workers \(now 1\)"):
        run(world.align_config(tmp_path, workers=1))


def test_log_run_summary(world, tmp_path, caplog):
    caplog.set_level("INFO", "longalign")
    run(world.align_config(tmp_path, steps=2, batch_size=12, accumulation=2))
    values = {message.split()[0]: message for message in caplog.messages}
    assert "cpu" in values["device"] and str(tmp_path) in values["output"]
    assert re.search(r"\b10 items.*\b2 steps.*4\.80 epochs", values["data"])
    assert re.search("12 items.*2 micro-steps.*1 processes = 24", values["batch"])
    trainable = sum(p.numel() for p in build_from_config(world.align_config(tmp_path / "x")).trainer.trainable())
    assert f"{trainable:,} of " in values["trainable"]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert re.search(r"batch.*\b12\b.*\b10\b", warning)


def test_unused_weights_are_frozen_and_logged(world, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(SDBackbone, "unused_modules", r"conv_(in|out)")
    caplog.set_level("INFO", "longalign")
    config = override(world.align_config(tmp_path, steps=1), {"trainer.lora": None})
    trained = world.finished(config)
    number = sum(p.numel() for p in trained.composition.backbone.denoiser.parameters() if not p.requires_grad)
    assert number == 2 * (4 * 8 * 9) + 8 + 4
    (message,) = [message for message in caplog.messages if message.startswith("frozen")]
    assert f" {number:,} parameters" in message and message.endswith(" conv_in, conv_out")


def test_log_run_summary_warns_of_large_model_on_cpu(world, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("longalign.loop.header.LARGE", 100)
    run(world.align_config(tmp_path, steps=1))
    assert any("billion parameters" in message and "GPU" in message for message in caplog.messages)


def test_fit_bf16_with_gradient_checkpointing_and_tensorboard(world, tmp_path):
    loop = {"steps": 1, "precision": "bf16", "gradient_checkpointing": True, "trackers": ["tensorboard"]}
    trained = world.finished(world.align_config(tmp_path, **loop))
    assert trained.step == 1
    assert list(tmp_path.rglob("events.out.tfevents*"))
    assert {p.dtype for p in trained.optimization.parameters} == {torch.float32}
    run(world.align_config(tmp_path / "plain", steps=1))  # then full precision in the same process


class Compiled(torch.nn.Module):
    """Wraps a module as `torch.compile` does, without compiling; records its options and the grad mode of calls."""

    def __init__(self, module, **options):
        super().__init__()
        self._orig_mod, self.options, self.grad_modes = module, options, []

    def forward(self, *args, **kwargs):
        self.grad_modes.append(torch.is_grad_enabled())
        return self._orig_mod(*args, **kwargs)


def test_compile_trains_and_keeps_weight_names(world, tmp_path, monkeypatch):
    compiled = []

    def compile_module(module, **options):
        compiled.append(Compiled(module, **options))
        return compiled[0]

    plain = run(world.reward_config(tmp_path / "plain", steps=1))
    monkeypatch.setattr(torch, "compile", compile_module)
    result = world.finished(world.reward_config(tmp_path / "compiled", steps=1, compile=True))
    backbone = result.composition.backbone
    assert compiled[0]._orig_mod is backbone.denoiser and backbone.lora_names == ["reward"]
    assert compiled[0].options == {"backend": "inductor", "options": {"fallback_random": True}}
    assert compiled[0].grad_modes == [False, False, True]
    assert equal_tensors(weights(result.folder), weights(plain.checkpoint))


def test_regional_compile_compiles_blocks_until_end_of_run(world, tmp_path, monkeypatch):
    compiled = []

    def compile_forward(forward, **options):
        compiled.append(options)
        return lambda *args, **kwargs: forward(*args, **kwargs)

    plain = run(world.reward_config(tmp_path / "plain", steps=1))
    monkeypatch.setattr(torch, "compile", compile_forward)
    config = load_config(world.reward_config(tmp_path / "regional", steps=1, compile="regional"))
    regional = Run(config, Runtime())
    blocks = [m for m in regional.composition.backbone.denoiser.modules() if "forward" in vars(m)]
    assert {type(block).__name__ for block in blocks} == {"BasicTransformerBlock", "ResnetBlock2D"}
    assert compiled == [{"backend": "inductor", "options": {"fallback_random": True}}] * len(blocks)
    regional.train(lambda: False)
    regional.close()
    assert not any("forward" in vars(block) for block in blocks)
    assert equal_tensors(weights(regional.folder), weights(plain.checkpoint))


def test_compiler_uses_torch_backend():
    module = torch.nn.Linear(2, 2)
    compiled = compiler("eager")(module)
    assert torch.equal(compiled(torch.ones(1, 2)), module(torch.ones(1, 2))) and compiled is not module


def test_backbone_without_known_blocks_rejects_regional_compile():
    backbone = tiny_backbone()
    backbone.denoiser = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"_no_split_modules.*Linear.*loop\.compile"):
        backbone.compile_blocks(lambda forward: forward)


@pytest.mark.parametrize("lora", [{"rank": 2, "dropout": 0}, None])
def test_channels_last_keeps_losses_and_checkpoint(world, tmp_path, lora):
    losses, saved = [], {}
    for name, settings in (("plain", {}), ("last", {"channels_last": True})):
        config = world.align_config(tmp_path / name, steps=2, lr=1e-3, **settings)
        trained = world.finished({**config, "trainer": {"name": "align", "lora": lora}})
        saved, composition = weights(trained.folder), trained.composition
        losses.append([line["loss"] for line in lines(tmp_path / name)])
        for part in (composition.backbone.denoiser, composition.backbone.vae.decoder):
            kernels = [p for p in part.parameters() if p.ndim == 4 and min(p.shape[1], *p.shape[2:]) > 1]
            assert kernels
            assert all(p.is_contiguous(memory_format=torch.channels_last) == bool(settings) for p in kernels)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    trainable = {k: p for k, p in composition.backbone.denoiser.named_parameters() if p.requires_grad}
    expected = {f"lora.0.{k.replace('.align.', '.')}" if lora else f"denoiser.{k}": p for k, p in trainable.items()}
    assert expected and all(torch.equal(saved[key], parameter) for key, parameter in expected.items())


def test_config_rejects_unsupported_channels_last_and_compile(world, tmp_path):
    config = world.align_config(tmp_path, channels_last=True)
    with pytest.raises(ConfigError, match=r"loop\.channels_last: .*'sd3'"):
        load_config({**config, "backbone": {"name": "sd3", "checkpoint": "x"}})
    denscore = Path(__file__).parents[2] / "examples" / "longalign-denscore.yaml"
    with pytest.raises(ConfigError, match=r"loop\.compile: .*'denscore'.*"):
        override(denscore, {"loop.compile": True})
    backbone = tiny_backbone()
    backbone.denoiser = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"convolutions.*Linear"):
        backbone.use_channels_last()
    with pytest.raises(ConfigError, match=r"loop\.compile"):
        load_config(world.align_config(tmp_path, compile="fast"))


def test_fit_rejects_accelerate_dynamo_backend(world, tmp_path, monkeypatch):
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    with pytest.raises(ValueError, match=r"dynamo_backend is EAGER.*'no'.*loop\.compile"):
        run(world.align_config(tmp_path))


def test_fit_missing_tracker_package_raises(monkeypatch, world, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'wandb'.*pip install wandb"):
        run(world.align_config(tmp_path, trackers=["wandb"]))


@pytest.mark.parametrize("clip", [None, 1.0])
def test_non_finite_gradient_raises_before_optimizer_step(world, tmp_path, clip):
    run = Run(load_config(world.align_config(tmp_path, lr=1e30, clip=clip, steps=4)), Runtime())
    with pytest.raises(RunError, match=rf"gradient.*\bstep 2\b.*batch\.json.*no checkpoint in {tmp_path}"):
        run.train(lambda: False)
    run.close()
    batch = json.loads((tmp_path / "non-finite" / "process-0" / "batch.json").read_text())
    assert batch["step"] == 2 and len(batch["prompts"][0]) == 3
    assert all(p.isfinite().all() for p in run.optimization.parameters)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_truncated_prompts_warn_once_and_are_counted(world, tmp_path):
    class TruncatingEncoder(world.ToyEncoder):
        """Reports every second prompt as truncated."""

        def encode(self, prompts):
            reports = [PromptReport((p,), (1,), "end" if i % 2 else "") for i, p in enumerate(prompts)]
            raise_or_warn_truncated(reports, "truncate", "4 tokens", f"a different advice for {prompts}")
            return replace(super().encode(prompts), reports=tuple(reports))

    class TruncatingConfig(EncoderConfig):
        name: str = "truncating"

        def build(self, runtime):
            return TruncatingEncoder()

    encoders.register("truncating", TruncatingConfig)
    try:
        with pytest.warns(TruncationWarning) as caught:
            run({**world.align_config(tmp_path), "encoder": "truncating"})
    finally:
        encoders.unregister("truncating")
    assert len([w for w in caught if w.category is TruncationWarning]) == 1
    assert [line["truncated_prompts"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_resume_rejects_changed_workers_of_stream(world, tmp_path):
    class Endless(Stream):
        num_shards = 2

        def items(self, seed, part=0, num_parts=1, skip=0, images=True, batch_size=1):
            yield from (world.Squares()[i % 10] for i in itertools.count(skip))

    class EndlessConfig(DataConfig):
        name: str = "endless"

        def build(self, runtime):
            return Endless(resolution=8, empty="skip", max_unreadable=0, shuffle_buffer=1)

    data.register("endless", EndlessConfig)
    try:
        config = {**world.align_config(tmp_path, steps=2), "data": "endless"}
        run(config)
        with pytest.raises(ValueError, match=r"loop\.workers.*\b0\b.*\b2\b"):
            run(override(config, {"loop.workers": 2, "loop.steps": 4}), resume=tmp_path)
    finally:
        data.unregister("endless")


def test_batches_split_each_epoch_over_processes():
    single = iter(Batches(12, 4, seed=0))
    pair = [iter(Batches(12, 2, seed=0, rank=rank, world_size=2)) for rank in range(2)]
    for _ in range(7):
        assert next(single) == [i for batches in pair for i in next(batches)]
    batches = iter(Batches(12, 4, seed=0))
    epochs = [[i for _ in range(3) for i in next(batches)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12)) and epochs[0] != epochs[1]


def test_batches_start_at_any_step():
    batches = iter(Batches(5, 2, seed=1))
    from_start = [next(batches) for _ in range(6)]
    later = iter(Batches(5, 2, seed=1, start=4))
    assert [next(later), next(later)] == from_start[4:]
    other_seed = iter(Batches(5, 2, seed=2))
    assert [next(other_seed) for _ in range(6)] != from_start
    with pytest.raises(ValueError, match="empty"):
        Batches(0, 2, seed=0)


def test_load_batches_with_and_without_images(world):
    before = torch.get_rng_state()
    batch = next(load_batches(world.Squares(), Batches(10, 2, seed=0), True, 0))
    assert batch["image"].shape == (2, 3, 8, 8) and len(batch["prompt"]) == 2
    assert set(next(load_batches(world.Squares(), Batches(10, 2, seed=0), False, 0))) == {"prompt"}
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match=r"images.*prompts"):
        load_batches(world.BareWords(), Batches(10, 2, seed=0), True, 0)
    with pytest.raises(ValueError, match=r"got \[\(3, 4, 4\), \(3, 8, 8\)\].*resolution"):
        collate([{"prompt": "a", "image": torch.zeros(3, 8, 8)}, {"prompt": "b", "image": torch.zeros(3, 4, 4)}])


def test_set_random_state_restores_generators():
    import random

    import numpy as np

    state = random_state()
    numbers = (random.random(), np.random.rand(), torch.rand(1).item())
    set_random_state(state)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == numbers
