import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from longalign.functional.images import ImagePreprocessor
from longalign.registry import ConfigError, rewards
from longalign.rewards.clip.config import ClipConfig, DenscoreConfig, PickScoreConfig
from longalign.rewards.clip.towers import ClipTowers
from longalign.rewards.pretrained import projected_features
from longalign.rewards.towers import Towers
from longalign.runtime import Runtime
from longalign.testing import tiny

TWO = "A red fox sleeps on a wall. The sky is green."


@pytest.fixture(scope="module")
def whole(clip_folder):
    return rewards.build({"name": "clip", "checkpoint": clip_folder})


@pytest.fixture(scope="module")
def segments(clip_folder):
    return rewards.build({"name": "denscore", "checkpoint": clip_folder})


def test_clip_score_is_unscaled_cosine(whole):
    images, prompts = torch.rand(2, 3, 32, 32), ["a red fox", "the sky"]
    model, tokenizer = whole.towers.model, whole.towers.tokenizer
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        text = projected_features(model.get_text_features(**inputs))
        image = projected_features(model.get_image_features(pixel_values=(images - 0.5) / 0.25))
    expected = torch.cosine_similarity(image, text)
    assert torch.allclose(whole.score(images, prompts), expected, atol=1e-6)
    assert torch.allclose(model(pixel_values=(images - 0.5) / 0.25, **inputs).logits_per_image.diag(),
                          expected * model.logit_scale.exp(), atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (20, 50), (224, 160)])
def test_clip_score_any_resolution(whole, shape):
    scores = whole.score(torch.rand(2, 3, *shape), ["a red fox", "the sky"])
    assert scores.shape == (2,)
    assert scores.abs().max() <= 1


def test_denscore_rejects_images_of_wrong_range_or_dtype(segments):
    images = torch.rand(2, 3, 40, 40)
    with pytest.raises(ValueError, match=r"\[0, 1\], got .*-0\.9.* 0\.9"):
        segments.score(images * 2 - 1, [TWO, "the sky"])
    with pytest.raises(ValueError, match=r"\[0, 1\], got .*255"):
        segments.score(images * 255, [TWO, "the sky"])
    with pytest.raises(ValueError, match=r"\(b, 3, h, w\).* got torch\.uint8"):
        segments.score((images * 255).byte(), [TWO, "the sky"])


def test_denscore_gradient_reaches_images_only(segments):
    images = torch.rand(2, 3, 40, 40, requires_grad=True)
    segments.score(images, [TWO, "the sky"]).sum().backward()
    assert images.grad is not None
    assert all((images.grad[i] != 0).any() for i in range(2))
    assert all(p.grad is None and not p.requires_grad for p in segments.parameters())


def test_denscore_text_features_are_unnormalized_mean(segments):
    first, second, both = segments.text_features(["A red fox sleeps on a wall.", "The sky is green.", TWO])
    assert torch.allclose(first.norm(), torch.tensor(1.0))
    assert torch.allclose(both, (first + second) / 2, atol=1e-6)
    assert both.norm() < 0.999
    image = segments.image_features(torch.rand(1, 3, 32, 32))
    assert torch.allclose((image * both).sum(), (image @ torch.stack([first, second]).T).mean(), atol=1e-6)


def test_denscore_repeated_segments_encoded_once_weighted_twice(segments, monkeypatch):
    encoded = []
    embed = segments.towers.embed_texts
    monkeypatch.setattr(segments.towers, "embed_texts", lambda texts: encoded.extend(texts) or embed(texts))
    repeated, single = segments.text_features(["It rains. It rains. The sky.", "The sky. It rains."])
    assert sorted(encoded) == ["It rains.", "The sky."]
    assert not torch.allclose(repeated, single, atol=1e-4)


def test_denscore_mixed_batch_equals_single_prompts(segments):
    prompts = ["", "a", TWO * 5, "the sky " * 30, TWO]
    single = torch.cat([segments.text_features([p]) for p in prompts])
    assert torch.allclose(segments.text_features(prompts), single, atol=1e-5)


