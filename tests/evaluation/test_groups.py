"""Groups of prompts: by CLIP tokens, by the labels of a prompt set; the record of prompts and seeds."""

from importlib import metadata

import pytest

from longalign.data.prompts.formats import Prompt
from longalign.data.prompts.sets import PromptSet, prompts_hash
from longalign.encoders.counting import count_clip_tokens
from longalign.evaluation.groups import all_labels, labels, token_labels
from longalign.evaluation.provenance import provenance
from longalign.names import natural_key


def test_count_clip_tokens_includes_start_and_end():
    assert count_clip_tokens("") == 2
    assert count_clip_tokens("a photo of a cat") == count_clip_tokens("  A photo\nof a  Cat ") == 7


def test_token_labels_at_the_edges():
    lengths = [1, 77, 78, 154, 155, 300, 301, 500, 501]
    found = token_labels([str(n) for n in lengths], count=int)
    assert found == ["1-77"] * 2 + ["78-154"] * 2 + ["155-300"] * 2 + ["301-500"] * 2 + ["over 500"]
    assert sorted(set(found), key=natural_key) == list(dict.fromkeys(found))
    assert token_labels(["cat " * 75, "cat " * 76]) == ["1-77", "78-154"]


def test_labels_of_images_by_text():
    prompts = PromptSet(
        "plain",
        (
            Prompt("0", "a", {"topic": ("x", "y")}),
            Prompt("1", "b", {"topic": ("y",), "size": ("small",)}),
            Prompt("2", "a", {"topic": ("y", "z")}),
        ),
    )
    assert labels(prompts, "topic", ["b", "b", " a\n"]) == [("y",), ("y",), ("x", "y", "z")]
    assert labels(prompts, "size", ["a", "b"]) == [(), ("small",)]
    with pytest.raises(ValueError, match=r"'topics'.*topic, size"):
        labels(prompts, "topics", ["a"])
    with pytest.raises(ValueError, match=r"1 of 2 prompts are not among the 3 of plain, e\.g\. 'c'"):
        labels(prompts, "topic", ["a", "c", "a"])
    assert all_labels(prompts, ["b"]) == {"topic": [("y",)], "size": [("small",)]}


def test_provenance_has_hash_seeds_and_versions():
    found = provenance(["a", "b"], (3, 4))
    assert found["prompts"] == {"count": 2, "sha256": prompts_hash(["a", "b"])}
    assert found["seeds"] == [3, 4]
    assert found["versions"]["torch"] == metadata.version("torch") and "longalign" in found["versions"]
