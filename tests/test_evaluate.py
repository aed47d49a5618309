import io
import math
import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from longalign.evaluate import (
    DecomposedMetric,
    FactMetric,
    RewardMetric,
    evaluate,
    measure,
    reward_metrics,
    score_images,
)
from longalign.image_io import ImageFiles, load_image, write_png
from longalign.rewards.base import EmbeddingReward, Reward, Scores


class Compass(EmbeddingReward):
    """Text features are unit vectors by name; an image points along the axis of its brightest channel."""

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


def test_the_parts_of_a_score_add_up_about_one_direction():
    # the mean of the four texts is (0.8, 0, 0), so the common direction is the first axis
    metric = DecomposedMetric("denscore", Compass(), ["east", "west", "up", "down", "down"])
    torch.testing.assert_close(metric.direction, torch.tensor([1.0, 0.0, 0.0]))
    images = colours((1, 0, 0), (0, 1, 0))
    found = metric(images, ["east", "east"])
    assert found["denscore"].tolist() == pytest.approx([0.8, 0.6])
    assert found["text_irrelevant"].tolist() == pytest.approx([0.8, 0.0])
    assert found["text_relevant"].tolist() == pytest.approx([0.0, 0.6])
    # across the direction "east" is (0, 0.6, 0), normalised (0, 1, 0)
    assert found["denscore-o"].tolist() == pytest.approx([0.0, 1.0])


def test_one_prompt_has_no_common_direction():
    with pytest.raises(ValueError, match="at least two different prompts, got 1"):
        DecomposedMetric("denscore", Compass(), ["east", "east"])
    with pytest.raises(ValueError, match="only embedding rewards decompose"):
        DecomposedMetric("bright", Brightness(), ["east", "west"])


def test_models_are_compared_on_the_same_rows_in_any_batch_size():
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    prompts = ["east", "west", "up", "down", "east"]
    metrics = [RewardMetric("bright", Brightness()), DecomposedMetric("denscore", Compass(), prompts)]
    models = {"base": images, "tuned": images.flip(1)}
    table = evaluate(models, prompts, metrics, seeds=range(5), batch_size=2)
    whole = evaluate(models, prompts, metrics, seeds=range(5), batch_size=5)
    names = ["bright", "bright.red", "denscore", "text_relevant", "text_irrelevant", "denscore-o"]
    assert table.metrics == names
    for name in names:
        np.testing.assert_allclose(table.row("tuned", name), whole.row("tuned", name), rtol=1e-6)
    np.testing.assert_allclose(table.row("base", "bright"), images.mean((1, 2, 3)), rtol=1e-6)
    assert table.difference("tuned", "bright").mean == pytest.approx(0, abs=1e-6)


def test_a_plain_function_is_a_metric_and_names_must_differ():
    images = colours((1, 0, 0), (0, 0, 0))
    bright = RewardMetric("bright", lambda images, prompts: images.amax((1, 2, 3)))
    assert measure(images, ["a", "b"], [bright])["bright"].tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match="two metrics are called bright"):
        measure(images, ["a", "b"], [bright, bright])
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        measure(images, ["a"], [bright])


def test_the_parts_of_several_embedding_rewards_are_told_apart():
    prompts = ["east", "west"]
    rewards = {"a": Compass(), "bright": Brightness(), "b": Compass()}
    table = evaluate({"base": colours((1, 0, 0), (0, 1, 0))}, prompts, reward_metrics(rewards, prompts))
    a, b = ([name, f"{name}.text_relevant", f"{name}.text_irrelevant", f"{name}-o"] for name in "ab")
    assert table.metrics == [*a, "bright", "bright.red", *b]
    np.testing.assert_allclose(table.row("base", a[1]) + table.row("base", a[2]), table.row("base", "a"), atol=1e-6)
    (alone,) = reward_metrics({"a": Compass()}, prompts)
    assert list(alone(colours((1, 0, 0)), ["east"])) == ["a", "text_relevant", "text_irrelevant", "a-o"]
    with pytest.raises(ValueError, match="two metrics are called a-o"):
        reward_metrics({"a": Compass(), "a-o": Brightness()}, prompts)


def test_files_are_read_batch_by_batch_whatever_their_sizes(tmp_path):
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
    found = measure(files, "0123", [levels], batch_size=3)
    assert calls == [((2, 3, 4, 4), 3), ((1, 3, 4, 6), 3), ((1, 3, 4, 4), 4)] and read == [0, 1, 2, 3]
    np.testing.assert_allclose(found["level"], [float(image.mean()) for image in images], atol=1 / 255)
    assert found["prompt"].tolist() == [0, 1, 2, 3]
    square = files[2:]
    whole = measure(torch.stack([load_image(path) for path in square.paths]), "23", [levels])
    np.testing.assert_array_equal(whole["level"], measure(square, "23", [levels])["level"])


def test_a_file_is_read_upright_and_one_that_is_damaged_is_named(tmp_path):
    half = Image.new("RGB", (4, 4), (0, 0, 0))
    half.paste((255, 255, 255), (0, 0, 4, 2))
    exif = half.getexif()
    exif[0x0112] = 3  # turned by half
    half.save(tmp_path / "turned.png", exif=exif)
    assert load_image(tmp_path / "turned.png")[0, :, 0].tolist() == [0.0, 0.0, 1.0, 1.0]
    (tmp_path / "cut.png").write_bytes((tmp_path / "turned.png").read_bytes()[:60])
    half.save(tmp_path / "odd.png", exif=b"Exif\x00\x00II*\x00")
    for name in ("cut.png", "odd.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image: "):
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


def test_facts_are_counted_overall_by_attribute_and_by_place(monkeypatch):
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
    found = FactMetric([long, short])(torch.zeros(2, 3, 4, 4), [long.text, short.text])
    assert found["facts"].tolist() == [0.75, 0.0]
    np.testing.assert_array_equal(found["facts/attribute/shape"], [1.0, np.nan])
    np.testing.assert_allclose(found["facts/attribute/colour"], [2 / 3, 0.0])
    np.testing.assert_array_equal(found["facts/place in the prompt/0-25%"], [0.5, 0.0])
    np.testing.assert_array_equal(found["facts/place in the prompt/25-50%"], [1.0, np.nan])
    np.testing.assert_array_equal(found["facts/place in the prompt/75-100%"], [1.0, np.nan])
    assert "facts/place in the prompt/50-75%" not in found
    with pytest.raises(ValueError, match=r"no facts are known for 1 prompts, the first is 'F\.'"):
        FactMetric([long])(torch.zeros(1, 3, 4, 4), ["F."])


def test_true_renders_show_all_of_their_facts():
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
    assert "facts/place in the prompt/75-100%" in table.shares("facts")


def test_scores_of_files_are_printed_with_their_mean(tmp_path):
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
    with pytest.raises(ValueError, match="got 3 for 2 images"):
        score_images({"bright": Brightness()}, paths, ["a", "b", "c"])
    with pytest.raises(ValueError, match="no images"):
        score_images({"bright": Brightness()}, [], [])


def test_nothing_to_compare_is_not_a_number():
    found = evaluate({"base": torch.zeros(2, 3, 4, 4)}, ["a", "b"], [lambda images, prompts: {"none": [math.nan] * 2}])
    assert found.interval("base", "none").count == 0
