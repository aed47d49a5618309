import base64
import io

import torch
from PIL import Image

from longalign.evaluation.report_images import encode, encode_all
from longalign.image_io import to_tensor, write_png


def opened(data):
    return Image.open(io.BytesIO(data)).convert("RGB")


def test_encode_small_image_is_lossless():
    image = (torch.rand(3, 6, 8) * 255).round() / 255
    torch.testing.assert_close(to_tensor(opened(encode(image, 1024, 60))), image, rtol=0, atol=1e-6)


def test_encode_downscales_and_reads_files(tmp_path):
    write_png(tmp_path / "image.png", torch.zeros(3, 200, 400))
    assert opened(encode(tmp_path / "image.png", 160, 60)).size == (160, 80)


def test_encode_all_uses_best_quality_that_fits():
    torch.manual_seed(0)
    images = [torch.rand(3, 300, 300) for _ in range(3)]
    sizes = []
    for budget in (10_000_000, 40_000):
        urls = encode_all(images, budget)
        data = [base64.b64decode(url.removeprefix("data:image/webp;base64,")) for url in urls]
        assert len(data) == 3 and sum(map(len, data)) <= budget
        sizes.append(opened(data[0]).size)
    assert sizes[0] == (300, 300) and sizes[1][0] < 300


def test_encode_all_leaves_out_images_beyond_budget():
    images = [torch.rand(3, 32, 32) for _ in range(4)]
    assert 0 < len(encode_all(images, 8000)) < 4
    assert encode_all([], 10) == []