def test_pickscore_whole_warns_once_above_window(clip_folder):
    reward = rewards.build({"name": "pickscore", "checkpoint": clip_folder, "text": "whole"})
    assert reward.towers.window == 75
    assert reward.towers.count_tokens("a " * 75) == 75
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filled = reward.text_features(["a " * 74 + "fox"])
    with pytest.warns(UserWarning, match=r"76 tokens.* 75.*text: auto"):
        longer = reward.text_features(["a " * 74 + "fox sky"])
    assert torch.allclose(filled, longer, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward.text_features(["a " * 80])


def test_clip_text_auto_encodes_short_whole_and_long_in_windows(whole, clip_folder):
    published = rewards.build({"name": "clip", "checkpoint": clip_folder, "text": "whole"})
    assert torch.equal(whole.text_features([TWO]), published.text_features([TWO]))
    long = TWO + " The sky." * 30
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fox, other = whole.text_features([long + " A fox.", long + " A wall."])
    assert not torch.allclose(fox, other, atol=1e-3)
    parts = whole.segments(long)
    assert " ".join(parts) == long and len(parts) == 2
    assert torch.allclose(whole.text_features([long])[0], whole.text_features(parts).mean(0), atol=1e-6)


def test_by_segment_scores_each_sentence(whole, segments):
    images, prompts = torch.rand(2, 3, 32, 32), [TWO, "A wall."]
    scored = segments.by_segment(images, prompts)
    assert [[text for text, _ in pairs] for pairs in scored] == [TWO.replace(". ", ".|").split("|"), ["A wall."]]
    means = torch.tensor([sum(score for _, score in pairs) / len(pairs) for pairs in scored])
    assert torch.allclose(means, segments.score(images, prompts), atol=1e-6)
    single = whole.by_segment(images[:1], [TWO])[0]
    assert len(single) == 2
    assert single[1][1] == pytest.approx(whole.score(images[:1], ["The sky is green."]).item(), abs=1e-6)
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        segments.by_segment(images, [TWO])


@pytest.mark.parametrize("text", ["auto", "segments"])
def test_clip_encodes_special_tokens_in_prompt_as_text(clip_folder, text):
    reward = rewards.build({"name": "clip", "checkpoint": clip_folder, "text": text})
    plain, ended, empty = reward.text_features(["A fox.", "A fox.<|endoftext|> sky", ""])
    begun = reward.text_features(["<|endoftext|>A"])[0]
    assert not torch.allclose(plain, ended, atol=1e-3) and not torch.allclose(begun, empty, atol=1e-3)


@pytest.mark.parametrize("prompts", [[None], [3], [b"fox"], [["fox"]], [{"a": 1}], ["fox \ud800"], None, b"fox"])
def test_clip_rejects_prompts_that_are_not_text(whole, prompts):
    with pytest.raises(ValueError, match=r"prompt 0|sequence of prompts"):
        whole.text_features(prompts)
    if isinstance(prompts, list):
        with pytest.raises(ValueError, match="prompt 0"):
            whole.score(torch.rand(1, 3, 32, 32), prompts)


def test_denscore_splits_segments_longer_than_window(segments):
    long = "a " * 80
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fox, sky = segments.text_features([long + "fox", long + "sky"])
    assert not torch.allclose(fox, sky, atol=1e-3)
    parts = segments.segments(long + "fox")
    assert len(parts) == 2
    assert [segments.towers.count_tokens(p) for p in parts] == [75, 6]


def test_denscore_truncates_segments_on_request(clip_folder, segments):
    reward = rewards.build({"name": "denscore", "checkpoint": clip_folder, "truncate_segments": True})
    long = " ".join(["a"] * 80)
    with pytest.warns(UserWarning, match=r"segment has 81 tokens.* 75.*truncate_segments: false"):
        truncated = reward.text_features([f"{long}. The sky."])
    expected = segments.text_features([" ".join(["a"] * 75), "The sky."]).mean(0, keepdim=True)
    torch.testing.assert_close(truncated, expected)
    images = torch.rand(1, 3, 32, 32)
    (scored,) = reward.by_segment(images, [f"{long}. The sky."])
    assert len(scored) == 2
    assert sum(s for _, s in scored) / 2 == pytest.approx(reward.score(images, [f"{long}. The sky."]).item(), abs=1e-6)


def test_clip_interpolation_and_crop_position(clip_folder):
    images, prompts = torch.rand(4, 3, 64, 64), ["fox"] * 4
    plain, bilinear, cropped = (
        rewards.build({"name": "clip", "checkpoint": clip_folder, **keys})
        for keys in ({}, {"interpolation": "bilinear"}, {"crop": 48, "crop_position": "batch"})
    )
    assert not torch.equal(plain.score(images, prompts), bilinear.score(images, prompts))
    same = images[:1].repeat(4, 1, 1, 1)
    assert cropped.training and len(cropped.score(same, prompts).mul(1e5).round().unique()) == 1


def test_micro_batch_keeps_score_and_gradient(clip_folder):
    images = torch.rand(5, 3, 32, 32)
    results = []
    for size in (None, 2):
        reward = rewards.build({"name": "clip", "checkpoint": clip_folder, "micro_batch": size})
        x = images.clone().requires_grad_()
        scores = reward.score(x, ["a red fox"] * 5)
        scores.sum().backward()
        results.append((scores.detach(), x.grad))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)


