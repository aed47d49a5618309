"""Images of several shapes: buckets, their batches, streams, caches and runs."""

import io
import json
from collections import Counter

import pytest
import torch
from PIL import Image

from longalign.config.checks import check_files
from longalign.config.run import load_config
from longalign.data.base import Data
from longalign.data.stream import Record, Stream
from longalign.errors import ConfigError
from longalign.image_io import read_size
from longalign.loop.batches import Batches, load_batches, plan_batches, read_buckets
from longalign.registry import backbones, data
from longalign.runtime import Runtime
from longalign.sizes import Size, aspect_buckets, nearest_bucket, parse_size
from longalign.testing.tiny import tiny_sd

BUCKETS = [8, "16x4", "4x16"]


def encoded(width, height, kind="PNG", **settings):
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (width, height, 0)).save(buffer, kind, **settings)
    return buffer.getvalue()


#: width and height of the images of a folder, and their buckets
SHAPES = {(9, 9): 0, (8, 7): 0, (20, 5): 1, (30, 8): 1, (5, 20): 2, (12, 12): 0, (18, 4): 1, (4, 17): 2, (10, 9): 0}


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i, shape in enumerate(SHAPES):
        (images / f"{i}.png").write_bytes(encoded(*shape))
    rows = [json.dumps({"file_name": f"{i}.png", "text": f"{i}"}) for i in range(len(SHAPES))]
    (images / "metadata.jsonl").write_text("\n".join(rows))
    return images


def build(folder, **keys):
    return data.build({"name": "folder", "folder": str(folder), "buckets": BUCKETS, **keys})


def test_aspect_buckets_have_at_most_the_pixels_of_the_square():
    sizes = aspect_buckets(1024, 64, 4)
    assert [str(size) for size in sizes[:9]] == [
        *("2048x512", "1792x576", "1600x640", "1472x704", "1344x768", "1216x832", "1152x896", "1088x960", "1024"),
    ]
    assert [(w, h) for h, w in sizes] == list(reversed(sizes)) and all(h * w <= 1024**2 for h, w in sizes)
    assert len(aspect_buckets(512, 64, 2)) == 5
    assert parse_size(64) == parse_size("64") == (64, 64) and parse_size("96X64") == Size(height=64, width=96)
    for wrong in (0, "64x", "0x8", "8x8x8"):
        with pytest.raises(ValueError, match="WxH"):
            parse_size(wrong)
    assert [nearest_bucket(Size(h, w), sizes) for h, w in ((50, 50), (10, 100), (1152, 896))] == [8, 0, 10]


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"resolution": 512, "buckets": [512]}, "'resolution' has no effect with 'buckets'"),
        ({"multiple_of": 8}, "'multiple_of' needs"),
        ({"resolution": 500, "max_aspect_ratio": 2}, "500 is not a multiple of multiple_of 64"),
        ({"buckets": ["64x"]}, "buckets"),
        ({"buckets": [0]}, "buckets"),
        ({"max_aspect_ratio": 1}, "max_aspect_ratio"),
    ],
)
def test_config_rejects_bucket_keys(keys, problem):
    with pytest.raises(ConfigError, match=problem):
        data.validate({"name": "folder", "folder": "x", **keys})


def test_sizes_are_checked_before_loading(folder, tmp_path):
    checkpoint = str(tiny_sd(tmp_path / "sd"))
    run = {"backbone": {"name": "sd", "checkpoint": checkpoint}, "output": str(tmp_path / "out")}
    run |= {"encoder": {"name": "clip-segment", "checkpoint": checkpoint}, "trainer": "align"}
    monitor = {"prompts": ["a"], "size": "64x20"}

    def problems(**keys):
        with pytest.raises(ConfigError) as caught:
            check_files(load_config({**run, "data": {"name": "folder", "folder": str(folder), **keys}}))
        return dict(caught.value.errors)

    assert "multiples of 8" in problems(buckets=[64, "96x44"])["data.buckets"]
    assert "got 4" in problems(max_aspect_ratio=2, multiple_of=4, resolution=64)["data.multiple_of"]
    run |= {"monitor": monitor, "trainer": {"name": "reward", "resolution": [64, "8x12"]}}
    run["rewards"] = [{"name": "clip", "checkpoint": "mini/pickscore"}]
    found = problems(resolution=60)
    assert "got 8x12" in found["trainer.resolution"] and "got 64x20" in found["monitor.size"]
    config = data.validate({"name": "folder", "folder": str(folder), "max_aspect_ratio": 2, "multiple_of": 24})
    with pytest.raises(ConfigError, match="64 is not a multiple of multiple_of 24"):
        config.for_backbone(backbones.validate(run["backbone"]))


