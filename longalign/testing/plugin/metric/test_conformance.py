from longalign.testing import check_metric


def test_my_part_conforms():
    check_metric({"name": "my-part"})


def test_bright_pixels_count():
    import torch

    from longalign.registry import metrics

    metric = metrics.build({"name": "my-part", "threshold": 0.5})
    images = torch.zeros(2, 3, 4, 4)
    images[1, :, :, 0] = 1
    assert metric.observe(images, ["a", "b"])["my-part"].tolist() == [0, 0.25]
