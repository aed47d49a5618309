"""SigLIP 2, of fixed and of flexible resolution (NaFlex)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from longalign.registry import rewards
from longalign.testing import check_reward
from PIL import Image
from torch.nn import functional as F

from longalign_siglip.naflex import grid_size
from longalign_siglip.towers import NaflexTowers, SiglipTowers


@pytest.fixture(scope="module")
def flexible(naflex):
    return rewards.build({"name": "siglip", "checkpoint": naflex})


def test_model_type_selects_the_towers(flexible, fixed_siglip2):
    fixed = rewards.build({"name": "siglip", "checkpoint": fixed_siglip2})
    assert type(fixed.towers) is SiglipTowers and fixed.preprocessor.interpolation == "bilinear"
    assert type(flexible.towers) is NaflexTowers and flexible.preprocessor.max_num_patches == 12


def test_texts_are_lower_case_although_the_tokenizer_keeps_upper_case(flexible, fixed_siglip2):
    fixed = rewards.build({"name": "siglip", "checkpoint": fixed_siglip2})
    assert fixed.towers.tokenizer("FOX", add_special_tokens=False)["input_ids"] == [0]  # unknown
    for reward in (fixed, flexible):
        upper, lower = reward.text_features(["A red FOX", "a red fox"])
        assert torch.equal(upper, lower)


def test_texts_are_padded_on_the_right(flexible):
    ids = []
    flexible.towers.model.get_text_features, features = (
        lambda input_ids: ids.append(input_ids) or features(input_ids=input_ids),
        flexible.towers.model.get_text_features,
    )
    flexible.text_features(["a"])
    del flexible.towers.model.get_text_features
    (tokens,) = ids
    assert tokens.shape == (1, 64) and tokens[0, 0] != 1 and (tokens[0, 1:] == 1).all()


@pytest.mark.parametrize("shape", [(64, 48), (33, 90), (24, 24), (16, 200)])
def test_naflex_equals_the_published_processor_and_model(flexible, shape):
    from transformers import Siglip2ImageProcessor

    image = (F.interpolate(torch.rand(1, 3, 5, 5), shape, mode="bilinear") * 255).round() / 255
    processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=12)
    pil = Image.fromarray((image[0] * 255).byte().permute(1, 2, 0).numpy())
    inputs = processor(images=[pil], return_tensors="pt")
    pixels = flexible.preprocessor(image)
    assert [side // 8 for side in pixels.shape[2:]] == inputs["spatial_shapes"][0].tolist()
    with torch.no_grad():
        expected = flexible.towers.model.get_image_features(**inputs)
    features = expected if isinstance(expected, torch.Tensor) else expected.pooler_output
    assert torch.allclose(flexible.image_features(image), F.normalize(features, dim=-1), atol=1e-2)


def test_grid_has_as_many_patches_as_possible():
    assert grid_size(100, 100, 256) == (16, 16)
    assert grid_size(512, 1024, 256) == (11, 22)
    assert grid_size(1024, 512, 256) == (22, 11)
    assert grid_size(1, 1000, 256) == (1, 256)


def test_gradient_through_patches_reaches_images_and_check_reward_passes(flexible, naflex):
    images = torch.rand(2, 3, 40, 24, requires_grad=True)
    flexible.score(images, ["a red fox", "the sky"]).sum().backward()
    assert (images.grad != 0).float().mean() > 0.9
    assert all(p.grad is None for p in flexible.parameters())
    check_reward({"name": "siglip", "checkpoint": naflex})


def test_max_num_patches_only_for_naflex(naflex, checkpoint):
    reward = rewards.build({"name": "siglip", "checkpoint": naflex, "max_num_patches": 4, "aspect": "crop"})
    assert reward.preprocessor(torch.rand(1, 3, 50, 50)).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"max_num_patches.*fixed resolution"):
        rewards.build({"name": "siglip", "checkpoint": checkpoint, "max_num_patches": 4})


def test_other_model_types_are_rejected_before_weights_are_read(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config["vision_config"], "model_type": "siglip_vision_model"}))
    with pytest.raises(ValueError, match="'siglip_vision_model'; expected 'siglip' or 'siglip2'"):
        rewards.build({"name": "siglip", "checkpoint": str(folder)})