def test_read_size_is_that_of_the_rotated_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_size(encoded(6, 4)) == read_size(encoded(6, 4, "JPEG")) == Size(height=4, width=6)
    for kind in ("JPEG", "WEBP", "PNG"):
        assert read_size(encoded(6, 4, kind, exif=exif)) == Size(height=6, width=4)


def test_folder_items_have_the_size_of_their_bucket(folder):
    images = build(folder)
    assert [images.bucket(i) for i in range(len(images))] == list(SHAPES.values())
    assert [tuple(images[i]["image"].shape[1:]) for i in (0, 2, 4)] == [(8, 8), (4, 16), (16, 4)]
    (folder / "2.png").write_bytes(encoded(20, 5)[:-30])  # a valid header
    (folder / "4.png").write_bytes(b"no image")
    images = build(folder)
    assert images.bucket(2) == 1 and images[2]["prompt"] == "3" and images[2]["image"].shape == (3, 4, 16)
    assert read_buckets(images, Runtime()) == [b if i != 4 else -1 for i, b in enumerate(SHAPES.values())]
    assert read_buckets(build(folder, buckets=[8]), Runtime()) is None


def test_batches_have_one_bucket_and_every_item_once_an_epoch():
    buckets = [0, 0, 0, 1, 1, 2, 0, -1]
    global_batches = iter(Batches(8, 4, seed=3, buckets=buckets))
    batches = [next(global_batches) for _ in range(28)]
    assert all(len({buckets[i] for i in batch}) == 1 for batch in batches)
    counts = Counter(i for batch in batches for i in batch)  # of 16 epochs, without incomplete batches
    assert set(counts) == set(range(7)) and all(14 <= count <= 17 for count in counts.values())
    parts = [iter(Batches(8, 2, seed=3, start=5, rank=r, world_size=2, buckets=buckets)) for r in range(2)]
    assert [[i for part in parts for i in next(part)] for _ in range(9)] == batches[5:14]
    with pytest.raises(ValueError, match=r"none of the .* images"):
        Batches(1, 1, 0, buckets=[-1])


class Shapes(Stream):
    """The images of the folder; ``bad`` ones have a valid header only, and number 3 has no header."""

    num_shards = 1

    def __init__(self, bad=()):
        sizes = [parse_size(size) for size in BUCKETS]
        super().__init__(resolution=sizes, empty="skip", max_unreadable=5, shuffle_buffer=4)
        self.bad = bad

    def read(self, shard):
        for i, shape in enumerate(SHAPES):
            image = b"" if i == 3 else encoded(*shape)[: -30 if i in self.bad else None]
            yield Record(f"n{i}", str(i), image)


@pytest.mark.parametrize("bad", [(), (0, 4, 7)])
def test_stream_batches_have_one_bucket_and_resume(bad):
    def batches(start):
        stream = Shapes(bad)
        loaded = load_batches(stream, plan_batches(stream, 2, 5, start, 0, 1), True, 0)
        return [next(loaded) for _ in range(9 - start)]

    expected, kinds = batches(0), list(SHAPES.values())
    for batch in expected:
        (bucket,) = {kinds[int(prompt)] for prompt in batch["prompt"]}
        height, width = parse_size(BUCKETS[bucket])
        assert batch["image"].shape == (2, 3, height, width)
    assert not {"3", *map(str, bad)} & {prompt for batch in expected for prompt in batch["prompt"]}
    for start in (1, 4):
        for ours, theirs in zip(batches(start), expected[start:], strict=True):
            assert ours["prompt"] == theirs["prompt"] and torch.equal(ours["image"], theirs["image"])
    prompts = next(load_batches(Shapes(), plan_batches(Shapes(), 9, 5, 0, 0, 1), False, 0))["prompt"]
    assert sorted(prompts) == [str(i) for i in range(9)]  # no image is opened


def test_stream_without_readable_headers_is_rejected():
    class Empty(Shapes):
        def read(self, shard):
            yield Record("n", "a", b"")

    with pytest.raises(ValueError, match="no image can be read: n"):
        next(Empty().items(0))


def test_data_has_one_bucket_by_default():
    class Prompts(Data):
        def __len__(self):
            return 1

    assert read_buckets(Prompts(), Runtime()) is None and Prompts().bucket(0) == 0
