import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from longalign import build_from_config, fit, load_config, override
from longalign.checkpoints.checkpoint import load_weights
from longalign.config.run import to_dict
from longalign.demo import default_config
from longalign.registry import rewards
from longalign.runtime import examples_folder
from longalign.testing.tiny import tiny_clip, tiny_sd, tiny_sd3, tiny_sdxl, tiny_t5

EXAMPLES = Path(__file__).parent.parent / "examples"
YAMLS = sorted(EXAMPLES.glob("*.yaml"))


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_example_configs_round_trip(path):
    config = load_config(path)
    assert load_config(to_dict(config)) == config


def test_examples_folder_in_checkout_or_package(monkeypatch, tmp_path):
    assert sorted(p.name for p in examples_folder().glob("*.yaml")) == [p.name for p in YAMLS]
    assert default_config("align") == examples_folder() / "mini-align.yaml"
    package = tmp_path / "site-packages" / "longalign"
    monkeypatch.setattr("longalign.runtime.resources.files", lambda name: package)
    with pytest.raises(ValueError, match="site-packages"):
        examples_folder()
    for folder in (package.parent / "examples", package / "examples"):
        folder.mkdir(parents=True)
        (folder / "mini-align.yaml").touch()
        assert examples_folder() == folder


def test_longalign_sd15_configs_match_paper():
    stages = ("align", "reward", "lcm", "lcm-reward")
    align, reward, lcm, lcm_reward = (load_config(EXAMPLES / f"longalign-sd15-{stage}.yaml") for stage in stages)
    for config, batch, steps in ((align, 192, 28750), (reward, 48, 3750), (lcm, 192, 28750), (lcm_reward, 96, 3750)):
        loop = config.loop
        assert 6 * loop.batch_size * loop.accumulation == batch and loop.steps == steps
        assert (loop.lr, loop.betas, loop.weight_decay, loop.clip) == (3e-5, (0.9, 0.999), 1e-2, 0.3)
        assert config.trainer.lora.model_dump() == {
            "rank": 32, "scale": 1.0, "targets": None, "dropout": 0.1, "dropout_placement": "up"
        }  # fmt: skip
    assert (align.trainer.caption_dropout, align.trainer.train_adapter, align.loop.warmup) == (0.1, True, 2000)
    assert (reward.trainer.num_steps, reward.trainer.guidance, reward.trainer.gradient_steps.groups) == (50, 7.5, 5)
    assert not reward.trainer.train_adapter and reward.rewards[0].omega == 0.3
    assert reward.init_from == align.output and reward.encoder == align.encoder
    scorer = reward.rewards[0].inner
    assert scorer.truncate_segments and align.encoder.parts[0].truncate_segments
    assert (scorer.crop, scorer.crop_position, scorer.interpolation) == (504, "batch", "bilinear")
    distilled = lcm.trainer
    assert (distilled.num_ddim_timesteps, distilled.start_timesteps) == (50, "all")
    assert (1 + distilled.w_min, 1 + distilled.w_max) == (7.5, 7.5)
    assert (distilled.huber_c, distilled.ema_decay, distilled.timestep_scaling_factor) == (0.001, None, 10.0)
    few_step = lcm_reward.trainer
    assert (few_step.num_steps, few_step.guidance, few_step.gradient_steps.name, few_step.train_adapter) == (
        4,
        1.0,
        "all",
        False,
    )
    assert lcm.init_from == align.output and lcm_reward.init_from == lcm.output
    assert lcm_reward.rewards == reward.rewards and lcm.encoder == lcm_reward.encoder == align.encoder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    for i in range(2):
        Image.new("RGB", (64, 64), (80 * i, 90, 100)).save(folder / f"{i}.png")
    lines = [f'{{"file_name": "{i}.png", "text": "A red fox sleeps on a wall. The sky is {c}."}}\n'
             for i, c in enumerate(("green", "red"))]  # fmt: skip
    (folder / "metadata.jsonl").write_text("".join(lines))
    (folder / "prompts.txt").write_text("A red fox sleeps on a wall.\nThe sky is green. A wall.\n")
    return {
        "sd": str(tiny_sd(folder / "sd")), "t5": str(tiny_t5(folder / "t5")), "clip": str(tiny_clip(folder / "clip")),
        "folder": str(folder),
    }  # fmt: skip


