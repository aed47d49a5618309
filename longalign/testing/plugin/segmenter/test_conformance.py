from longalign.testing import check_segmenter


def test_my_part_conforms():
    check_segmenter({"name": "my-part", "words": 5})


def test_segments_have_the_given_number_of_words():
    from longalign.registry import segmenters

    assert segmenters.build({"name": "my-part", "words": 2})("a b c", len) == ["a b ", "c"]
