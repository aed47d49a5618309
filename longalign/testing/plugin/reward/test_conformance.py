from longalign.testing import check_reward


def test_my_part_conforms():
    check_reward({"name": "my-part"})


def test_score_is_highest_at_the_target():
    import torch

    from longalign.registry import rewards

    reward = rewards.build({"name": "my-part", "brightness": 0.5})
    low, best = reward.score(torch.stack([torch.full((3, 8, 8), v) for v in (0.2, 0.5)]), ["a", "b"]).tolist()
    assert low < best == 0
