from longalign.testing import check_encoder


def test_my_part_conforms():
    check_encoder({"name": "my-part", "width": 16})


def test_there_is_one_state_per_word():
    from longalign.registry import encoders

    encoder = encoders.build({"name": "my-part", "width": 16, "min_states": 1})
    assert encoder.encode(["a red fox"]).states.shape == (1, 3, 16)
