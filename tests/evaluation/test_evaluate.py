import io
import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from toys import Brightness, Compass, colours

from longalign.evaluation.measure import evaluate, measure
from longalign.evaluation.scoring import score_images
from longalign.image_io import ImageFiles, load_image, write_png
from longalign.metrics import Metric, RewardMetric, Value


def test_evaluate_independent_of_batch_size():
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    prompts = ["east", "west", "up", "down", "east"]
    metrics = [RewardMetric("bright", Brightness()), RewardMetric("denscore", Compass())]
    models = {"base": images, "tuned": images.flip(1)}
    table = evaluate(models, prompts, metrics, seeds=range(5), batch_size=2)
    single_batch = evaluate(models, prompts, metrics, seeds=range(5), batch_size=5)
    names = ["bright", "bright.red", "denscore", "denscore.text_relevant", "denscore.text_irrelevant", "denscore-o"]
    assert table.metrics == names
    for name in names:
        np.testing.assert_allclose(table.row("tuned", name), single_batch.row("tuned", name), rtol=1e-6)
    np.testing.assert_allclose(table.row("base", "bright"), images.mean((1, 2, 3)), rtol=1e-6)
    assert table.difference("tuned", "bright").mean == pytest.approx(0, abs=1e-6)


def test_measure_plain_function_and_duplicate_names():
    images = colours((1, 0, 0), (0, 0, 0))
    bright = RewardMetric("bright", lambda images, prompts: images.amax((1, 2, 3)))
    assert measure(images, ["a", "b"], [bright])["bright"].tolist() == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"two values.* bright;"):
        measure(images, ["a", "b"], [bright, bright])
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        measure(images, ["a"], [bright])


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
    with pytest.raises(ValueError, match="3 prompts for 2 images"):
        score_images({"bright": Brightness()}, paths, ["a", "b", "c"])
    with pytest.raises(ValueError, match="no images to score"):
        score_images({"bright": Brightness()}, [], [])


def test_evaluate_metric_without_values():
    table = evaluate({"base": torch.zeros(2, 3, 4, 4)}, ["a", "b"], [lambda images, prompts: {"none": [math.nan] * 2}])
    assert table.interval("base", "none").count == 0


class Spread(Metric):
    """The mean per image, the rank of its mean, and the difference of the extreme means of a set."""

    label = "spread"
    values: ClassVar = {"spread": Value("", "lower"), "spread.rank": Value(direction=None)}

    def observe(self, images, prompts):
        return {"mean": images.mean((1, 2, 3)), "features": images.mean((2, 3))}

    def finish(self, observations, prompts, seeds):
        assert len(prompts) == len(seeds) == len(observations["features"])
        return {"spread.rank": observations["mean"].argsort().argsort()}

    def statistics(self):
        return {"spread": lambda rows: float(rows["mean"].max() - rows["mean"].min())}


def test_evaluate_finishes_and_resamples_sets():
    levels = torch.linspace(0, 1, 12)
    images = levels[:, None, None, None].expand(-1, 3, 4, 4)
    prompts = [f"prompt {i}" for i in range(12)]
    table = evaluate({"base": images, "half": images / 2}, prompts, [Spread()], range(12), batch_size=5)
    assert table.metrics == ["spread.rank", "spread"]
    assert table.row("half", "spread.rank").tolist() == list(range(12))
    interval, difference = table.interval("base", "spread"), table.difference("half", "spread")
    assert interval.mean == pytest.approx(1) and interval.count == interval.prompts == 12
    # the same images are resampled for both models, so half the spread of one is the other's
    halves = [-interval.mean / 2, -interval.high / 2, -interval.low / 2]
    assert [difference.mean, difference.low, difference.high] == pytest.approx(halves)
    assert table.significant("half") == ({"spread": difference}, {})
    assert table.sets["base"]["spread"][1:].mean() == pytest.approx(1)


class Rare(Metric):
    """Shares of sets: of all images, of the first image only, and of none."""

    label = "rare"

    def observe(self, images, prompts):
        return {"rare": images.mean((1, 2, 3)), "counted": [[prompt == "prompt 0"] for prompt in prompts]}

    def statistics(self):
        def first(rows):
            weights = rows["counted"][:, 0]
            return float((rows["rare"] * weights).sum() / weights.sum()) if weights.any() else math.nan

        return {"rare/share/first": first, "rare/share/none": lambda rows: math.nan}


def test_statistics_that_some_samples_or_all_images_lack():
    images = torch.linspace(0.25, 1, 12)[:, None, None, None].expand(-1, 3, 4, 4)
    table = evaluate({"base": images, "half": images / 2}, [f"prompt {i}" for i in range(12)], [Rare()])
    assert table.submetrics("rare") == ["rare/share/first", "rare/share/none"]
    interval = table.interval("half", "rare/share/first")
    assert (interval.mean, interval.low, interval.high) == (0.125, 0.125, 0.125)
    assert table.difference("half", "rare/share/first").mean == -0.125
    assert table.interval("base", "rare/share/none").count == table.difference("half", "rare/share/none").count == 0
    breakdowns = table.breakdowns("rare")
    assert breakdowns["rare by share"]["first"]["half"] == interval and "0.1250" in table.text()
    assert table.from_dict(table.to_dict()).interval("half", "rare/share/first") == interval


def test_observe_rejects_wrong_shapes_and_infinities():
    for values, message in ((torch.zeros(3), r"\(3,\).*\(2,\)"), (torch.full((2,), torch.inf), "infinite")):
        with pytest.raises(ValueError, match=f"'x'.*{message}"):
            measure(torch.zeros(2, 3, 4, 4), ["a", "b"], [lambda images, prompts, values=values: {"x": values}])
