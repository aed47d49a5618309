import json
import re
from html import escape

import numpy as np
import pytest
from PIL import Image

from longalign.config.changes import override
from longalign.demo import (
    HELD_OUT,
    default_config,
    held_out_captions,
    image_folder,
    prepare_output_dir,
    reward_runs,
    run_demo,
)
from longalign.evaluation.comparison import findings
from longalign.testing.tiny import tiny_clip, tiny_sd

MODELS = ["truncated", "segments", "align", "align+reward, omega 1", "align+reward, omega 0.3"]


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    sd, clip = str(tiny_sd(folder / "sd")), str(tiny_clip(folder / "clip"))
    common = {
        "backbone.checkpoint": sd,
        "encoder.checkpoint": sd,
        "encoder.overflow": "grow",
        "trainer.lora.rank": 2,
        "data.size": 16,
        "data.words": [60, 90],
        "loop.batch_size": 2,
        "loop.log_every": 1,
        "loop.steps": 2,
    }
    align = override(default_config("align"), common)
    sampled = {"trainer.num_steps": 4, "rewards.0.inner.checkpoint": clip}
    return align, override(default_config("reward"), {**common, **sampled})


@pytest.fixture(scope="module")
def demo(configs, tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "out"
    return run_demo(output, *configs, prompts=4, num_steps=2, batch_size=4, examples=2), output


def test_run_demo_measures_all_models_on_same_captions(demo, configs):
    result, _ = demo
    assert result.table.models == MODELS
    assert result.table.metrics == [
        "facts",
        "denscore.text_relevant",
        "denscore.text_irrelevant",
        "held-out pickscore.text_relevant",
        "held-out pickscore.text_irrelevant",
        "look.dark",
        "look.warmth",
    ]
    assert result.table.prompts == [c.text for c in held_out_captions(configs, 4)]
    stages = [*(f"{model}: training" for model in MODELS[2:]), *(f"{model}: sampling" for model in MODELS)]
    assert list(result.seconds) == [*stages, "measuring", "total"]


def test_run_demo_compares_with_previous_stage(demo):
    table = demo[0].table
    assert [pair for pair in table.pairs if pair[1] != "truncated"] == [
        ("align", "segments"),
        ("align+reward, omega 1", "align"),
        ("align+reward, omega 0.3", "align+reward, omega 1"),
    ]
    # same weights and noise; only the encoded text differs
    rows = [table.row(model, "denscore.text_relevant") for model in ("truncated", "segments")]
    assert not np.array_equal(*rows)


def test_reward_runs_have_omega_one_then_the_configured(configs, tmp_path):
    reward = configs[1]
    runs = reward_runs(reward, tmp_path)
    assert [(name, run.rewards[0].omega) for name, run in runs.items()] == list(zip(MODELS[3:], (1, 0.3), strict=True))
    # the reward stage as configured is in the folder "reward"
    assert [run.output for run in runs.values()] == [str(tmp_path / "reward-omega-1"), str(tmp_path / "reward")]
    plain = override(reward, {"rewards": [reward.rewards[0].inner]})
    for one in (override(reward, {"rewards.0.omega": 1}), plain):
        assert [(name, run.rewards) for name, run in reward_runs(one, tmp_path).items()] == [
            ("align+reward", one.rewards)
        ]


def test_run_demo_writes_all_images(demo, configs):
    _, output = demo
    texts = [c.text for c in held_out_captions(configs, 4)]
    for model in MODELS:
        folder = output / "images" / image_folder(model)
        rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        assert [(row["prompt"], row["seed"]) for row in rows] == list(zip(texts, range(4), strict=True))
        for row in rows:
            with Image.open(folder / row["file_name"]) as image:
                assert image.text["prompt"] == row["prompt"] and model in image.text["settings"]
        assert any(row["truncated"] for row in rows) == (model == "truncated")
    assert {image_folder(model) for model in MODELS} == {p.name for p in (output / "images").iterdir()}


def test_run_demo_writes_report_and_tables(demo):
    result, output = demo
    page = result.report.read_text()
    assert page.count('<article class="example"') == 2 and page.count('class="open"') == 10
    assert findings(result.table)[1].startswith("segments against truncated: fact accuracy ")
    assert all(escape(text.partition(": ")[2]) in page for text in findings(result.table))
    assert re.search(r'class="chip [^"]* truncated"', page) and "rank: 2" in page
    saved = json.loads((output / "table.json").read_text())
    assert saved["means"]["align"]["facts"]["count"] == 4 and saved["folders"]["align"] == "images/align"
    sentences = saved["sentences"]
    for model in MODELS:
        shown = [np.mean([f for sentence in image for f in sentence]) for image in sentences["verdicts"][model]]
        np.testing.assert_allclose(shown, saved["values"][model]["facts"])
        assert [len(image) for image in sentences["scores"][model]] == [len(texts) for texts in sentences["texts"]]
    assert "| align+reward, omega 0.3 |" in (output / "table.md").read_text()


def test_prepare_output_dir_replaces_only_earlier_demo(tmp_path):
    output = tmp_path / "out"
    runs = [output / "align", output / "reward"]
    prepare_output_dir(output, runs)
    runs[0].mkdir()
    (output / "mine.txt").write_text("mine")
    prepare_output_dir(output, runs)
    assert not runs[0].exists() and (output / "mine.txt").read_text() == "mine"
    (tmp_path / "other" / "align").mkdir(parents=True)
    with pytest.raises(ValueError, match="/other is not empty"):
        prepare_output_dir(tmp_path / "other", [tmp_path / "other" / "align"])
    assert (tmp_path / "other" / "align").exists()


def test_held_out_captions_use_separate_seed(configs):
    captions = held_out_captions(configs, 3)
    largest = max(config.data.seed for config in configs)
    held_out = configs[0].data.model_copy(update={"seed": largest + HELD_OUT, "size": 3}).build(None)
    assert [c.text for c in captions] == [held_out.prompt(i) for i in range(3)]
    assert not {c.text for c in captions} & {configs[0].data.build(None).prompt(i) for i in range(3)}
    with pytest.raises(ValueError, match=r"'scenes'.*'folder'"):
        held_out_captions([override(configs[0], {"data": {"name": "folder", "folder": "x"}})], 3)


def test_run_demo_single_prompt_raises(tmp_path):
    with pytest.raises(ValueError, match=r"2 prompts.* 1$"):
        run_demo(tmp_path, prompts=1)
