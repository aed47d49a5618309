from longalign.testing import check_data


def test_my_part_conforms():
    check_data({"name": "my-part", "size": 4, "resolution": 16})


def test_prompt_describes_the_image():
    from longalign.registry import data

    item = data.build({"name": "my-part", "size": 3})[0]
    assert "red" in item["prompt"] and item["image"][0].min() == 1
