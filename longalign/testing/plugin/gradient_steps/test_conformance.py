from longalign.testing import check_gradient_steps


def test_my_part_conforms():
    check_gradient_steps({"name": "my-part", "k": 3})


def test_steps_are_successive():
    from my_plugin.part import MyPart

    assert MyPart(2, randint=lambda low, high: high).select(10).steps == (8, 9)
