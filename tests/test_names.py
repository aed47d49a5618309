"""Unique names."""

from longalign.names import unique_name


def test_unique_name_counts_from_two():
    assert unique_name("a", ()) == "a"
    assert unique_name("a", {"a"}) == "a-2"
    assert unique_name("a", {"a": 1, "a-2": 2, "b": 3}) == "a-3"
