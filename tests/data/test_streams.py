"""Tables read with ``datasets``, tar shards, the LongAlign captions, and shuffling and resuming of streams."""

import io
import json
import logging
import re
import sys
import tarfile

import pytest
import torch
from PIL import Image

from longalign.config.run import load_config
from longalign.data.images import webdataset
from longalign.data.images.shards import find_shards
from longalign.data.stream import Record, Stream
from longalign.data.tables.table import image_source
from longalign.loop.batches import load_batches, plan_batches
from longalign.registry import ConfigError, data


def png(shade, size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def shade(item):
    return round(float(item["image"][0].mean() * 255))


class Numbers(Stream):
    """Shards with numbers as captions and images of that shade; the images in ``bad`` are unreadable."""

    def __init__(self, lengths, bad=(), **settings):
        defaults = {"empty": "skip", "max_unreadable": 10, "shuffle_buffer": 1000}
        super().__init__(resolution=2, **{**defaults, **settings})
        self.lengths, self.bad = lengths, bad

    @property
    def num_shards(self):
        return len(self.lengths)

    def read(self, shard):
        first = sum(self.lengths[:shard])
        for number in range(first, first + self.lengths[shard]):
            yield Record(f"n{number}", str(number), b"broken" if number in self.bad else png(number))


def take(stream, count, **settings):
    items = stream.items(0, **settings)
    return [next(items) for _ in range(count)]


def prompts(items):
    return [item["prompt"] for item in items]


def test_stream_epoch_has_every_record_once_reshuffled():
    stream = Numbers([5, 4, 3], shuffle_buffer=4)
    seen = prompts(take(stream, 24))
    assert sorted(map(int, seen[:12])) == sorted(map(int, seen[12:])) == list(range(12))
    assert seen[:12] != seen[12:] and seen[:12] != sorted(seen[:12], key=int)
    assert seen == prompts(take(stream, 24))
    assert all(shade(item) == int(item["prompt"]) for item in take(stream, 12))
    in_order = prompts(take(Numbers([3], shuffle_buffer=1), 6))
    assert in_order == ["0", "1", "2"] * 2


@pytest.mark.parametrize("lengths", [[3, 3, 3, 3], [12]])
def test_stream_parts_are_disjoint_and_complete(lengths):
    stream = Numbers(lengths, shuffle_buffer=2)
    parts = [set(prompts(take(stream, 6, part=i, num_parts=2))) for i in range(2)]
    assert not parts[0] & parts[1] and parts[0] | parts[1] == {str(i) for i in range(12)}


def test_stream_replaces_unreadable_images_by_the_next(caplog):
    with caplog.at_level(logging.WARNING):
        items = take(Numbers([5], bad=(1, 2), shuffle_buffer=1), 10)
    assert prompts(items) == ["0", "3", "3", "3", "4"] * 2
    assert [r.message.split(" cannot")[0] for r in caplog.records] == ["n1", "n2"]
    for skip in range(5):
        again = take(Numbers([5], bad=(1, 2), shuffle_buffer=1), 10 - skip, skip=skip)
        assert prompts(again) == prompts(items)[skip:]
    with pytest.raises(ValueError, match=r"2 images.*max_unreadable=1: n1 .*n2 "):
        take(Numbers([5], bad=(1, 2), shuffle_buffer=1, max_unreadable=1), 5)
    with pytest.raises(ValueError, match=r"no image.*: n0"):
        take(Numbers([1], bad=(0,), max_unreadable=3), 1)
    assert prompts(take(Numbers([2], bad=(0, 1)), 2, images=False)) != []


def test_stream_replaces_images_with_unexpected_pillow_errors(damaged):
    class Damaged(Numbers):
        def read(self, shard):
            yield Record("odd", "odd", damaged)
            yield from super().read(shard)

    stream = Damaged([2], shuffle_buffer=1)
    assert prompts(take(stream, 3)) == ["0", "0", "1"] and list(stream.unreadable) == ["odd"]
    with pytest.raises(ValueError, match="CMYK"):
        image_source(Image.new("CMYK", (2, 2)), None)


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_batches_resume_at_any_step(workers):
    def batches(start):
        stream = Numbers([4, 4, 4, 4], shuffle_buffer=3)
        loaded = load_batches(stream, plan_batches(stream, 2, 5, start, 0, 1), True, workers)
        return [next(loaded) for _ in range(7 - start)]

    expected = batches(0)
    assert expected[0]["image"].shape == (2, 3, 2, 2)
    for start in (1, 2, 5):
        later = batches(start)
        assert [b["prompt"] for b in later] == [b["prompt"] for b in expected[start:]]
        assert torch.equal(later[0]["image"], expected[start]["image"])


def test_load_batches_skips_images_that_are_not_needed():
    stream = Numbers([2], bad=(0, 1))
    stream.has_images = False
    with pytest.raises(ValueError, match="prompts only"):
        load_batches(stream, plan_batches(stream, 1, 0, 0, 0, 1), True, 0)
    batch = next(load_batches(stream, plan_batches(stream, 2, 0, 0, 0, 1), False, 0))
    assert set(batch) == {"prompt"} and sorted(batch["prompt"]) == ["0", "1"]


def write_shard(path, samples):
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, content in samples:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    for number in range(2):
        names = [f"00{number}/{i}" for i in range(3)]
        samples = [
            pair
            for i, name in enumerate(names)
            for pair in (
                (f"{name}.png", png(10 * number + i)),
                (f"{name}.txt", f" Caption {10 * number + i}. ".encode()),
                (f"{name}.json", json.dumps({"caption": f"From JSON {10 * number + i}."}).encode()),
            )
        ]
        write_shard(tmp_path / f"s-0{number}.tar", samples)
    return tmp_path


def build_web(shards, name="s-{00..01}.tar", **keys):
    given = {"name": "webdataset", "shards": str(shards / name), "resolution": 4, "shuffle_buffer": 1, **keys}
    return data.build(given)


def test_webdataset_reads_tar_shards(shards):
    items = take(build_web(shards), 6)
    assert sorted(prompts(items)) == sorted(f"Caption {i}." for i in (0, 1, 2, 10, 11, 12))
    assert all(f"Caption {shade(item)}." == item["prompt"] for item in items)
    assert items[0]["image"].shape == (3, 4, 4)
    json_items = take(build_web(shards, "s-*.tar", caption="json"), 6)
    assert {f"From JSON {shade(item)}." for item in json_items} == set(prompts(json_items))
    with pytest.raises(FileNotFoundError, match=r"s-02\.tar"):
        find_shards(str(shards / "s-{00..02}.tar"))
    with pytest.raises(FileNotFoundError, match=r"x-\*\.tar"):
        find_shards(str(shards / "x-*.tar"))
    with pytest.raises(ConfigError, match=r"'field'.*'txt'"):
        build_web(shards, field="text")


def test_webdataset_replaces_broken_shards_and_samples(tmp_path, caplog):
    samples = [
        ("a.png", png(7)),
        ("a.txt", b"A."),
        ("b.png", png(8)),
        ("c.txt", b"C."),
        ("d.png", b"?"),
        ("d.txt", b"D."),
    ]
    write_shard(tmp_path / "s-0.tar.gz", [*samples, ("e.png", png(9)), ("e.txt", b"  ")])
    write_shard(tmp_path / "s-1.tar", [("f.png", png(5)), ("f.txt", b"F.")])
    content = (tmp_path / "s-1.tar").read_bytes()
    (tmp_path / "s-1.tar").write_bytes(content[:700])
    dataset = build_web(tmp_path, "s-*")
    with caplog.at_level(logging.WARNING):
        assert set(prompts(take(dataset, 12))) == {"A."}
    messages = " ".join(r.message for r in caplog.records)
    for pattern in (r"b in .* has no \.txt.*png", "c in .*no image", "d in ", r"the rest of .*s-1\.tar"):
        assert re.search(pattern, messages), pattern
    assert "e in" in messages and "empty caption" in messages
    assert len(dataset.unreadable) == 4


def test_webdataset_rejects_huge_members(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_BYTES", 4000)
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as tar:
        for name, content in (("a.png", bytes(5000)), ("a.txt", b"A."), ("b.png", png(1)), ("b.txt", b"B.")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert prompts(take(build_web(tmp_path, "s.tar.gz"), 2)) == ["B.", "B."]
    assert re.search(r"a in .*\.png.*5000 bytes.*4000", caplog.text)
    # a sparse file: 512 bytes that declare 200 GiB
    member = tarfile.TarInfo("c.png")
    member.type, member.size = tarfile.GNUTYPE_SPARSE, 0
    head = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    head[386:398] = head[398:410] = b"00000000000\0"
    head[483:495] = tarfile.itn(200 * 2**30, 12, tarfile.GNU_FORMAT)
    head[148:156] = b"%06o\0 " % (256 + sum(head[:148]) + sum(head[156:512]))
    (tmp_path / "h.tar").write_bytes(bytes(head) + bytes(1024))
    with tarfile.open(tmp_path / "h.tar") as tar:
        assert tar.getmembers()[0].size == 200 * 2**30
    with pytest.raises(ValueError, match=r"no image.*: c in .*\.png.*214748364800 bytes"):
        take(build_web(tmp_path, "h.tar"), 1)


def test_webdataset_rejects_huge_headers(tmp_path):
    """Python's tarfile reads the complete header of a member, such as a long name, into memory."""
    with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo("././@LongLink")
        member.type, member.size = tarfile.GNUTYPE_LONGNAME, 2**21
        tar.addfile(member, io.BytesIO(b"a" * member.size))
    with pytest.raises(ValueError, match=r"worker 0 of 1.*the rest of .*s\.tar\.gz.*2097152 bytes"):
        take(build_web(tmp_path, "s.tar.gz"), 1)


def test_hub_paths_need_image_folder(table):
    import datasets

    (table / "in").mkdir()
    (table / "in" / "a.png").write_bytes(png(3))
    (table / "secret.png").write_bytes(png(4))
    paths = ["a.png", str(table / "in" / "a.png"), "../secret.png", str(table / "secret.png")]
    rows = datasets.Dataset.from_dict({"caption": list("ABCD"), "image": paths})
    rows.to_parquet(table / "paths.parquet")
    keys = {"files": str(table / "paths.parquet"), "image_folder": str(table / "in")}
    dataset = build_hub(table, **keys)
    assert [dataset.load_item(i) and shade(dataset[i]) for i in range(4)] == [3, 3, None, None]
    assert "../secret.png" in dataset.unreadable["row 2 of parquet"] and len(dataset.unreadable) == 2
    stream = build_hub(table, streaming=True, **keys)
    assert set(prompts(take(stream, 4))) == {"A", "B"}
    with pytest.raises(ValueError, match=r"none of the 4 images.*a\.png.*image_folder"):
        _ = build_hub(table, **{**keys, "image_folder": None})[0]
    # explicitly allowed by the user
    assert shade(build_hub(table, **{**keys, "image_folder": "/"})[3]) == 4


def test_hub_imagefolder_needs_no_image_folder(table):
    (table / "in").mkdir()
    (table / "in" / "a.png").write_bytes(png(3))
    (table / "in" / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": "A."}')
    dataset = build_hub(table, dataset="imagefolder", files=str(table / "in" / "*"))
    assert (dataset[0]["prompt"], shade(dataset[0])) == ("A.", 3)


def test_load_table_turns_datasets_errors_into_value_error(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "mine.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match=r"datasets.*mine\.py"):
        data.build({"name": "hf", "dataset": str(tmp_path / "mine.py"), "cache": str(tmp_path), "resolution": 4})


@pytest.fixture
def table(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    images = [{"bytes": png(i), "path": None} for i in range(5)]
    captions = ["Zero.", "One.", "", "Three.", None]
    rows = datasets.Dataset.from_dict(
        {"caption": captions, "image": images, "other": list(range(5))},
        features=datasets.Features(
            {"caption": datasets.Value("string"), "image": datasets.Image(), "other": datasets.Value("int64")}
        ),
    )
    rows.select(range(3)).to_parquet(tmp_path / "p-0.parquet")
    rows.select(range(3, 5)).to_parquet(tmp_path / "p-1.parquet")
    return tmp_path


def build_hub(table, **keys):
    files = str(table / "p-*.parquet")
    given = {"name": "hf", "dataset": "parquet", "files": files, "cache": str(table / "cache"), "resolution": 4}
    return data.build({**given, **keys})


def test_hub_rows_read_parquet_by_index(table):
    dataset = build_hub(table)
    assert [dataset.prompt(i) for i in range(len(dataset))] == ["Zero.", "One.", "Three."]
    assert [shade(dataset[i]) for i in range(3)] == [0, 1, 3] and dataset[-1]["prompt"] == "Three."
    assert len(build_hub(table, empty="keep")) == 5
    prompts_only = build_hub(table, image=None)
    assert not prompts_only.has_images and prompts_only[1] == {"prompt": "One."}
    with pytest.raises(ValueError, match=r"'text'.*caption, image, other"):
        build_hub(table, caption="text")


def test_hub_stream_reads_parquet_shards(table):
    dataset = build_hub(table, streaming=True)
    assert dataset.num_shards == 2
    assert sorted(prompts(take(dataset, 3))) == ["One.", "Three.", "Zero."]
    shades = {item["prompt"]: shade(item) for item in take(dataset, 3)}
    assert shades == {"Zero.": 0, "One.": 1, "Three.": 3}
    assert not build_hub(table, streaming=True, image=None).has_images


def test_hub_rows_name_unreadable_rows(table):
    import datasets

    rows = datasets.Dataset.from_dict({"caption": ["A.", "B."], "image": [b"?", png(4)]})
    rows.to_parquet(table / "bytes.parquet")
    dataset = build_hub(table, files=str(table / "bytes.parquet"))
    assert dataset[0]["prompt"] == "B." and list(dataset.unreadable) == ["row 0 of parquet"]


def test_hub_config_rejects_keys_without_effect():
    with pytest.raises(ConfigError, match=r"'shuffle_buffer'.*streaming"):
        data.validate({"name": "hf", "dataset": "x", "shuffle_buffer": 5})
    with pytest.raises(ConfigError, match=r"'image_folder'.*'image'"):
        data.validate({"name": "hf", "dataset": "x", "image": None, "image_folder": "y"})
    run = {"backbone": {"name": "sd", "checkpoint": "x"}, "encoder": "clip-segment", "trainer": "align"}
    with pytest.raises(ConfigError, match=r"'align'.*images.*'hf'"):
        load_config({**run, "data": {"name": "hf", "dataset": "x", "image": None}})


def test_hub_without_datasets_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        data.build({"name": "hf", "dataset": "x"})


@pytest.fixture
def captions(tmp_path):
    pytest.importorskip("datasets")
    rows = [
        {"caption": "A dog. It runs.", "path": "train2017/1.png", "source": "COCO2017"},
        {"caption": "A cat.", "path": "/train2017/2.png", "source": "COCO2017"},
        {"caption": "A wall.", "path": "3.png", "source": "SAM"},
        {"caption": "Not there.", "path": "4.png", "source": "SAM"},
        {"caption": "", "path": "3.png", "source": "SAM"},
        {"caption": "No folder.", "path": "5.png", "source": "LLaVA"},
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "coco" / "train2017").mkdir(parents=True)
    (tmp_path / "sam").mkdir()
    for name, tone in (("coco/train2017/1.png", 1), ("coco/train2017/2.png", 2), ("sam/3.png", 3)):
        (tmp_path / name).write_bytes(png(tone))
    return tmp_path


def build_captions(folder, **keys):
    folders = {"COCO2017": str(folder / "coco"), "SAM": str(folder / "sam")}
    given = {"name": "longalign-captions", "captions": str(folder / "captions.jsonl"), "folders": folders}
    return data.build({**given, "cache": str(folder / "cache"), "resolution": 4, **keys})


def test_longalign_captions_join_rows_and_images(captions, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = build_captions(captions)
    assert [(dataset[i]["prompt"], shade(dataset[i])) for i in range(len(dataset))] == [
        ("A dog. It runs.", 1),
        ("A cat.", 2),
        ("A wall.", 3),
    ]
    messages = [r.message for r in caplog.records]
    for pattern in (r"LLaVA \(1\)", "1 captions.*skip", r"1 captions skipped, .*missing.*sam/4\.png"):
        assert any(re.search(pattern, message) for message in messages), pattern
    with pytest.raises(ValueError, match=r"max_missing=0.*4\.png"):
        build_captions(captions, max_missing=0)
    with pytest.raises(ValueError, match=r"'coco'.*COCO2017, LLaVA, SAM"):
        build_captions(captions, folders={"coco": str(captions)})
    with pytest.raises(ValueError, match=r"no image of .*captions\.jsonl.*1 .*missing.*5\.png"):
        build_captions(captions, folders={"LLaVA": str(captions)})


def test_longalign_captions_reject_paths_outside_the_folder(captions):
    with (captions / "captions.jsonl").open("a") as file:
        file.write('\n{"caption": "A.", "path": "../../secret.png", "source": "SAM"}')
    with pytest.raises(ValueError, match=r"'\.\./\.\./secret\.png'.*sam"):
        build_captions(captions)


def test_webdataset_names_shards_with_damaged_compression(tmp_path):
    for number, content in enumerate((b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0", b"")):
        (tmp_path / f"{number}.tar").write_bytes(content)
        with pytest.raises(ValueError, match=rf"worker 0 of 1.*the rest of .*{number}\.tar \("):
            take(build_web(tmp_path, f"{number}.tar"), 1)


def test_webdataset_replaces_invalid_json_captions(tmp_path):
    captions = (b"[" * 100_000, b'{"caption": "\\ud800"}', b'{"caption": "A."}')
    samples = [part for i, c in enumerate(captions) for part in ((f"{i}.png", png(i)), (f"{i}.json", c))]
    write_shard(tmp_path / "s.tar", samples)
    dataset = build_web(tmp_path, "s.tar", caption="json")
    assert prompts(take(dataset, 2)) == ["A.", "A."] and len(dataset.unreadable) == 2


def test_hub_stream_names_damaged_files(table, caplog):
    content = (table / "p-1.parquet").read_bytes()
    (table / "p-1.parquet").write_bytes(content[:4] + bytes(60) + content[64:])
    dataset = build_hub(table, streaming=True)
    assert set(prompts(take(dataset, 4))) == {"Zero.", "One."}
    assert "the rest of shard 1 of parquet" in caplog.text


def test_hub_rows_name_rows_with_invalid_cells(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"caption": [1, 2], "image": [png(1)] * 2}).to_parquet(tmp_path / "n.parquet")
    keys = {"dataset": "parquet", "files": str(tmp_path / "n.parquet"), "cache": str(tmp_path), "resolution": 4}
    with pytest.raises(ValueError, match=r"row 0 of parquet.*caption.*got 1"):
        data.build({"name": "hf", **keys})
    (tmp_path / "c.jsonl").write_text(json.dumps({"caption": "A.", "path": None, "source": "s"}))
    config = {"name": "longalign-captions", "captions": str(tmp_path / "c.jsonl"), "folders": {"s": str(tmp_path)}}
    with pytest.raises(ValueError, match=r"row 0 of .*c\.jsonl.*path.*got None"):
        data.build({**config, "cache": str(tmp_path / "cache"), "resolution": 4})
