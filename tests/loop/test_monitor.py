"""The monitor of a run: points, log, resuming, best checkpoint, early stopping, errors."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file

from longalign.config.changes import override
from longalign.config.run import load_config
from longalign.errors import ConfigError
from longalign.files.paths import checkpoint_file
from longalign.image_folder import read_images
from longalign.loop.fit import fit
from longalign.loop.monitor import Monitor, by_prompt, training_values
from longalign.loop.run import Run
from longalign.registry import metrics
from longalign.runtime import Runtime

RED = {"name": "reward", "reward": "red"}
TIMES = ("seconds", "monitor/seconds", "monitor/share_of_time")


def monitor(**changed):
    return {"prompts": ["ab", "cd"], "every": 1, "num_steps": 2, "guidance": 2.0, "metrics": [RED], **changed}


def lines(output):
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def points(output):
    return {line["step"]: line for line in lines(output) if any(k.startswith("monitor/") for k in line)}


def names(output):
    return sorted(p.name for p in output.glob("checkpoint-*"))


@pytest.fixture
def scripted(monkeypatch):
    """Function that sets the values of ``red`` and ``bright`` at each point."""

    def register(values, guard=None):
        from longalign.loop import monitor as module

        real = module.summarize

        def summarize(images, prompts, built, *args):
            found = real(images, prompts, built, *args)
            step = len(seen)
            seen.append(step)
            replaced = {"red": values[step]} | ({"bright": guard[step]} if guard else {})
            return {k: type(v)(replaced.get(k, v.mean), v.shown, v.rows) for k, v in found.items()}

        seen = []
        monkeypatch.setattr(module, "summarize", summarize)

    return register


def test_monitor_does_not_change_training(world, tmp_path):
    watched, plain = tmp_path / "watched", tmp_path / "plain"
    run = fit({**world.reward_config(watched, steps=2), "monitor": monitor(seeds=[3, 5], batch_size=3)})
    other = fit(world.reward_config(plain, steps=2))
    assert [line for line in lines(watched) if "loss" in line] == lines(plain)
    one, two = (load_file(result.checkpoint / "longalign.safetensors") for result in (run, other))
    assert all(torch.equal(one[k], two[k]) for k in two)
    assert sorted(p.name for p in (watched / "monitor").iterdir()) == ["000000", "000001", "000002"]
    listed = read_images(watched / "monitor" / "000001")
    assert [(path.name, prompt, seed) for path, prompt, seed in listed] == [
        (f"{i:05d}-{seed}.png", prompt, seed) for i, prompt in enumerate(["ab", "cd"]) for seed in (3, 5)
    ]


def test_monitor_logs_metrics_beside_training_reward_and_its_cost(world, tmp_path, caplog):
    caplog.set_level("INFO", "longalign")
    reward = [{"name": "sum", "terms": [{"reward": "red"}]}]
    fit({**world.reward_config(tmp_path, steps=4), "rewards": reward, "monitor": monitor(every=2)})
    found = points(tmp_path)
    training = [line for line in lines(tmp_path) if "loss" in line]
    assert list(found) == [0, 2, 4] and set(found[0]) == {"step", "monitor/red"}
    for step, line in list(found.items())[1:]:
        assert set(line) == {"step", "monitor/red", "monitor/training/reward"}
        mean = sum(row["reward"] for row in training[step - 2 : step]) / 2
        assert line["monitor/training/reward"] == pytest.approx(mean)
    raw = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(0 < row["monitor/share_of_time"] <= 1 for row in raw if "monitor/red" in row)
    assert any("monitor took" in message and "%)" in message for message in caplog.messages)
    assert any(
        message.startswith("monitor ") and "2 images every 2 steps: red" in message for message in caplog.messages
    )
    shown = [message for message in caplog.messages if "held-out" in message]
    assert shown == [f"step {step}, held-out: red {line['monitor/red']:.4g}" for step, line in found.items()]


def test_training_values_divide_text_irrelevant_part_by_score():
    means = {"reward": 0.5, "0/text_relevant": 0.1, "0/text_irrelevant": 0.3, "text_irrelevant": 1.0}
    means |= {"1/text_relevant": -2.0, "1/text_irrelevant": 1.0}
    assert training_values(means) == {"reward": 0.5, "0/text_irrelevant_share": pytest.approx(0.75)}
    assert training_values({"noise_loss": 1.0}) == {}


def test_by_prompt_means_known_values():
    rows = torch.tensor([1.0, 3.0, float("nan"), 2.0, float("nan"), float("nan")]).numpy()
    means = by_prompt(rows, 2)
    assert means[:2] == [2.0, 2.0] and means[2] != means[2]


@pytest.mark.parametrize("ema", [None, 0.5])
def test_monitor_resume_equals_uninterrupted_bit_by_bit(world, tmp_path, ema):
    section = monitor(keep_best={"metric": "red"}, early_stop={"metric": "red", "patience": 50})
    make = lambda name, **loop: {  # noqa: E731
        **world.reward_config(tmp_path / name, **{"steps": 5, "save_every": 1, "keep": 1, "ema": ema, **loop}),
        "monitor": {**section, "every": 2},
    }
    fit(make("plain"))
    fit(make("resumed", steps=3, keep=None))
    fit(make("resumed", keep=1), resume=tmp_path / "resumed" / "checkpoint-000002")
    assert lines(tmp_path / "plain") == lines(tmp_path / "resumed")
    assert list(points(tmp_path / "plain")) == [0, 2, 4, 5]
    states = [
        torch.load(tmp_path / name / "checkpoint-000005" / "resume" / "shared.pt", weights_only=True)["monitor"]
        for name in ("plain", "resumed")
    ]
    assert states[0] == states[1] and [point["step"] for point in states[0]["points"]] == [0, 2, 4, 5]
    assert (tmp_path / "plain" / "best").readlink() == (tmp_path / "resumed" / "best").readlink()


def test_interrupted_before_its_point_measures_it_when_resumed(world, tmp_path, monkeypatch):
    config = {
        **world.reward_config(tmp_path, steps=2, save_every=None),
        "monitor": monitor(keep_best={"metric": "red"}),
    }
    run = Run(load_config(config), Runtime())
    run.train(lambda: run.step == 1)
    run.close()
    assert list(points(tmp_path)) == [0] and names(tmp_path) == ["checkpoint-000001"]
    fit(config, resume=tmp_path)
    assert list(points(tmp_path)) == [0, 1, 2]


def test_failing_monitor_saves_training_first_and_measures_when_resumed(world, tmp_path, monkeypatch):
    measure = Monitor._measure

    def failing(self, step, training):
        if step == 3:
            raise RuntimeError("no value")
        return measure(self, step, training)

    monkeypatch.setattr(Monitor, "_measure", failing)
    config = {**world.reward_config(tmp_path, steps=3, save_every=None), "monitor": monitor(every=100)}
    with pytest.raises(RuntimeError, match="no value") as caught:
        fit(config)
    assert f"longalign train {tmp_path}/checkpoint-000003 --resume" in caught.value.__notes__[0]
    monkeypatch.undo()
    assert fit(config, resume=tmp_path).step == 3
    assert list(points(tmp_path)) == [0, 3]
    before = (tmp_path / "checkpoint-000003" / "resume" / "shared.pt").stat().st_mtime_ns
    fit(config, resume=tmp_path)
    assert (tmp_path / "checkpoint-000003" / "resume" / "shared.pt").stat().st_mtime_ns == before


def test_keep_best_survives_rotation_and_respects_guard(world, tmp_path, scripted):
    metrics.register("bright", lambda images, prompts: {"bright": images.mean((1, 2, 3))})
    try:
        # step 4 has the highest value, but its guard is 0.3 worse than at the start
        scripted([0.1, 0.2, 0.5, 0.4, 0.9, 0.3], [1.0, 0.9, 0.95, 1.0, 0.7, 1.0])
        best = {"metric": "red", "guard": {"metric": "bright", "at_most_worse": 0.2}}
        section = monitor(metrics=[RED, "bright"], keep_best=best)
        config = {**world.reward_config(tmp_path, steps=5, save_every=None, keep=1), "monitor": section}
        fit(config)
    finally:
        metrics.unregister("bright")
    assert names(tmp_path) == ["checkpoint-000002", "checkpoint-000005"]
    assert (tmp_path / "best").resolve() == tmp_path / "checkpoint-000002"
    assert checkpoint_file(tmp_path).parent.name == "checkpoint-000005"  # the newest, as before
    assert (checkpoint_file(tmp_path / "best")).is_file()
    assert not list(tmp_path.glob(".best*"))


def test_keep_best_link_is_restored_after_kill_and_best_can_be_resumed(world, tmp_path, scripted, monkeypatch):
    scripted([0.1, 0.2, 0.5, 0.4, 0.3, 0.2])
    config = {**world.reward_config(tmp_path, steps=2, keep=1), "monitor": monitor(keep_best={"metric": "red"})}
    fit(config)
    (tmp_path / "best").unlink()
    (tmp_path / ".best.unfinished").symlink_to("nowhere")
    fit(override(load_config(config), {"loop.steps": 4}), resume=tmp_path)
    assert (tmp_path / "best").readlink().name == "checkpoint-000002"
    assert names(tmp_path) == ["checkpoint-000002", "checkpoint-000004"]
    resumed = fit(override(load_config(config), {"loop.steps": 3}), resume=tmp_path / "best")
    assert resumed.checkpoint.name == "checkpoint-000003"


def test_early_stop_ends_run_and_stays_ended(world, tmp_path, scripted):
    scripted([0.1, 0.5, 0.4, 0.3, 0.2])
    section = monitor(early_stop={"metric": "red", "patience": 2})
    config = {**world.reward_config(tmp_path, steps=9, save_every=None), "monitor": section}
    result = fit(config)
    assert (result.step, result.interrupted, result.checkpoint.name) == (3, False, "checkpoint-000003")
    again = fit(config, resume=tmp_path)
    assert (again.step, again.interrupted) == (3, False)


def test_monitor_settings_changed_on_resume_drop_points(world, tmp_path, caplog):
    config = load_config({**world.reward_config(tmp_path, steps=1), "monitor": monitor()})
    fit(config)
    fit(override(config, {"loop.steps": 2, "monitor.window": 2}), resume=tmp_path)
    assert "earlier measurements" not in caplog.text
    fit(override(config, {"loop.steps": 3, "monitor.num_steps": 1}), resume=tmp_path)
    assert "earlier measurements" in caplog.text


def test_monitor_rejects_unknown_value_and_gauge_before_training(world, tmp_path):
    for name, choice, message in (("a", "red.text_relevant", "measures red"), ("b", "gauges.dark", "one of red")):
        section = monitor(metrics=[RED, "gauges"] if name == "b" else [RED], keep_best={"metric": choice})
        with pytest.raises(ValueError, match=rf"monitor\.keep_best\.metric.*'{choice}'.*{message}"):
            fit({**world.reward_config(tmp_path / name), "monitor": section})
        assert not names(tmp_path / name)


def test_monitor_warns_of_rising_reward_with_falling_metric(world, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("longalign.loop.monitor.divergences", lambda points, window: [f"{len(points)} {window}"])
    caplog.set_level(logging.WARNING, "longalign")
    fit({**world.reward_config(tmp_path, steps=1), "monitor": monitor(window=7)})
    assert [m for m in caplog.messages if m.endswith(" 7")] == ["1 7", "2 7"]


def test_fit_missing_monitor_file_raises_before_building(world, tmp_path):
    config = load_config({**world.align_config(tmp_path), "monitor": {"prompts": "nope.txt"}})
    for training in (fit, lambda config: Run(config, Runtime())):
        with pytest.raises((ConfigError, FileNotFoundError), match=r"nope\.txt"):
            training(config)
    assert not list(tmp_path.iterdir())


def test_monitor_measures_facts_of_mini_scenes(tmp_path):
    scenes = {"name": "scenes", "seed": 1000001, "size": 3, "objects": [1, 2], "words": [10, 20]}
    config = {
        "backbone": {"name": "sd", "checkpoint": "mini/sd"},
        "encoder": {"name": "clip-segment", "checkpoint": "mini/sd"},
        "rewards": [{"name": "reweighted", "inner": {"name": "denscore", "checkpoint": "mini/denscore"}}],
        "trainer": {
            "name": "reward",
            "lora": {"rank": 2},
            "num_steps": 2,
            "guidance": 1.0,
            "gradient_steps": {"name": "last", "k": 1},
        },
        "data": {**scenes, "seed": 2, "size": 100},
        "loop": {"steps": 1, "batch_size": 2, "lr": 1e-4, "log_every": 1},
        "monitor": {"data": scenes, "limit": 2, "num_steps": 2, "guidance": 1.0, "metrics": []},
        "output": str(tmp_path),
    }
    config["monitor"]["metrics"] = [{"name": "facts", "data": scenes}, "gauges"]
    config["monitor"]["keep_best"] = {"metric": "facts"}
    fit(config)
    start, end = points(tmp_path).values()
    assert 0 <= start["monitor/facts"] <= 1 and "monitor/gauges.dark" in start
    assert 0 < end["monitor/training/text_irrelevant_share"] < 1
    assert (tmp_path / "best").readlink().name == "checkpoint-000001"
    assert len(read_images(tmp_path / "monitor" / "000001")) == 2