def test_image_features_moves_images_to_device_of_towers():
    class MetaTowers(Towers):
        dim, window = 4, 8

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(12, 4, device="meta"))

        def embed_pixels(self, pixels):
            return pixels.flatten(1) @ self.weight

    features = tiny.tower_reward(MetaTowers(), ImagePreprocessor((2, 2))).image_features(torch.rand(3, 3, 8, 8))
    assert features.shape == (3, 4) and features.device.type == "meta"


def test_micro_batch_is_size_of_image_tower_pass(clip_folder, monkeypatch):
    reward = rewards.build({"name": "clip", "checkpoint": clip_folder, "micro_batch": 2})
    sizes, embed = [], reward.towers.embed_pixels
    monkeypatch.setattr(reward.towers, "embed_pixels", lambda pixels: sizes.append(len(pixels)) or embed(pixels))
    reward.image_features(torch.rand(5, 3, 32, 32))
    assert sizes == [2, 2, 1]


def test_random_crop_only_in_training_mode(clip_folder):
    reward = rewards.build({"name": "clip", "checkpoint": clip_folder, "crop": 24})
    plain = rewards.build({"name": "clip", "checkpoint": clip_folder})
    images, prompts = torch.rand(2, 3, 64, 64), ["fox", "sky"]
    assert not torch.equal(reward.score(images, prompts), reward.score(images, prompts))
    assert torch.equal(reward.eval().score(images, prompts), plain.score(images, prompts))
    assert not reward.train().towers.training


def test_clip_settings_from_checkpoint(whole):
    assert whole.preprocessor.size == (32, 32)
    assert whole.preprocessor.mean == (0.5, 0.5, 0.5)
    assert whole.dim == 16


def test_checkpoint_without_tokenizer_uses_processor(clip_folder, tmp_path, monkeypatch):
    without_tokenizer = tiny.tiny_clip(tmp_path / "bare", tokenizer=False)
    images, prompts = torch.rand(2, 3, 32, 32), ["fox", "sky"]
    expected = rewards.build({"name": "clip", "checkpoint": clip_folder}).score(images, prompts)
    explicit = rewards.build(
        {"name": "denscore", "text": "whole", "checkpoint": str(without_tokenizer), "processor": clip_folder}
    )
    assert torch.allclose(explicit.score(images, prompts), expected, atol=1e-6)
    monkeypatch.setattr(PickScoreConfig, "default_processor", clip_folder)
    fallback = rewards.build({"name": "pickscore", "checkpoint": str(without_tokenizer)})
    assert torch.allclose(fallback.score(images, prompts), expected, atol=1e-6)


def test_default_processor_is_clip_h():
    config = PickScoreConfig()
    assert config.checkpoint == "yuvalkirstain/PickScore_v1"
    assert config.default_processor == ClipConfig().checkpoint == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert DenscoreConfig().checkpoint == "luping-liu/Denscore"


def test_clip_loads_subfolder(tmp_path):
    tiny.tiny_clip(tmp_path / "inner")
    assert rewards.build({"name": "clip", "checkpoint": str(tmp_path), "subfolder": "inner"}).dim == 16


