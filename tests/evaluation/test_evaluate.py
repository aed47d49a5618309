import io
import math
import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from longalign.evaluation.metrics import (
    DecomposedMetric,
    FactMetric,
    RewardMetric,
    evaluate,
    measure,
    reward_metrics,
)
from longalign.evaluation.scoring import score_images
from longalign.image_io import ImageFiles, load_image, write_png
from longalign.rewards.base import EmbeddingReward, Reward, Scores


class Compass(EmbeddingReward):
    """Text features are unit vectors by name; image features are the normalised channel means."""

    texts: ClassVar = {
        "east": (0.8, 0.6, 0.0),
        "west": (0.8, -0.6, 0.0),
        "up": (0.8, 0.0, 0.6),
        "down": (0.8, 0.0, -0.6),
    }

    def image_features(self, images):
        return torch.nn.functional.normalize(images.mean((2, 3)), dim=-1)

    def text_features(self, prompts):
        return torch.tensor([self.texts[p] for p in prompts])


class Brightness(Reward):
    def score_components(self, images, prompts):
        mean = images.mean((1, 2, 3))
        return Scores(mean, {"red": images[:, 0].mean((1, 2))})


def colours(*rgb):
    return torch.tensor(rgb, dtype=torch.float32)[:, :, None, None].expand(-1, -1, 4, 4)


def test_decomposed_metric_parts_sum_to_score():
    # the mean of the four texts is (0.8, 0, 0), so the common direction is the first axis
    metric = DecomposedMetric("denscore", Compass(), ["east", "west", "up", "down", "down"])
    torch.testing.assert_close(metric.direction, torch.tensor([1.0, 0.0, 0.0]))
    images = colours((1, 0, 0), (0, 1, 0))
    scores = metric(images, ["east", "east"])
    assert scores["denscore"].tolist() == pytest.approx([0.8, 0.6])
    assert scores["text_irrelevant"].tolist() == pytest.approx([0.8, 0.0])
    assert scores["text_relevant"].tolist() == pytest.approx([0.0, 0.6])
    # the component of "east" orthogonal to the direction is (0, 0.6, 0), normalised (0, 1, 0)
    assert scores["denscore-o"].tolist() == pytest.approx([0.0, 1.0])


def test_decomposed_metric_invalid_arguments_raise():
    with pytest.raises(ValueError, match="two different prompts, got 1;"):
        DecomposedMetric("denscore", Compass(), ["east", "east"])
    with pytest.raises(ValueError, match=r"'bright'.*Brightness.*EmbeddingReward"):
        DecomposedMetric("bright", Brightness(), ["east", "west"])


def test_evaluate_independent_of_batch_size():
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    prompts = ["east", "west", "up", "down", "east"]
    metrics = [RewardMetric("bright", Brightness()), DecomposedMetric("denscore", Compass(), prompts)]
    models = {"base": images, "tuned": images.flip(1)}
    table = evaluate(models, prompts, metrics, seeds=range(5), batch_size=2)
    single_batch = evaluate(models, prompts, metrics, seeds=range(5), batch_size=5)
    names = ["bright", "bright.red", "denscore", "text_relevant", "text_irrelevant", "denscore-o"]
    assert table.metrics == names
    for name in names:
        np.testing.assert_allclose(table.row("tuned", name), single_batch.row("tuned", name), rtol=1e-6)
    np.testing.assert_allclose(table.row("base", "bright"), images.mean((1, 2, 3)), rtol=1e-6)
    assert table.difference("tuned", "bright").mean == pytest.approx(0, abs=1e-6)


def test_measure_plain_function_and_duplicate_names():
    images = colours((1, 0, 0), (0, 0, 0))
    bright = RewardMetric("bright", lambda images, prompts: images.amax((1, 2, 3)))
    assert measure(images, ["a", "b"], [bright])["bright"].tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"two metrics.* bright;"):
        measure(images, ["a", "b"], [bright, bright])
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        measure(images, ["a"], [bright])


def test_reward_metrics_prefix_parts_of_several_rewards():
    prompts = ["east", "west"]
    rewards = {"a": Compass(), "bright": Brightness(), "b": Compass()}
    table = evaluate({"base": colours((1, 0, 0), (0, 1, 0))}, prompts, reward_metrics(rewards, prompts))
    a, b = ([name, f"{name}.text_relevant", f"{name}.text_irrelevant", f"{name}-o"] for name in "ab")
    assert table.metrics == [*a, "bright", "bright.red", *b]
    np.testing.assert_allclose(table.row("base", a[1]) + table.row("base", a[2]), table.row("base", "a"), atol=1e-6)
    (metric,) = reward_metrics({"a": Compass()}, prompts)
    assert list(metric(colours((1, 0, 0)), ["east"])) == ["a", "text_relevant", "text_irrelevant", "a-o"]
    with pytest.raises(ValueError, match=r"two metrics.* a-o;"):
        reward_metrics({"a": Compass(), "a-o": Brightness()}, prompts)


def test_measure_reads_files_per_batch_with_mixed_sizes(tmp_path):
    images = [
        torch.rand(3, 4, width, generator=torch.Generator().manual_seed(i)) for i, width in enumerate((4, 6, 4, 4))
    ]
    for i, image in enumerate(images):
        write_png(tmp_path / f"{i}.png", image)
    read, calls = [], []

    class Counted(ImageFiles):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    def levels(images, prompts):
        calls.append((tuple(images.shape), len(read)))
        return {"level": images.mean((1, 2, 3)), "prompt": [float(p) for p in prompts]}

    files = Counted([tmp_path / f"{i}.png" for i in range(4)])
    values = measure(files, "0123", [levels], batch_size=3)
    assert calls == [((2, 3, 4, 4), 3), ((1, 3, 4, 6), 3), ((1, 3, 4, 4), 4)] and read == [0, 1, 2, 3]
    np.testing.assert_allclose(values["level"], [float(image.mean()) for image in images], atol=1 / 255)
    assert values["prompt"].tolist() == [0, 1, 2, 3]
    square = files[2:]
    stacked = measure(torch.stack([load_image(path) for path in square.paths]), "23", [levels])
    np.testing.assert_array_equal(stacked["level"], measure(square, "23", [levels])["level"])


