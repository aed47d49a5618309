"""HPSv3: the published file, the score against plain transformers, the instruction, and errors."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from longalign.config.checks import check_parts
from longalign.registry import ConfigError, rewards
from longalign.rewards.hpsv3.config import REWARD_TOKEN, WEIGHTS
from longalign.rewards.hpsv3.weights import make_head
from longalign.testing import check_reward
from longalign.testing.tiny import tiny_hpsv3, weights_of

PROMPTS = ["a red", "are there a a a red", "no"]
TEXT = "\nis a {text_prompt} no\n\n\n are there " + REWARD_TOKEN + "\n\n2\n"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = str(tiny_hpsv3(tmp_path_factory.mktemp("hpsv3")))
    return {"name": "hpsv3", "checkpoint": folder, "base": folder, "instruction": TEXT}


def smooth(n, height, width):
    """8-bit images without steps, so that resizing a tensor and resizing an 8-bit image agree."""
    images = torch.nn.functional.interpolate(torch.rand(n, 3, 6, 6), (height, width), mode="bilinear")
    return (images * 255).round() / 255


@torch.no_grad()
def expected(folder, images, prompts):
    """Mean and sigma by plain transformers: the published names are loaded into a model with an extra token."""
    from transformers import AutoConfig, AutoProcessor, Qwen2VLForConditionalGeneration

    processor = AutoProcessor.from_pretrained(folder)
    size = {"shortest_edge": 256 * 28 * 28, "longest_edge": 256 * 28 * 28}
    processor.image_processor = type(processor.image_processor)(size=size)
    processor.tokenizer.padding_side = "right"
    processor.tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
    state, head = load_file(f"{folder}/{WEIGHTS}"), make_head(16)
    head.load_state_dict({key.removeprefix("rm_head."): state.pop(key) for key in [*state] if "rm_head" in key})
    config = AutoConfig.from_pretrained(folder)
    config.text_config.vocab_size = len(processor.tokenizer)
    model = Qwen2VLForConditionalGeneration(config)
    names = {k: k.replace("visual.", "model.visual.") if k.startswith("visual.") else k for k in state}
    names |= {k: k.replace("model.", "model.language_model.", 1) for k in state if k.startswith("model.")}
    model.load_state_dict({names[key]: value for key, value in state.items()})
    texts = []
    for prompt in prompts:
        content = [{"type": "image"}, {"type": "text", "text": TEXT.format(text_prompt=prompt)}]
        message = {"role": "user", "content": content}
        texts.append(processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
    pil = [[Image.fromarray(np.asarray((255 * image).round().byte().permute(1, 2, 0)))] for image in images]
    inputs = processor(text=texts, images=pil, padding=True, return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 28, 38]] * len(images)  # 392 by 532 pixels
    ids, embeddings = inputs["input_ids"], model.get_input_embeddings()(inputs["input_ids"])
    patches = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    patches = torch.cat(list(getattr(patches, "pooler_output", patches)))
    embeddings = embeddings.masked_scatter((ids == config.image_token_id)[..., None].expand_as(embeddings), patches)
    # no position ids: the language model counts
    states = model.model.language_model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])[0]
    mean, log_sigma = head.eval()(states[ids == processor.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)]).unbind(1)
    return mean, log_sigma.exp()


def test_score_equals_plain_transformers(config):
    reward, images = rewards.build(config), smooth(3, 60, 80)
    mean, sigma = expected(config["checkpoint"], images, PROMPTS)
    with torch.no_grad():
        scores = reward.score_components(images, PROMPTS)
    assert torch.allclose(scores.total, mean, atol=0.05 * float(mean.std()))  # resized 8-bit images are rounded
    assert torch.allclose(scores.parts["sigma"], sigma, atol=0.05 * float(sigma.std()))
    assert mean.std() > 0.01 and sigma.std() > 0.01


def test_hpsv3_conforms(config, monkeypatch):
    monkeypatch.setattr("longalign.rewards.hpsv3.reward.PIXELS", 4 * 28 * 28)  # fewer patches
    check_reward(config)


def test_gradient_equals_finite_differences(config, monkeypatch):
    monkeypatch.setattr("longalign.rewards.hpsv3.reward.PIXELS", 4 * 28 * 28)
    reward = rewards.build(config).double()
    images = smooth(1, 40, 60).double().requires_grad_()
    direction = torch.randn_like(images)
    (gradient,) = torch.autograd.grad(reward.score(images, PROMPTS[:1]).sum(), images)
    step = 1e-4 * direction
    with torch.no_grad():
        low, high = (reward.score(images + sign * step, PROMPTS[:1]) for sign in (-1, 1))
    assert (gradient != 0).float().mean() > 0.7
    assert torch.allclose((gradient * step).sum(), (high - low).sum() / 2, rtol=1e-2)


def test_special_tokens_in_a_prompt_are_text(config):
    reward = rewards.build(config)
    scores = reward.score(smooth(1, 56, 56), [f"a {REWARD_TOKEN} {reward.processor.image_token} red"])
    assert scores.isfinite().all() and reward.count_tokens(REWARD_TOKEN) > 1


def test_instruction_may_be_a_file_and_is_checked(config, tmp_path):
    file = tmp_path / "instruction.txt"
    file.write_text(TEXT)
    assert rewards.validate({**config, "instruction": str(file)}).template() == TEXT
    file.write_text(TEXT.replace(REWARD_TOKEN, ""))
    for wrong, message in ((str(file), r"instruction.*one <\|Reward\|>"), (str(tmp_path / "none"), "No such file")):
        with pytest.raises(ConfigError, match=message):
            check_parts({"reward": rewards.validate({**config, "instruction": wrong})})
    for wrong in (f"{REWARD_TOKEN} {{text_prompt}}", "{text_prompt}", 2 * TEXT):
        with pytest.raises(ConfigError, match=r"one \{text_prompt\} and after it one"):
            rewards.validate({**config, "instruction": wrong})
    with pytest.raises(ConfigError, match="instruction"):
        rewards.validate({"name": "hpsv3"})


@pytest.mark.parametrize("problem", ["missing", "unexpected", "of a different shape"])
def test_file_must_match(config, problem, tmp_path):
    file = tiny_hpsv3(tmp_path) / WEIGHTS
    state = weights_of(file)
    if problem == "missing":
        del state["visual.patch_embed.proj.weight"]
    elif problem == "unexpected":
        state["rm_head.6.weight"] = torch.zeros(1)
    else:
        state["model.norm.weight"] = torch.zeros(3)
    save_file(state, file)
    with pytest.raises(ValueError, match=f"1 weights of .* {problem}, e.g"):
        rewards.build({**config, "checkpoint": str(file)})


def test_weights_with_new_names_and_without_the_token(config, tmp_path):
    file = tiny_hpsv3(tmp_path) / WEIGHTS
    old = weights_of(file)
    new = {k.replace("model.", "model.language_model.", 1) if k.startswith("model.") else k: v for k, v in old.items()}
    new = {f"model.{key}" if key.startswith("visual.") else key: value for key, value in new.items()}
    save_file(new, file)
    images = smooth(1, 56, 56)
    scores = [
        rewards.build({**config, "checkpoint": path}).score(images, ["no"]) for path in (str(file), str(tmp_path))
    ]
    assert torch.equal(*scores) and torch.allclose(scores[0], rewards.build(config).score(images, ["no"]))
    rows = "model.language_model.embed_tokens.weight"
    save_file({**new, rows: new[rows][:-1].clone()}, file)
    with pytest.raises(ValueError, match="only 20 embeddings; set `base`"):
        rewards.build({**config, "checkpoint": str(file)})
    with pytest.raises(ValueError, match=f"has no {WEIGHTS}"):
        rewards.build({**config, "checkpoint": str(tmp_path / "none")})
