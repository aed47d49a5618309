from pathlib import Path

import numpy as np
import pytest
import torch
from toys import Brightness, Compass, colours

from longalign.evaluation.measure import measure
from longalign.metrics import Retrieval
from longalign.registry import data, metrics, rewards
from longalign.runtime import Runtime, resolve_checkpoint
from longalign.testing import check_metric
from longalign.testing.tiny import tiny_clip

needs_weights = pytest.mark.skipif(
    not Path(resolve_checkpoint("mini/pickscore")).exists(), reason="the bundled weights are missing"
)


def retrieval(**settings):
    return Retrieval("r", Compass(), **{"query": "text", "orthogonal": False, "num_sentences": None, **settings})


# embeddings of the texts: east (.8, .6, 0), west (.8, -.6, 0), up (.8, 0, .6); images: their normalized colours
PROMPTS = ["east", "up", "west"]
IMAGES = colours((0.8, 0.6, 0), (0.2, 0, 0.9), (1, 0, 0.1))


def found(metric, images=IMAGES, prompts=PROMPTS):
    return measure(images, prompts, [metric])["r"].tolist()


def test_retrieval_of_images_by_text():
    # up scores .64, .76 and .86: the third image, which is close to all texts
    assert found(retrieval()) == [1.0, 0.0, 1.0]


def test_retrieval_of_images_by_the_orthogonal_component():
    # V is (.97, 0, .24); without it, up is (-.09, 0, .38) and scores -.08, .35 and -.06
    assert found(retrieval(orthogonal=True)) == [1.0, 1.0, 1.0]


def test_retrieval_of_texts_by_image():
    # the third image scores .80, .86 and .80
    assert found(retrieval(query="image")) == [1.0, 1.0, 0.0]


def test_retrieval_searches_one_image_of_each_prompt():
    prompts = [*PROMPTS, *PROMPTS]
    assert found(retrieval(), torch.cat([IMAGES, IMAGES]), prompts) == 2 * found(retrieval())


def test_retrieval_orthogonal_needs_two_prompts():
    assert np.isnan(found(retrieval(orthogonal=True), IMAGES[:1], ["east"])).all()


def test_retrieval_cuts_prompts_to_sentences(tmp_path):
    inner = {"name": "clip", "checkpoint": str(tiny_clip(tmp_path))}
    prompts, images = ["A fox. It sleeps. It is red.", "A wall. It is old."], torch.rand(2, 3, 32, 32)
    metric = metrics.build({"name": "retrieval", "reward": inner, "sentences": 1}, Runtime())
    text = metric.observe(images, prompts)["text"]
    torch.testing.assert_close(text, rewards.build(inner, Runtime()).eval().text_features(["A fox.", "A wall."]))


@pytest.mark.parametrize("query", ["text", "image"])
def test_check_metric_retrieval(tmp_path, query):
    inner = {"name": "clip", "checkpoint": str(tiny_clip(tmp_path)), "text": "segments"}
    check_metric({"name": "retrieval", "reward": inner, "component": "orthogonal", "query": query})


def test_retrieval_rejects_rewards_without_embeddings():
    rewards.register("bright", lambda images, prompts: Brightness().score(images, prompts))
    try:
        with pytest.raises(ValueError, match="'bright' has no embeddings;"):
            metrics.build({"name": "retrieval", "reward": "bright"}, Runtime())
    finally:
        rewards.unregister("bright")


@needs_weights
def test_retrieval_of_true_renders_needs_the_orthogonal_component():
    settings = {"size": 48, "seed": 1_000_001, "words": [60, 160], "objects": [5, 9]}
    scenes = data.build({"name": "scenes", **settings}, Runtime())
    items = [scenes[i] for i in range(48)]
    inner = {"name": "pickscore", "checkpoint": "mini/pickscore", "text": "segments"}
    built = [
        metrics.build({"name": "retrieval", "label": name, "reward": inner, "component": name}, Runtime())
        for name in ("whole", "orthogonal")
    ]
    values = measure(torch.stack([item["image"] for item in items]), [item["prompt"] for item in items], built)
    assert values["orthogonal"].mean() > 0.9 and values["orthogonal"].mean() > values["whole"].mean()
