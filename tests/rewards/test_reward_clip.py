import json
import shutil
import warnings

import pytest
import tiny
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from longalign.images import ImagePreprocessor
from longalign.registry import ConfigError, rewards
from longalign.rewards.clip import ClipTowers, pooled
from longalign.rewards.configs import ClipConfig, DenscoreConfig, PickScoreConfig
from longalign.rewards.towers import TowerReward, Towers
from longalign.runtime import Runtime

TWO = "A red fox sleeps on a wall. The sky is green."


@pytest.fixture(scope="module")
def whole(clip_folder):
    return rewards.build({"name": "clip", "checkpoint": clip_folder})


@pytest.fixture(scope="module")
def segments(clip_folder):
    return rewards.build({"name": "denscore", "checkpoint": clip_folder})


def test_the_score_is_the_unscaled_cosine_of_the_model(whole):
    images, prompts = torch.rand(2, 3, 32, 32), ["a red fox", "the sky"]
    model, tokenizer = whole.towers.model, whole.towers.tokenizer
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        text = pooled(model.get_text_features(**inputs))
        image = pooled(model.get_image_features(pixel_values=(images - 0.5) / 0.25))
    expected = torch.cosine_similarity(image, text)
    assert torch.allclose(whole.score(images, prompts), expected, atol=1e-6)
    assert torch.allclose(model(pixel_values=(images - 0.5) / 0.25, **inputs).logits_per_image.diag(),
                          expected * model.logit_scale.exp(), atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (20, 50), (224, 160)])
def test_any_resolution(whole, shape):
    scores = whole.score(torch.rand(2, 3, *shape), ["a red fox", "the sky"])
    assert scores.shape == (2,)
    assert scores.abs().max() <= 1


def test_images_of_another_range_or_type_are_refused(segments):
    images = torch.rand(2, 3, 40, 40)
    with pytest.raises(ValueError, match=r"got values from -0.9.* to 0.9"):
        segments.score(images * 2 - 1, [TWO, "the sky"])
    with pytest.raises(ValueError, match="divide 8-bit"):
        segments.score(images * 255, [TWO, "the sky"])
    with pytest.raises(ValueError, match=r"expected float images .* got torch.uint8"):
        segments.score((images * 255).byte(), [TWO, "the sky"])


def test_gradient_reaches_images_and_no_parameter(segments):
    images = torch.rand(2, 3, 40, 40, requires_grad=True)
    segments.score(images, [TWO, "the sky"]).sum().backward()
    assert images.grad is not None
    assert all((images.grad[i] != 0).any() for i in range(2))
    assert all(p.grad is None and not p.requires_grad for p in segments.parameters())


def test_segments_are_averaged_and_not_normalised_again(segments):
    first, second, both = segments.text_features(["A red fox sleeps on a wall.", "The sky is green.", TWO])
    assert torch.allclose(first.norm(), torch.tensor(1.0))
    assert torch.allclose(both, (first + second) / 2, atol=1e-6)
    assert both.norm() < 0.999
    image = segments.image_features(torch.rand(1, 3, 32, 32))
    assert torch.allclose((image * both).sum(), (image @ torch.stack([first, second]).T).mean(), atol=1e-6)


def test_repeated_segments_are_encoded_once_but_count_twice(segments, monkeypatch):
    seen = []
    embed = segments.towers.embed_texts
    monkeypatch.setattr(segments.towers, "embed_texts", lambda texts: seen.extend(texts) or embed(texts))
    repeated, single = segments.text_features(["It rains. It rains. The sky.", "The sky. It rains."])
    assert sorted(seen) == ["It rains.", "The sky."]
    assert not torch.allclose(repeated, single, atol=1e-4)


def test_batches_of_any_mix_equal_one_at_a_time(segments):
    prompts = ["", "a", TWO * 5, "the sky " * 30, TWO]
    alone = torch.cat([segments.text_features([p]) for p in prompts])
    assert torch.allclose(segments.text_features(prompts), alone, atol=1e-5)


