"""Requests, replies, and stored answers."""

import json

import pytest
import torch

from longalign.vlm.base import VLM, HashedImage, Request, option_in
from longalign.vlm.store import StoredAnswers


class Scripted(VLM):
    """Answers with the last word of the text, or raises for ``fail``."""

    def __init__(self, identity="scripted"):
        super().__init__()
        self.identity, self.asked = identity, []

    def answers(self, requests):
        for i, request in reversed(list(enumerate(requests))):
            self.asked.append(request.text)
            if request.text == "fail":
                raise RuntimeError("down")
            yield i, option_in(request.text.split()[-1], request.options)


def request(text, value=0.5):
    return Request(text, (HashedImage.of(torch.full((3, 2, 2), value)),), ("yes", "no"))


@pytest.mark.parametrize(
    ("reply", "option"),
    [
        ("yes", "yes"),
        ("No.", "no"),
        ("**Yes**, there is no doubt", "yes"),
        ("Is it? No!\nI now think: yes\n\n", "yes"),
        ("I know nothing", None),
        ("", None),
        (" \n ", None),
    ],
)
def test_option_in_reply(reply, option):
    assert option_in(reply, ("yes", "no")) == option


def test_option_in_reply_of_a_judge():
    assert [option_in(text, ("1", "2", "tie")) for text in ("Image 2", "TIE", "12")] == ["2", "tie", None]


def test_answers_have_the_order_of_requests_and_equal_requests_are_sent_once():
    vlm = Scripted()
    assert StoredAnswers(vlm, None).ask([request("a yes"), request("b no"), request("a yes")]) == ["yes", "no", "yes"]
    assert sorted(vlm.asked) == ["a yes", "b no"]


def test_stored_answers_are_not_requested_again(tmp_path):
    StoredAnswers(Scripted(), tmp_path / "new").ask([request("a yes")])
    vlm = Scripted()
    assert StoredAnswers(vlm, tmp_path / "new").ask([request("a yes"), request("b no")]) == ["yes", "no"]
    assert vlm.asked == ["b no"]


def test_key_depends_on_image_text_options_and_model():
    store, base = StoredAnswers(Scripted(), None), request("a yes")
    others = [
        request("a  yes"),
        request("a yes", 0.6),
        Request("a yes", base.images, ("no", "yes")),
        Request("a yes", base.images * 2, ("yes", "no")),
        Request("a yes", (HashedImage.of(torch.full((3, 4, 1), 0.5)),), ("yes", "no")),  # as many equal pixels
    ]
    keys = {store.key(other) for other in (base, *others)} | {StoredAnswers(Scripted("other"), None).key(base)}
    assert len(keys) == 7 and store.key(base) == store.key(request("a yes"))


def test_answers_before_an_error_are_stored(tmp_path):
    with pytest.raises(RuntimeError, match="down"):
        StoredAnswers(Scripted(), tmp_path).ask([request("fail"), request("b no")])
    vlm = Scripted()
    assert StoredAnswers(vlm, tmp_path).ask([request("b no")]) == ["no"] and not vlm.asked


def test_reply_without_answer_is_repeated_by_the_next_run(tmp_path):
    store = StoredAnswers(Scripted(), tmp_path)
    assert store.ask([request("perhaps"), request("a yes"), request("perhaps")]) == [None, "yes", None]
    assert StoredAnswers(vlm := Scripted(), tmp_path).ask([request("perhaps")]) == [None] and vlm.asked


def test_unfinished_line_of_a_killed_process_is_skipped(tmp_path):
    path = tmp_path / "answers.jsonl"
    store = StoredAnswers(Scripted(), tmp_path)
    store.ask([request("a yes")])
    path.write_bytes(path.read_bytes() + b'{"key": "12')
    store.ask([request("b no")])
    vlm = Scripted()
    assert StoredAnswers(vlm, tmp_path).ask([request("a yes"), request("b no")]) == ["yes", "no"] and not vlm.asked


def test_foreign_line_is_reported_with_its_number(tmp_path):
    (tmp_path / "answers.jsonl").write_text(json.dumps({"key": "k", "answer": "yes"}) + '\n{"a": 1}\n')
    with pytest.raises(ValueError, match=r"answers\.jsonl, line 2.*'key'"):
        StoredAnswers(Scripted(), tmp_path)


def test_nothing_but_hashes_and_answers_is_stored(tmp_path):
    StoredAnswers(Scripted(), tmp_path).ask([request("secret yes")])
    [row] = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert row.keys() == {"key", "answer"} and row["answer"] == "yes" and len(row["key"]) == 64
