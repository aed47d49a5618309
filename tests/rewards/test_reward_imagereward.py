import json
import math
import warnings

import pytest
import torch
from torch.nn import functional as F

from longalign.functional.images import ImagePreprocessor
from longalign.registry import rewards
from longalign.runtime import Runtime
from longalign.testing import check_reward
from longalign.testing.tiny import tiny_imagereward

PROMPTS = ["A red fox", "The sky is green. A red wall."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_imagereward(tmp_path_factory.mktemp("imagereward"))


@pytest.fixture(scope="module")
def reward(folder):
    return rewards.build({"name": "imagereward", "checkpoint": str(folder)})


def reference(state, pixels, ids):
    """The score of one image and text from the published weights: BLIP's image and text encoder, and the head."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x, eps):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(query, key, value, heads):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (query, key, value))
        return ((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v).transpose(0, 1).flatten(1)

    image, text = "blip.visual_encoder", "blip.text_encoder"
    patches = F.conv2d(
        pixels, state[f"{image}.patch_embed.proj.weight"], state[f"{image}.patch_embed.proj.bias"], stride=16
    )
    x = torch.cat([state[f"{image}.cls_token"][0], patches.flatten(2)[0].T]) + state[f"{image}.pos_embed"][0]
    for i in range(2):
        block = f"{image}.blocks.{i}"
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(q, k, v, 1))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    x = norm(f"{image}.norm", x, 1e-6)

    embeddings = f"{text}.embeddings"
    y = state[f"{embeddings}.word_embeddings.weight"][ids]
    y = y + state[f"{embeddings}.position_embeddings.weight"][: len(ids)]
    y = norm(f"{embeddings}.LayerNorm", y, 1e-12)
    for i in range(2):
        layer = f"{text}.encoder.layer.{i}"
        for name in ("attention", "crossattention"):
            part, source = f"{layer}.{name}", y if name == "attention" else x
            queries = (linear(f"{part}.self.{q}", s) for q, s in (("query", y), ("key", source), ("value", source)))
            y = norm(f"{part}.output.LayerNorm", y + linear(f"{part}.output.dense", attend(*queries, 2)), 1e-12)
        hidden = F.gelu(linear(f"{layer}.intermediate.dense", y))
        y = norm(f"{layer}.output.LayerNorm", y + linear(f"{layer}.output.dense", hidden), 1e-12)
    score = y[0]
    for i in (0, 2, 4, 6, 7):
        score = linear(f"mlp.layers.{i}", score)
    return (score - 0.16717362830052426) / 1.0333394966054072


def test_score_equals_reference_from_published_weights(folder, reward):
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    images = torch.rand(2, 3, 32, 32)
    pixels = ImagePreprocessor((32, 32))(images)
    ids = [reward.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert [len(row) for row in ids] == [5, 11] and 1 not in ids[0] + ids[1]  # no unknown word
    expected = torch.cat([reference(state, pixels[i : i + 1], torch.tensor(ids[i])) for i in range(2)])
    assert torch.allclose(reward.score(images, PROMPTS), expected, atol=1e-4)


def test_imagereward_conforms(folder):
    with pytest.warns(UserWarning, match=r"\d+ tokens.*reads 33.*name: segments, inner: imagereward"):
        check_reward({"name": "imagereward", "checkpoint": str(folder)})


def test_training_mode_changes_nothing_and_bf16_keeps_the_head(folder, reward):
    images = torch.rand(2, 3, 40, 32)
    scores = reward.score(images, PROMPTS)
    reward.train()
    assert torch.equal(reward.score(images, PROMPTS), scores)
    reward.eval()
    half = rewards.build({"name": "imagereward", "checkpoint": str(folder)}, Runtime(dtype="bfloat16"))
    assert half.head[0].weight.dtype == torch.float32 and half.vision.dtype == torch.bfloat16
    assert torch.allclose(half.score(images, PROMPTS), scores, atol=0.5)


def test_segments_score_a_long_prompt_without_truncation_and_encode_the_image_once(folder):
    reward = rewards.build({"name": "segments", "inner": {"name": "imagereward", "checkpoint": str(folder)}})
    encoded = []
    reward.inner.vision.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    prompts = ["The sky is green. " * 9 + "A red fox " * 20, "A wall."]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = reward.score(images, prompts)
    assert encoded == [2]
    scores.sum().backward()
    assert all(images.grad[i].any() for i in range(2))
    segments = reward.segments(prompts[0])
    assert max(map(reward.inner.count_tokens, segments)) <= 33
    singles = torch.stack([reward.inner.score(images[:1], [text]) for text in segments])
    assert torch.allclose(scores[0], singles.mean(), atol=1e-5)


def test_rejects_files_of_other_models(folder, tmp_path):
    config = {"name": "imagereward", "checkpoint": str(tmp_path)}
    with pytest.raises(ValueError, match=r"has no med_config\.json"):
        rewards.build(config)
    tiny_imagereward(tmp_path)
    file = tmp_path / "ImageReward.pt"
    state = torch.load(file, weights_only=True)
    torch.save({k: v for k, v in state.items() if ".blocks.1.attn" not in k}, file)
    with pytest.raises(ValueError, match=r"4 weights blip\.visual_encoder\.\* are missing"):
        rewards.build(config)
    torch.save({"logit_scale": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"expected weights with the names blip\.visual_encoder"):
        rewards.build(config)
    torch.save(state, file)
    med = json.loads((tmp_path / "med_config.json").read_text())
    (tmp_path / "med_config.json").write_text(json.dumps({**med, "hidden_size": 4}))
    with pytest.raises(ValueError, match=r"blip\.text_encoder\.\* of .* do not match med_config"):
        rewards.build(config)
    del med["hidden_act"]
    (tmp_path / "med_config.json").write_text(json.dumps(med))
    with pytest.raises(ValueError, match="expected the keys hidden_act"):
        rewards.build(config)