def test_a_text_that_just_fills_the_window_is_whole_and_one_more_token_warns_once(clip_folder):
    reward = rewards.build({"name": "pickscore", "checkpoint": clip_folder, "text": "whole"})
    assert reward.towers.window == 75
    assert reward.towers.count_tokens("a " * 75) == 75
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filled = reward.text_features(["a " * 74 + "fox"])
    with pytest.warns(UserWarning, match=r"76 tokens .* reads 75.*text: auto"):
        longer = reward.text_features(["a " * 74 + "fox sky"])
    assert torch.allclose(filled, longer, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward.text_features(["a " * 80])


def test_by_default_a_prompt_that_fits_is_read_as_published_and_a_longer_one_to_its_end(whole, clip_folder):
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


def test_the_score_of_each_sentence(whole, segments):
    images, prompts = torch.rand(2, 3, 32, 32), [TWO, "A wall."]
    found = segments.by_segment(images, prompts)
    assert [[text for text, _ in of] for of in found] == [TWO.replace(". ", ".|").split("|"), ["A wall."]]
    means = torch.tensor([sum(score for _, score in of) / len(of) for of in found])
    assert torch.allclose(means, segments.score(images, prompts), atol=1e-6)
    single = whole.by_segment(images[:1], [TWO])[0]
    assert len(single) == 2
    assert single[1][1] == pytest.approx(whole.score(images[:1], ["The sky is green."]).item(), abs=1e-6)
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        segments.by_segment(images, [TWO])


@pytest.mark.parametrize("text", ["auto", "segments"])
def test_special_tokens_in_a_prompt_are_text(clip_folder, text):
    reward = rewards.build({"name": "clip", "checkpoint": clip_folder, "text": text})
    plain, ended, empty = reward.text_features(["A fox.", "A fox.<|endoftext|> sky", ""])
    begun = reward.text_features(["<|endoftext|>A"])[0]
    assert not torch.allclose(plain, ended, atol=1e-3) and not torch.allclose(begun, empty, atol=1e-3)


@pytest.mark.parametrize("prompts", [[None], [3], [b"fox"], [["fox"]], [{"a": 1}], ["fox \ud800"], None, b"fox"])
def test_what_is_no_text_is_named(whole, prompts):
    with pytest.raises(ValueError, match=r"prompt 0|sequence of prompts"):
        whole.text_features(prompts)
    if isinstance(prompts, list):
        with pytest.raises(ValueError, match="prompt 0"):
            whole.score(torch.rand(1, 3, 32, 32), prompts)


def test_a_segment_longer_than_the_window_is_split_and_read_to_its_end(segments):
    long = "a " * 80
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fox, sky = segments.text_features([long + "fox", long + "sky"])
    assert not torch.allclose(fox, sky, atol=1e-3)
    parts = segments.segments(long + "fox")
    assert len(parts) == 2
    assert [segments.towers.count_tokens(p) for p in parts] == [75, 6]


def test_micro_batches_change_neither_score_nor_gradient(clip_folder):
    images = torch.rand(5, 3, 32, 32)
    found = []
    for size in (None, 2):
        reward = rewards.build({"name": "clip", "checkpoint": clip_folder, "micro_batch": size})
        x = images.clone().requires_grad_()
        scores = reward.score(x, ["a red fox"] * 5)
        scores.sum().backward()
        found.append((scores.detach(), x.grad))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)


def test_images_go_to_where_the_towers_are():
    class Elsewhere(Towers):
        dim, window = 4, 8

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(12, 4, device="meta"))

        def embed_pixels(self, pixels):
            return pixels.flatten(1) @ self.weight

    features = TowerReward(Elsewhere(), ImagePreprocessor((2, 2))).image_features(torch.rand(3, 3, 8, 8))
    assert features.shape == (3, 4) and features.device.type == "meta"


def test_a_micro_batch_is_one_pass_of_the_tower(clip_folder, monkeypatch):
    reward = rewards.build({"name": "clip", "checkpoint": clip_folder, "micro_batch": 2})
    sizes, embed = [], reward.towers.embed_pixels
    monkeypatch.setattr(reward.towers, "embed_pixels", lambda pixels: sizes.append(len(pixels)) or embed(pixels))
    reward.image_features(torch.rand(5, 3, 32, 32))
    assert sizes == [2, 2, 1]


def test_a_random_crop_is_taken_in_training_mode_only(clip_folder):
    reward = rewards.build({"name": "clip", "checkpoint": clip_folder, "crop": 24})
    plain = rewards.build({"name": "clip", "checkpoint": clip_folder})
    images, prompts = torch.rand(2, 3, 64, 64), ["fox", "sky"]
    assert not torch.equal(reward.score(images, prompts), reward.score(images, prompts))
    assert torch.equal(reward.eval().score(images, prompts), plain.score(images, prompts))
    assert not reward.train().towers.training


def test_settings_come_from_the_checkpoint(whole):
    assert whole.preprocessor.size == (32, 32)
    assert whole.preprocessor.mean == (0.5, 0.5, 0.5)
    assert whole.dim == 16


def test_a_checkpoint_without_tokenizer_takes_the_processors(clip_folder, tmp_path, monkeypatch):
    bare = tiny.tiny_clip(tmp_path / "bare", tokenizer=False)
    images, prompts = torch.rand(2, 3, 32, 32), ["fox", "sky"]
    expected = rewards.build({"name": "clip", "checkpoint": clip_folder}).score(images, prompts)
    named = rewards.build({"name": "denscore", "text": "whole", "checkpoint": str(bare), "processor": clip_folder})
    assert torch.allclose(named.score(images, prompts), expected, atol=1e-6)
    monkeypatch.setattr(PickScoreConfig, "default_processor", clip_folder)
    fallen_back = rewards.build({"name": "pickscore", "checkpoint": str(bare)})
    assert torch.allclose(fallen_back.score(images, prompts), expected, atol=1e-6)


