"""Random and damaged images and data: each file is read, or rejected with a ValueError or OSError.

Counts are in docs/reliability.md.
"""

import io
import json
import os
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from longalign.data.images.base import UNREADABLE, ImageLoader
from longalign.files.lines import inside
from longalign.image_folder import read_captions
from longalign.image_io import FORMATS, load_image
from longalign.registry import data as data_registry

pytestmark = [
    pytest.mark.reliability,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Pillow warns about damaged metadata
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
MANY = settings(
    max_examples=2000,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
SOME = settings(MANY, max_examples=500)


def encoded(kind, mode="RGB", size=(24, 16), **keys):
    values = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).convert(mode).save(buffer, kind, **keys)
    return buffer.getvalue()


SEEDS = {
    kind: encoded(kind) for kind in FORMATS if kind in Image.registered_extensions().values() and kind in Image.SAVE
}
SEEDS["PNG, palette"] = encoded("PNG", "P")
Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)).save(sixteen := io.BytesIO(), "PNG")
SEEDS["PNG, 16 bits"] = sixteen.getvalue()
SEEDS["TIFF, LZW"] = encoded("TIFF", compression="tiff_lzw")
SEEDS["JPEG, EXIF"] = encoded(
    "JPEG", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x01\x00\x12\x01\x03\x00\x01\x00\x00\x00\x06"
)
SEEDS["JPEG, CMYK"] = encoded("JPEG", "CMYK")


def read(content):
    """Returns the image, or None if it is rejected with an expected error."""
    try:
        image = ImageLoader(8).load("image", content)
    except UNREADABLE as error:
        assert str(error) or isinstance(error, OSError)
        return None
    assert image.shape == (3, 8, 8) and 0 <= image.min() <= image.max() <= 1
    return image


@st.composite
def damaged(draw, seeds):
    """A file that is truncated, has bytes changed, removed, repeated or inserted, or is joined to a second file."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        damage = draw(st.sampled_from(["truncate", "flip", "head", "remove", "repeat", "insert", "join", "number"]))
        if damage == "truncate":
            del content[at:]
        elif damage in ("flip", "head") and content:
            content[at % 64 if damage == "head" and len(content) > 64 else at] ^= draw(st.integers(1, 255))
        elif damage == "remove":
            del content[at : at + draw(st.integers(1, 64))]
        elif damage == "repeat":
            content[at:at] = content[at : at + draw(st.integers(1, 64))]
        elif damage == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif damage == "number":
            content[at : at + 4] = draw(st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\xff\xff"]))
        else:
            content += draw(st.sampled_from(seeds))
    return bytes(content)


@pytest.mark.parametrize("name", SEEDS)
def test_load_square_reads_all_formats(name):
    assert read(SEEDS[name]) is not None


@pytest.mark.parametrize("name", SEEDS)
def test_load_square_truncated_files(name):
    content = SEEDS[name]
    for length in range(0, len(content), max(1, len(content) // 400)):
        read(content[:length])


@MANY
@given(damaged(list(SEEDS.values())))
def test_load_square_damaged_files(content):
    started = time.monotonic()
    read(content)
    assert time.monotonic() - started < 20


@SOME
@given(st.binary(max_size=300))
def test_load_square_random_bytes(content):
    read(content)


@SOME
@given(
    st.sampled_from(["L", "I;16", "I;16B", "RGB", "CMYK", "F", "I", "LAB", "YCbCr", "1", "P", "LA", "RGBA"]), st.data()
)
def test_load_square_tiff_modes(mode, data):
    size = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    values = data.draw(st.binary(min_size=9 * 9 * 4, max_size=9 * 9 * 4))
    image = Image.new(mode, size)
    image.frombytes(values[: len(image.tobytes())])
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    square = read(buffer.getvalue())
    if mode in ("I;16", "I;16B"):
        corner = int.from_bytes(image.tobytes()[:2], "big" if mode.endswith("B") else "little")
        loaded = load_image_from_bytes(buffer.getvalue())
        assert abs(loaded[0, 0, 0].item() - corner / 65535) < 1 / 255
    assert mode != "I" or square is None


def load_image_from_bytes(content):
    with tempfile.NamedTemporaryFile(suffix=".tiff") as file:
        file.write(content)
        file.flush()
        return load_image(file.name)


def archive(members, compression=""):
    buffer = io.BytesIO()
    mode: Any = f"w:{compression}"
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


PICTURE = SEEDS["PNG"]
PLAIN = [(f"{i:03}.{ending}", content) for i in range(4) for ending, content in (("png", PICTURE), ("txt", b"A fox."))]
ARCHIVES = [archive(PLAIN), archive(PLAIN, "gz"), archive(PLAIN, "xz"), archive([("a" * 300 + ".png", PICTURE)])]


def shard(content, **keys):
    """Reads items of a shard; None if it is rejected with an expected error."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "s.tar")
        path.write_bytes(content)
        try:
            stream = data_registry.build(
                {"name": "webdataset", "shards": str(path), "resolution": 8, "max_unreadable": 3, **keys}
            )
            items = stream.items(seed=0)
            return [next(items) for _ in range(6)]
        except UNREADABLE as error:
            assert str(error)
            return None


