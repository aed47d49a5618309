import torch

from longalign.registry import edits, rewards
from longalign.testing import check_edit
from longalign.testing.tiny import tiny_clip


def test_my_part_conforms(tmp_path):
    check_edit({"name": "my-part"}, inner={"name": "clip", "checkpoint": str(tiny_clip(tmp_path))})


def test_weight_0_changes_nothing(tmp_path):
    reward = rewards.build({"name": "clip", "checkpoint": str(tiny_clip(tmp_path))})
    text = reward.text_features(["A red fox."])
    edit = edits.build({"name": "my-part", "weight": 0.0})
    assert torch.equal(edit(text, ["A red fox."], reward, None).text, text)