def test_bfloat16_towers_give_float32_scores(clip_folder):
    runtime = Runtime(dtype="bfloat16")
    reward = rewards.build({"name": "clip", "checkpoint": clip_folder}, runtime)
    assert reward.towers.model.dtype == torch.bfloat16
    assert reward.score(torch.rand(1, 3, 32, 32), ["fox"]).dtype == torch.float32


def test_clip_rejects_tokenizer_of_different_vocabulary(clip_folder, tmp_path):
    copy = shutil.copytree(clip_folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    weights = tiny.weights_of(copy / "model.safetensors")
    size = config["text_config"]["vocab_size"] - 10
    weights["text_model.embeddings.token_embedding.weight"] = torch.zeros(size, 16)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    config["text_config"]["vocab_size"] = size
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{size + 10} tokens.* {size} embeddings.*`processor`"):
        rewards.build({"name": "clip", "checkpoint": str(copy)})
    config["text_config"].update(vocab_size=size + 10, eos_token_id=7)
    weights["text_model.embeddings.token_embedding.weight"] = torch.zeros(size + 10, 16)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"at token 7, .*tokenizer .*`processor`"):
        rewards.build({"name": "clip", "checkpoint": str(copy)})


def test_clip_rejects_incomplete_model(tmp_path):
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPTextModel(CLIPTextConfig(**tower, vocab_size=600)).save_pretrained(tmp_path)
    config = {"model_type": "clip", "text_config": {**tower, "vocab_size": 600}, "vision_config": tower}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"CLIPModel: \d+ weights .*'logit_scale'"):
        rewards.build({"name": "clip", "checkpoint": str(tmp_path)})


def test_projected_features_accepts_tensor_or_output_object():
    tensor = torch.ones(1, 2)
    assert projected_features(tensor) is tensor
    assert projected_features(type("Output", (), {"pooler_output": tensor})()) is tensor


def test_denscore_segmenter_from_config(clip_folder):
    config = {"name": "denscore", "checkpoint": clip_folder, "segmenter": {"name": "tokens", "n": 2}}
    assert rewards.build(config).segments("a red fox") == ["a red", "fox"]
    published = rewards.build({**config, "segmenter": "longalign"})
    assert published.segments("One. Two. ") == ["One.", "Two.", "."]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "clip", "segmenter": "sentence"}, "segmenter .*`text: auto`"),
        ({"name": "clip", "crop": 1.5}, r"crop: .*between 0 and 1, got 1\.5"),
        ({"name": "clip", "crop": 0}, "crop: .*at least 1 pixel, got 0"),
        ({"name": "clip", "crop_position": "batch"}, "crop_position.*without a crop"),
        ({"name": "clip", "truncate_segments": True}, "truncate_segments .*`text: auto`"),
        ({"name": "clip", "micro_batch": 0}, "micro_batch: .*got 0"),
        ({"name": "clip", "txt": "whole"}, "txt: .*did you mean 'text'"),
        ({"name": "denscore", "segmenter": "sentense"}, "segmenter.*did you mean 'sentence'"),
    ],
)
def test_reward_configs_reject_wrong_values(config, message):
    with pytest.raises(ConfigError, match=message):
        rewards.validate(config)


def test_reward_config_round_trip_with_defaults():
    for name in ("clip", "pickscore", "denscore", "hpsv2"):
        config = rewards.validate(name)
        assert rewards.validate(config.model_dump()) == config
    assert rewards.validate("denscore").model_dump()["segmenter"] == {"name": "sentence"}
    assert rewards.validate({"name": "clip", "text": "segments"}).model_dump()["segmenter"] == {"name": "sentence"}


def test_tower_reward_from_loaded_model(whole):
    reward = tiny.tower_reward(ClipTowers(whole.towers.model, whole.towers.tokenizer), whole.preprocessor)
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(reward.score(images, ["fox"]), whole.score(images, ["fox"]))
    with pytest.raises(ConfigError, match=r"micro_batch: "):
        rewards.validate({"name": "clip", "micro_batch": 0})


def test_score_rejects_wrong_number_of_prompts(whole):
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        whole.score(torch.rand(2, 3, 32, 32), ["fox"])
    with pytest.raises(ValueError, match=r"pass \[prompt\]"):
        whole.score(torch.rand(3, 3, 32, 32), "fox")
