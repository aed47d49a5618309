import json
import warnings
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image

from longalign.registry import ConfigError, rewards
from longalign.testing import check_reward
from longalign.testing.tiny import VLM_WORDS, tiny_qwen2_vl, tiny_vlm
from longalign.vlm.local import chat_text, next_token_logits, processor_inputs

PROMPTS = ["a red", "are there a a a red", "no"]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return {"name": "vqascore", "checkpoint": str(tiny_vlm(tmp_path_factory.mktemp("vlm"))), "answer": "yes"}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return {"name": "vqascore", "checkpoint": str(tiny_qwen2_vl(tmp_path_factory.mktemp("qwen")))}


@pytest.fixture(params=["llava", "qwen"])
def config(request):
    return request.getfixturevalue(request.param)


def smooth(n, height, width):
    """8-bit images without steps, so that resizing a tensor and resizing an 8-bit image agree."""
    images = torch.nn.functional.interpolate(torch.rand(n, 3, 6, 6), (height, width), mode="bilinear")
    return (images * 255).round() / 255


def pil(image):
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def test_score_is_the_probability_of_the_answer_with_the_processors_own_pixels(config):
    reward, answer = rewards.build(config), config.get("answer", "Yes")
    images = smooth(3, 70, 56)
    texts = [chat_text(reward.processor, reward.question.replace("{prompt}", prompt), 1) for prompt in PROMPTS]
    inputs = processor_inputs(reward.processor, texts, [[pil(image)] for image in images])
    with torch.no_grad():
        probabilities = next_token_logits(reward.model, inputs).softmax(-1)
        scores = reward.score(images, PROMPTS)
    token = reward.processor.tokenizer.convert_tokens_to_ids(answer)
    assert reward.answer_tokens == [token]
    assert torch.allclose(scores, probabilities[:, token], rtol=0.1)  # resized 8-bit images are rounded
    assert len(set(scores.tolist())) == 3


def test_gradient_equals_finite_differences(config):
    reward = rewards.build(config).double()
    images = smooth(1, 60, 60).double().requires_grad_()
    direction = torch.randn_like(images)
    (gradient,) = torch.autograd.grad(reward.score(images, PROMPTS[:1]).sum(), images)
    step = 1e-4 * direction
    with torch.no_grad():
        low, high = (reward.score(images + sign * step, PROMPTS[:1]) for sign in (-1, 1))
    assert gradient.abs().sum() > 0
    assert torch.allclose((gradient * step).sum(), (high - low).sum() / 2, rtol=1e-2)


def test_vqascore_conforms(llava):
    check_reward(llava)


def test_batch_of_qwen2_vl_equals_singles(qwen):
    reward = rewards.build(qwen)
    images = smooth(3, 60, 90)
    singles = [reward.score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)]
    assert torch.allclose(reward.score(images, PROMPTS), torch.cat(singles), rtol=1e-3)


def test_special_tokens_in_a_prompt_are_text(config):
    reward = rewards.build(config)
    token = reward.processor.image_token
    scores = reward.score(smooth(1, 56, 56), [f"a {token} red"])
    assert torch.isfinite(scores).all() and reward.count_tokens(token) > 1


def test_prompt_beyond_the_models_positions_warns_once(llava):
    reward = rewards.build(llava)
    image = smooth(1, 32, 32)
    reward._max_positions = 20
    with pytest.warns(UserWarning, match=r"\d+ tokens.*at most 20.*`segments`"):
        reward.score(image, ["a red " * 20])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward.score(image, ["a red " * 20])


PROCESSORS = {
    "clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor", "blip": "BlipImageProcessor",
    "gemma3": "Gemma3ImageProcessor", "qwen2_vl": "Qwen2VLImageProcessor", "pixtral": "PixtralImageProcessor",
}  # fmt: skip


@pytest.mark.parametrize("family", PROCESSORS)
def test_processors_of_tensors_equal_those_of_8_bit_images_and_have_gradient(family):
    module = import_module(f"transformers.models.{family}")
    # transformers 4 has the torchvision backend under a different name
    name = PROCESSORS[family]
    processor = getattr(module, f"{name}Fast", None) or getattr(module, name)
    processor = processor()
    image = smooth(1, 96, 128)[0].requires_grad_()
    pixels = processor(images=[[255 * image]], return_tensors="pt")["pixel_values"]
    expected = processor(images=[[pil(image.detach())]], return_tensors="pt")["pixel_values"]
    assert torch.allclose(pixels, expected, atol=0.05)
    (gradient,) = torch.autograd.grad((pixels * torch.randn(pixels.shape)).sum(), image)
    assert gradient.isfinite().all() and (gradient != 0).float().mean() > 0.7


def test_processor_without_gradient_is_rejected_before_weights_are_loaded(llava, monkeypatch):
    from longalign.rewards.vqascore import reward as module

    load = module.load_processor

    def without_gradient(*args):
        processor = load(*args)
        inner = processor.image_processor
        processor.image_processor = lambda images, **kwargs: inner(
            [np.asarray(pil(image.detach().float() / 255)) for (image,) in images], **kwargs
        )
        return processor

    monkeypatch.setattr(module, "load_processor", without_gradient)
    monkeypatch.setattr(module, "load_model", lambda *args: pytest.fail("the weights were loaded"))
    with pytest.raises(ValueError, match=r"LlavaProcessor.*cannot preprocess images with gradient.*torchvision"):
        rewards.build(llava)


def test_encoder_decoder_is_rejected_before_weights_are_loaded(tmp_path):
    file = tiny_vlm(tmp_path) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "is_encoder_decoder": True}))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"encoder-decoder \('llava'\)"):
        rewards.build({"name": "vqascore", "checkpoint": str(tmp_path)})


def test_rejects_wrong_answers_and_questions(llava, monkeypatch):
    monkeypatch.setattr("longalign.rewards.vqascore.reward.load_model", lambda *args: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="an answer of one token, got 'Maybe'"):
        rewards.build({**llava, "answer": "Maybe"})
    with pytest.raises(ConfigError, match=r"\{prompt\}"):
        rewards.validate({"name": "vqascore", "question": "Is it good?"})
    assert "Maybe" not in VLM_WORDS