def test_longalign_sd15_configs_train_on_tiny_checkpoints(weights, tmp_path):
    tiny = {
        "backbone.checkpoint": weights["sd"],
        "encoder.parts.0.checkpoint": weights["sd"],
        "encoder.parts.1.checkpoint": weights["t5"],
        "encoder.parts.1.adapter": {"name": "lavi-bridge", "in_dim": 16, "int_dim": 24, "out_dim": 16},
        "loop.steps": 1,
        "loop.batch_size": 2,
        "loop.accumulation": 1,
        "loop.workers": 0,
        "loop.precision": "no",
    }
    data = {"data.folder": weights["folder"], "data.resolution": 64, "output": str(tmp_path / "align")}
    align = build_from_config(override(EXAMPLES / "longalign-sd15-align.yaml", {**tiny, **data}))
    conditioning = align.encoder.encode(["A red fox sleeps on a wall. The sky is green."])
    assert conditioning.states.shape == (1, 480, 16) and conditioning.mask is None
    before = {k: p.detach().clone() for k, p in align.encoder.named_parameters() if p.requires_grad}
    aligned = fit(align.config)
    stage_one = load_weights(aligned.checkpoint)
    assert [lora.name for lora in stage_one.loras] == ["align"] and before.keys() == stage_one.adapter.keys()
    assert any(not torch.equal(before[k], v) for k, v in stage_one.adapter.items())

    sampled = {
        "rewards.0.inner.checkpoint": weights["clip"],
        "rewards.0.inner.crop": 60,
        "trainer.num_steps": 5,
        "data.file": str(Path(weights["folder"]) / "prompts.txt"),
        "output": str(tmp_path / "reward"),
        "init_from": str(aligned.checkpoint),
    }
    rewarded = fit(override(EXAMPLES / "longalign-sd15-reward.yaml", {**tiny, **sampled}))
    stage_two = load_weights(rewarded.checkpoint)
    assert [lora.name for lora in stage_two.loras] == ["align", "reward"]
    for key, value in stage_one.adapter.items():
        torch.testing.assert_close(stage_two.adapter[key], value)

    lcm_changes = {**tiny, **data, "output": str(tmp_path / "lcm"), "init_from": str(aligned.checkpoint)}
    distilled = fit(override(EXAMPLES / "longalign-sd15-lcm.yaml", lcm_changes))
    lcm_reward_changes = {
        **sampled,
        "trainer.num_steps": 4,
        "output": str(tmp_path / "few"),
        "init_from": str(distilled.checkpoint),
    }
    lcm_rewarded = fit(override(EXAMPLES / "longalign-sd15-lcm-reward.yaml", {**tiny, **lcm_reward_changes}))
    stage_three = load_weights(lcm_rewarded.checkpoint)
    assert [lora.name for lora in stage_three.loras] == ["align", "lcm", "reward"]
    for key, value in stage_one.adapter.items():
        torch.testing.assert_close(stage_three.adapter[key], value)


def test_longalign_sd3_configs_train_on_tiny_checkpoints(weights, tmp_path):
    align, reward = (load_config(EXAMPLES / f"longalign-sd3-{stage}.yaml") for stage in ("align", "reward"))
    for config, batch, steps in ((align, 192, 28750), (reward, 48, 3750)):
        assert 8 * config.loop.batch_size * config.loop.accumulation == batch and config.loop.steps == steps
    assert reward.init_from == align.output and reward.encoder == align.encoder and reward.backbone == align.backbone
    model = str(tiny_sd3(tmp_path / "sd3"))
    sizes = {"max_tokens": 60, "t5_tokens": 60, "width": 32}
    tiny = {
        "backbone": {**to_dict(align)["backbone"], "checkpoint": model, "dtype": "float32"},
        "encoder": {**to_dict(align)["encoder"], "checkpoint": model, **sizes},
        "loop.steps": 1, "loop.batch_size": 2, "loop.accumulation": 1, "loop.workers": 0, "loop.precision": "no",
    }  # fmt: skip
    data = {"data.folder": weights["folder"], "data.resolution": 64, "output": str(tmp_path / "align")}
    aligned = fit(override(align, {**tiny, **data})).checkpoint
    sampled = {
        "rewards.0.inner.checkpoint": weights["clip"], "rewards.0.inner.crop": 60, "trainer.num_steps": 4,
        "trainer.resolution": 64, "data.file": str(Path(weights["folder"]) / "prompts.txt"),
        "output": str(tmp_path / "reward"), "init_from": str(aligned),
    }  # fmt: skip
    rewarded = fit(override(reward, {**tiny, **sampled})).checkpoint
    loras = load_weights(rewarded).loras
    assert [lora.name for lora in loras] == ["align", "reward"]
    assert all(any("lora_B" in k and v.any() for k, v in lora.state.items()) for lora in loras)