def test_the_default_processor_is_clip_h():
    config = PickScoreConfig()
    assert config.checkpoint == "yuvalkirstain/PickScore_v1"
    assert config.default_processor == ClipConfig().checkpoint == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    assert DenscoreConfig().checkpoint == "luping-liu/Denscore"


def test_a_subfolder_is_read(tmp_path):
    tiny.tiny_clip(tmp_path / "inner")
    assert rewards.build({"name": "clip", "checkpoint": str(tmp_path), "subfolder": "inner"}).dim == 16


def test_half_precision_modules_give_float32_scores(clip_folder):
    runtime = Runtime(dtype="bfloat16")
    reward = rewards.build({"name": "clip", "checkpoint": clip_folder}, runtime)
    assert reward.towers.model.dtype == torch.bfloat16
    assert reward.score(torch.rand(1, 3, 32, 32), ["fox"]).dtype == torch.float32


def test_a_tokenizer_of_another_vocabulary_is_refused(clip_folder, tmp_path):
    copy = shutil.copytree(clip_folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    weights = tiny.weights_of(copy / "model.safetensors")
    size = config["text_config"]["vocab_size"] - 10
    weights["text_model.embeddings.token_embedding.weight"] = torch.zeros(size, 16)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    config["text_config"]["vocab_size"] = size
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"has {size + 10} tokens.*embeddings for {size}; set `processor`"):
        rewards.build({"name": "clip", "checkpoint": str(copy)})
    config["text_config"].update(vocab_size=size + 10, eos_token_id=7)
    weights["text_model.embeddings.token_embedding.weight"] = torch.zeros(size + 10, 16)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"read at token 7, and the tokenizer .* set `processor`"):
        rewards.build({"name": "clip", "checkpoint": str(copy)})


def test_half_a_model_is_refused(tmp_path):
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPTextModel(CLIPTextConfig(**tower, vocab_size=600)).save_pretrained(tmp_path)
    config = {"model_type": "clip", "text_config": {**tower, "vocab_size": 600}, "vision_config": tower}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"not a whole CLIPModel: .* are missing"):
        rewards.build({"name": "clip", "checkpoint": str(tmp_path)})


def test_features_of_either_transformers_version_are_read():
    tensor = torch.ones(1, 2)
    assert pooled(tensor) is tensor
    assert pooled(type("Output", (), {"pooler_output": tensor})()) is tensor


def test_segmenters_are_parts(clip_folder):
    config = {"name": "denscore", "checkpoint": clip_folder, "segmenter": {"name": "tokens", "n": 2}}
    assert rewards.build(config).segments("a red fox") == ["a red", "fox"]
    published = rewards.build({**config, "segmenter": "longalign"})
    assert published.segments("One. Two. ") == ["One.", "Two.", "."]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "clip", "segmenter": "sentence"}, "no use with `text: auto`"),
        ({"name": "clip", "crop": 1.5}, "crop: .*between 0 and 1"),
        ({"name": "clip", "crop": 0}, "crop: .*at least one pixel"),
        ({"name": "clip", "micro_batch": 0}, "micro_batch"),
        ({"name": "clip", "txt": "whole"}, "txt: .*did you mean 'text'"),
        ({"name": "denscore", "segmenter": "sentense"}, "segmenter.*did you mean 'sentence'"),
    ],
)
def test_wrong_configs_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        rewards.validate(config)


def test_a_config_survives_a_round_trip_with_its_defaults_filled_in():
    for name in ("clip", "pickscore", "denscore", "hpsv2"):
        config = rewards.validate(name)
        assert rewards.validate(config.model_dump()) == config
    assert rewards.validate("denscore").model_dump()["segmenter"] == {"name": "sentence"}
    assert rewards.validate({"name": "clip", "text": "segments"}).model_dump()["segmenter"] == {"name": "sentence"}


def test_a_ready_model_needs_no_files(whole):
    reward = TowerReward(ClipTowers(whole.towers.model, whole.towers.tokenizer), whole.preprocessor)
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(reward.score(images, ["fox"]), whole.score(images, ["fox"]))
    with pytest.raises(ValueError, match="at least 1 image"):
        TowerReward(reward.towers, whole.preprocessor, micro_batch=0)


def test_one_prompt_for_each_image(whole):
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        whole.score(torch.rand(2, 3, 32, 32), ["fox"])
    with pytest.raises(ValueError, match=r"pass \[prompt\]"):
        whole.score(torch.rand(3, 3, 32, 32), "fox")