@SOME
@given(damaged(ARCHIVES))
def test_webdataset_damaged_shards(content):
    for item in shard(content) or ():
        assert item["image"].shape == (3, 8, 8) and item["prompt"].encode()


FORMS = ["{}.png", "{}.txt", "{}.json", "../{}.png", "/{}.txt"]
CAPTIONS = [b'{"caption": "A fox."}', b'{"caption": 3}', b'{"caption": "\\ud800"}', b"[" * 100_000]
CONTENTS = [PICTURE, b"A fox.", b"\xff", b"", *CAPTIONS]


@SOME
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20).flatmap(
                lambda stem: st.sampled_from([form.format(stem) for form in FORMS])
            ),
            st.sampled_from(CONTENTS),
        ),
        max_size=8,
    ),
    st.sampled_from(["txt", "json"]),
)
def test_webdataset_random_members(members, caption):
    for item in shard(archive(members), caption=caption) or ():
        assert item["image"].shape == (3, 8, 8) and item["prompt"].encode()


ROWS = st.dictionaries(
    st.sampled_from(["file_name", "text", "prompt", "image_0", "image_1", "label_0", "label_1", "preference", "x"]),
    st.one_of(
        st.sampled_from(["a.png", "b.png", "A fox.", "../a.png", "/etc/passwd", "", "\0", "\ud800", "a.png/..", "."]),
        st.text(max_size=10),
        st.none(), st.booleans(), st.integers(), st.floats(), st.lists(st.text(max_size=3), max_size=2),
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in") / "images"
    folder.mkdir()
    for name in ("a.png", "b.png", "../secret.png"):
        (folder / name).write_bytes(PICTURE)
    return folder


@pytest.mark.parametrize("name", ["folder", "pairs"])
def test_folder_and_pairs_random_metadata(folder, name):
    @MANY
    @given(st.lists(ROWS, max_size=5), st.data())
    def attack(rows, data):
        text = "\n".join(map(json.dumps, rows)).encode()
        if data.draw(st.booleans()):
            text = data.draw(damaged([text or b"{}"]))
        (folder / "metadata.jsonl").write_bytes(text)
        try:
            dataset = data_registry.build({"name": name, "folder": str(folder), "resolution": 8})
            items = [dataset[i] for i in range(len(dataset))]
        except UNREADABLE as error:
            assert str(error)
            return
        for item in items:
            assert item["image"].shape[-3:] == (3, 8, 8) and item["prompt"].encode()

    attack()


def test_read_captions_damaged_csv(tmp_path):
    @SOME
    @given(
        damaged(
            [b'file_name,text\na.png,"A fox, red."\nb.png,B.\n', b"file_name;text\na.png;A", b'a,b\n"', b"\xef\xbb\xbf"]
        )
    )
    def attack(content):
        (tmp_path / "metadata.csv").write_bytes(content)
        try:
            read_captions(tmp_path)
        except UNREADABLE as error:
            assert str(error)

    attack()


@settings(MANY, max_examples=5000)
@given(
    st.lists(st.sampled_from(["..", ".", "a", "b.png", "", "/", "a..", "...", "\\", "~", "etc", "in"])).map("/".join)
)
def test_inside_rejects_names_outside_folder(name):
    for folder in ("in", "/tmp/in", "in/../in", "/"):
        try:
            path = inside(folder, name)
        except ValueError as error:
            assert str(error).startswith(f"{name!r:.200} ") and str(folder) in str(error)
            continue
        root = os.path.normpath(os.path.abspath(folder))
        assert os.path.commonpath([root, os.path.normpath(os.path.abspath(path))]) == root
        assert ".." not in Path(os.path.relpath(path, folder)).parts or folder == "in/../in"