# the tiny tokenizer splits captions into more tokens than the bundled one
@pytest.mark.filterwarnings("ignore::longalign.encoders.base.TruncationWarning")
def test_mini_lcm_configs_train_on_tiny_checkpoints(weights, tmp_path):
    tiny = {
        "backbone.checkpoint": weights["sd"], "encoder.checkpoint": weights["sd"], "trainer.lora.rank": 2,
        "loop.steps": 1, "loop.batch_size": 2,
    }  # fmt: skip
    result = fit(override(EXAMPLES / "mini-align.yaml", {**tiny, "output": str(tmp_path / "align")}))
    for name in ("lcm", "lcm-reward"):
        config = override(EXAMPLES / f"mini-{name}.yaml", {**tiny, "output": str(tmp_path / name)})
        reward = {"rewards.0.inner.checkpoint": weights["clip"]} if config.rewards else {}
        result = fit(override(config, {**reward, "init_from": str(result.checkpoint)}))
    assert [lora.name for lora in load_weights(result.checkpoint).loras] == ["align", "lcm", "reward"]


def test_denscore_configs_train_on_tiny_checkpoints(weights, tmp_path):
    tiny = {"rewards.0.checkpoint": weights["clip"], "loop.steps": 1, "loop.batch_size": 2, "loop.workers": 0}
    config = override(EXAMPLES / "mini-denscore.yaml", {**tiny, "output": str(tmp_path / "mini")})
    trained = fit(config).checkpoint / "reward"
    rows = [
        {"image_0": "0.png", "image_1": "1.png", "text": "A red fox. The sky is green.", "label_0": 1, "label_1": 0}
    ]
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    for name in ("0.png", "1.png"):
        shutil.copy(Path(weights["folder"]) / name, folder / name)
    full = load_config(EXAMPLES / "longalign-denscore.yaml")
    assert 8 * full.loop.batch_size == 128 and full.data.images == ("jpg_0", "jpg_1")
    changes = {**tiny, "rewards.0.checkpoint": str(trained), "loop.precision": "no", "output": str(tmp_path / "full")}
    result = fit(override(full, {**changes, "data": {"name": "pairs", "folder": str(folder)}}))
    reward = rewards.build({"name": "denscore", "checkpoint": str(result.checkpoint / "reward")})
    assert reward.score(torch.rand(1, 3, 64, 64), ["A red fox. The sky is green."]).shape == (1,)


SINGLE_GPU = sorted(EXAMPLES.glob("*-24gb.yaml"))


@pytest.mark.parametrize("path", SINGLE_GPU, ids=lambda path: path.stem)
def test_24gb_configs_match_memory_table(path):
    """The file states the table's value, which leaves at least 4 GiB for memory that the table does not count."""
    table = (EXAMPLES.parent / "benchmarks" / "memory.md").read_text()
    (row,) = re.findall(rf"^\| `{path.name}` \| (\d+) \|.*\| ([\d.]+) \|$", table, re.MULTILINE)
    config = load_config(path)
    assert int(row[0]) == config.loop.batch_size and float(row[1]) <= 20
    assert f"computed: {row[1]} GiB" in path.read_text()
    assert config.backbone.dtype == "bfloat16" and config.loop.precision == "bf16"


def test_24gb_configs_train_on_tiny_checkpoints(weights, tmp_path):
    common = {
        "loop.steps": 1, "loop.batch_size": 2, "loop.accumulation": 1, "loop.workers": 0, "loop.precision": "no",
        "backbone.dtype": "float32",
    }  # fmt: skip
    folder = {"data.folder": weights["folder"], "data.resolution": 64}
    tiny = {
        **common, "backbone.checkpoint": weights["sd"], "encoder.parts.0.checkpoint": weights["sd"],
        "encoder.parts.1.checkpoint": weights["t5"],
        "encoder.parts.1.adapter": {"name": "lavi-bridge", "in_dim": 16, "int_dim": 24, "out_dim": 16},
    }  # fmt: skip
    align, reward = (load_config(EXAMPLES / f"sd15-{stage}-24gb.yaml") for stage in ("align", "reward"))
    assert reward.init_from == align.output and reward.encoder == align.encoder and reward.backbone == align.backbone
    aligned = fit(override(align, {**tiny, **folder, "output": str(tmp_path / "align")}))
    sampled = {
        "rewards.0.inner.checkpoint": weights["clip"], "trainer.num_steps": 5, "output": str(tmp_path / "reward"),
        "data.file": str(Path(weights["folder"]) / "prompts.txt"), "init_from": str(aligned.checkpoint),
    }  # fmt: skip
    rewarded = fit(override(reward, {**tiny, **sampled}))
    assert [lora.name for lora in load_weights(rewarded.checkpoint).loras] == ["align", "reward"]

    sdxl = str(tiny_sdxl(tmp_path / "sdxl"))
    changes = {**common, **folder, "backbone.checkpoint": sdxl, "encoder.checkpoint": sdxl}
    large = override(EXAMPLES / "sdxl-align-24gb.yaml", {**changes, "output": str(tmp_path / "sdxl-run")})
    assert fit(large).step == 1