def test_load_image_applies_orientation_and_rejects_damaged(tmp_path):
    half = Image.new("RGB", (4, 4), (0, 0, 0))
    half.paste((255, 255, 255), (0, 0, 4, 2))
    exif = half.getexif()
    exif[0x0112] = 3  # rotated by 180 degrees
    half.save(tmp_path / "rotated.png", exif=exif)
    assert load_image(tmp_path / "rotated.png")[0, :, 0].tolist() == [0.0, 0.0, 1.0, 1.0]
    (tmp_path / "truncated.png").write_bytes((tmp_path / "rotated.png").read_bytes()[:60])
    half.save(tmp_path / "odd.png", exif=b"Exif\x00\x00II*\x00")
    for name in ("truncated.png", "odd.png"):
        with pytest.raises(ValueError, match=f"{name}.*image"):
            load_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        load_image(tmp_path / "none.png")


@dataclass
class Fact:
    kind: str


@dataclass
class Sentence:
    text: str
    facts: tuple


@dataclass
class Caption:
    sentences: tuple

    @property
    def text(self):
        return " ".join(s.text for s in self.sentences)


def test_fact_metric_overall_by_attribute_and_by_position(monkeypatch):
    shape, colour = Fact("shape"), Fact("colour")
    sentences = [
        Sentence("A.", (shape, colour)),
        Sentence("B.", (colour,)),
        Sentence("C.", ()),
        Sentence("D.", (colour,)),
    ]
    long, short = Caption(tuple(sentences)), Caption((Sentence("E.", (colour,)),))
    truths = {long.text: [[True, False], [True], [], [True]], short.text: [[False]]}

    class Oracle:
        @staticmethod
        def verdicts(images, captions):
            assert images.dtype == np.float32 and images.shape[1:] == (3, 4, 4)
            return [truths[c.text] for c in captions]

    import longalign.mini

    monkeypatch.setitem(sys.modules, "longalign.mini.oracle", Oracle)
    monkeypatch.setattr(longalign.mini, "oracle", Oracle, raising=False)
    values = FactMetric([long, short])(torch.zeros(2, 3, 4, 4), [long.text, short.text])
    assert values["facts"].tolist() == [0.75, 0.0]
    np.testing.assert_array_equal(values["facts/attribute/shape"], [1.0, np.nan])
    np.testing.assert_allclose(values["facts/attribute/colour"], [2 / 3, 0.0])
    np.testing.assert_array_equal(values["facts/by_position/0-25%"], [0.5, 0.0])
    np.testing.assert_array_equal(values["facts/by_position/25-50%"], [1.0, np.nan])
    np.testing.assert_array_equal(values["facts/by_position/75-100%"], [1.0, np.nan])
    assert "facts/by_position/50-75%" not in values
    with pytest.raises(ValueError, match=r"facts.* 1 prompts.*'F\.'"):
        FactMetric([long])(torch.zeros(1, 3, 4, 4), ["F."])


def test_fact_metric_on_true_and_shuffled_renders():
    from longalign.mini.captions import describe
    from longalign.mini.scenes import render_batch, sample_scene

    rng = np.random.default_rng(3)
    scenes = [sample_scene(rng, (6, 9)) for _ in range(8)]
    captions = [describe(scene, rng, words=150) for scene in scenes]
    prompts = [c.text for c in captions]
    images = torch.from_numpy(render_batch(scenes))
    metric = FactMetric(captions)
    table = evaluate({"true": images, "shuffled": images.roll(1, 0)}, prompts, [metric])
    assert table.interval("true", "facts").mean > 0.97
    assert table.interval("shuffled", "facts").mean < 0.6
    assert "facts/by_position/75-100%" in table.submetrics("facts")


def test_score_images_prints_scores_and_mean(tmp_path):
    for name, level in (("a.png", 51), ("b.png", 153)):
        Image.new("RGB", (4, 6 if name == "a.png" else 4), (level, level, level)).save(tmp_path / name)
    out = io.StringIO()
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    rows = score_images({"bright": Brightness(), "one": lambda images, prompts: torch.ones(1)}, paths, ["any"], out=out)
    assert rows[0]["bright"] == pytest.approx(0.2) and rows[1]["bright.red"] == pytest.approx(0.6)
    lines = [line.split("\t") for line in out.getvalue().splitlines()]
    assert lines[0] == ["bright", "bright.red", "one", "image"]
    assert lines[1] == ["0.2000", "0.2000", "1.0000", str(paths[0])]
    assert lines[-1] == ["0.4000", "0.4000", "1.0000", "mean of 2"]
    with pytest.raises(ValueError, match="3 for 2 images"):
        score_images({"bright": Brightness()}, paths, ["a", "b", "c"])
    with pytest.raises(ValueError, match="no images to score"):
        score_images({"bright": Brightness()}, [], [])


def test_evaluate_metric_without_values():
    table = evaluate({"base": torch.zeros(2, 3, 4, 4)}, ["a", "b"], [lambda images, prompts: {"none": [math.nan] * 2}])
    assert table.interval("base", "none").count == 0
