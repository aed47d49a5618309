"""The metric `vqa`: questions of csv files, scores of answers, and both kinds of models."""

import csv
import logging
import math

import numpy as np
import pytest
import torch
from chat_server import chat_server, images_of, question_of, reply
from pydantic import ValidationError

from longalign.metrics.vqa.questions import Question, read_questions, vqa_score
from longalign.registry import metrics
from longalign.runtime import Runtime
from longalign.testing import check_metric
from longalign.testing.tiny import tiny_vlm

COLUMNS = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)
FOX = [(1, "0", "entity", "a fox?"), (2, "1", "attribute", "a red fox?"), (3, "1,2", "relation", "a red fox on top?")]
SKY = [(1, "0", "entity", "a sky?"), (2, "0", "attribute", "a blue sky?")]


@pytest.fixture
def write(tmp_path):
    """Function that writes a csv file of ``(item, prompt, questions)``."""

    def to_file(*items):
        path = tmp_path / "questions.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS.split(","))
            for item, prompt, questions in items:
                for number, dependency, category, text in questions:
                    writer.writerow([item, prompt, "", number, dependency, category, "-", "", text])
        return path

    return to_file


def build(path, url, **settings):
    vlm = {"base_url": url, "model": "m", "attempts": 1}
    config = {"name": "vqa", "questions": str(path), "vlm": vlm, "cache": None, **settings}
    return metrics.build(config, Runtime())


def measured(metric, images, prompts):
    """Values per image and statistics."""
    observed = {k: np.asarray(v) for k, v in metric.observe(images, prompts).items()}
    values = metric.finish(observed, prompts, [])
    return {**values, **{name: function(observed) for name, function in metric.statistics().items()}}


def by_brightness(number, body):
    """Answers yes if the image is at least as bright as the number of the question's words, in tenths."""
    words = len(question_of(body).split("?")[0].split())
    return reply("Yes." if images_of(body)[0].mean() / 255 >= words / 10 - 0.01 else "No.")


def yes(*numbers, of=3):
    return {number: number in numbers for number in range(1, of + 1)}


def questions(*parents):
    return [Question(i, f"question {i}", "entity", of) for i, of in enumerate(parents, 1)]


def test_vqa_score_counts_children_of_a_failed_parent_as_no():
    chain = questions((), (1,), (1, 2))
    assert vqa_score(chain, yes(1, 2, 3)) == 1 and vqa_score(chain, yes(1, 2)) == pytest.approx(2 / 3)
    assert vqa_score(chain, yes(1, 3)) == pytest.approx(1 / 3) and vqa_score(chain, yes(2, 3)) == 0


def test_vqa_score_does_not_depend_on_the_order_of_questions():
    backwards = questions((2,), (3,), ())  # 3 is the parent of 2, and 2 that of 1
    assert vqa_score(backwards, yes(1, 2)) == 0
    assert vqa_score(backwards, yes(1, 2), official=True) == pytest.approx(1 / 3)  # a single pass


def test_vqa_score_with_itself_a_cycle_or_a_missing_parent():
    assert vqa_score(questions((1,), ()), yes(1, of=2)) == 0.5
    assert vqa_score(questions((2,), (1,)), yes(1, of=2)) == 0
    assert vqa_score(questions((), (9,)), yes(1, 2, of=2)) == 1
    assert math.isnan(vqa_score(questions((), (9,)), yes(1, 2, of=2), official=True))
    assert vqa_score(questions((), (1, 9)), yes(of=2), official=True) == 0  # the failed parent is met first


def test_read_questions(write):
    path = write(("a", "A  fox.", FOX), ("b", "The sky.", SKY))
    assert read_questions(path) == {
        "A fox.": (
            Question(1, "a fox?", "entity"),
            Question(2, "a red fox?", "attribute", (1,)),
            Question(3, "a red fox on top?", "relation", (1, 2)),
        ),
        "The sky.": (Question(1, "a sky?", "entity"), Question(2, "a blue sky?", "attribute")),
    }


def test_official_questions_lack_the_first_of_the_file(write):
    path = write(("a", "A fox.", FOX), ("b", "The sky.", SKY))
    assert [len(q) for q in read_questions(path, official=True).values()] == [2, 2]


def test_read_questions_uses_the_first_of_two_items_with_one_prompt(write):
    assert len(read_questions(write(("a", "A fox.", FOX), ("b", "A fox.", SKY)))["A fox."]) == 3


def test_read_questions_warns_once_of_unknown_parents(write, caplog):
    path = write(("a", "A fox.", [(2, "1", "entity", "a fox?"), (3, "2, top", "relation", "a fox on top?")]))
    with caplog.at_level(logging.WARNING):
        assert [q.parents for q in read_questions(path)["A fox."]] == [(1,), (2,)]
    [record] = caplog.records
    assert "questions.csv: 1 " in record.getMessage()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (("first", "0", "entity", "a fox?"), "line 2.*proposition_id.*'first'"),
        ((1, "0", "", "a fox?"), "line 2.*'category_broad'"),
        ((1, "", "entity", "a fox?"), "line 2.*'dependency'"),
    ],
)
def test_read_questions_reports_the_line(write, row, words):
    with pytest.raises(ValueError, match=words):
        read_questions(write(("a", "A fox.", [row])))


def test_read_questions_reports_missing_columns_and_repeated_numbers(write, tmp_path):
    with pytest.raises(ValueError, match=r"line 3: item a .* 1"):
        read_questions(write(("a", "A fox.", [FOX[0], FOX[0]])))
    (tmp_path / "other.csv").write_text("prompt,question\nA fox.,a fox?\n")
    with pytest.raises(ValueError, match=r"line 2.*'item_id'.*got prompt, question"):
        read_questions(tmp_path / "other.csv")
    (tmp_path / "other.csv").write_text(COLUMNS)
    with pytest.raises(ValueError, match="no questions"):
        read_questions(tmp_path / "other.csv")


def test_vqa_values_and_categories(write):
    path = write(("a", "A fox.", FOX), ("b", "The sky.", SKY))
    images = torch.tensor([0.3, 0.2, 1.0])[:, None, None, None].expand(3, 3, 8, 8)
    with chat_server(by_brightness) as server:
        values = measured(build(path, server.url), images, ["A fox.", "The sky.", "A\nfox."])
    assert values.pop("vqa").tolist() == pytest.approx([2 / 3, 1 / 2, 1])
    # of three entity questions all are answered with yes, of three attributes two, of two relations one
    assert values == pytest.approx(
        {"vqa/category/attribute": 2 / 3, "vqa/category/entity": 1, "vqa/category/relation": 1 / 2}
    )


def test_corrected_and_official_scores_of_a_grid(write):
    """Samples answer the two remaining questions with 0, 1, 2 and 2 times yes; brightness 0.1, 0.2, 0.3 and 0.3."""
    path = write(("x", "First.", [(1, "0", "entity", "a thing?")]), ("b", "The sky.", SKY))
    bright = torch.tensor([[0.1, 0.2], [0.3, 0.3]]).repeat_interleave(4, 0).repeat_interleave(4, 1)
    with chat_server(by_brightness) as server:
        results = {
            scoring: measured(build(path, server.url, scoring=scoring, grid=2), bright.expand(1, 3, 8, 8), ["The sky."])
            for scoring in ("corrected", "official")
        }
    assert [float(r["vqa"][0]) for r in results.values()] == [0.625, 0.625]
    assert [r["vqa/category/entity"] for r in results.values()] == [0.75, 1]
    assert [r["vqa/category/attribute"] for r in results.values()] == [0.5, 1]


def test_official_has_no_value_where_the_script_fails(write):
    """Without question 1, question 2 has an unknown parent."""
    path = write(("a", "A fox.", FOX), ("b", "The sky.", SKY))
    with chat_server(lambda number, body: reply("yes")) as server:
        metric = build(path, server.url, scoring="official")
        values = measured(metric, torch.ones(2, 3, 8, 8), ["A fox.", "The sky."])
    assert np.isnan(values["vqa"]).tolist() == [True, False] and values["vqa/category/entity"] == 1
    assert math.isnan(values["vqa/category/relation"])


def test_prompt_text_replaces_the_question(write):
    with chat_server(lambda number, body: reply("no")) as server:
        build(write(("b", "S", SKY)), server.url, prompt="{Q} {question}!").observe(torch.ones(1, 3, 8, 8), ["S"])
    assert sorted(question_of(body) for *_, body in server.requests) == ["{Q} a blue sky?!", "{Q} a sky?!"]


def test_unreadable_replies_count_as_no_with_a_warning(write, caplog):
    with chat_server(lambda number, body: reply("I cannot help with that")) as server, caplog.at_level(logging.WARNING):
        values = measured(build(write(("b", "S", SKY)), server.url), torch.ones(1, 3, 8, 8), ["S"])
    assert values["vqa"].tolist() == [0] and "2 of 2 " in caplog.text


def test_prompt_without_questions_and_image_without_grid(write):
    metric = build(write(("b", "The sky.", SKY)), "http://127.0.0.1:9/v1", grid=2)
    with pytest.raises(ValueError, match="'A boat'"):
        metric.observe(torch.ones(1, 3, 8, 8), ["A boat"])
    with pytest.raises(ValueError, match=r"grid=2, got 9 by 8 "):
        metric.observe(torch.ones(1, 3, 8, 9), ["The sky."])


def test_vqa_config_checks(write, tmp_path):
    with pytest.raises(ValidationError, match=r"\{question\}"):
        metrics.get("vqa")(questions="q.csv", vlm={"checkpoint": "a/b"}, prompt="yes or no?")
    config = metrics.get("vqa")(questions="/no/q.csv", vlm={"checkpoint": "/no/vlm"})
    assert [key for key, _ in config.check_files()] == ["questions", "vlm.checkpoint"]


def test_local_vqa_conforms(write, tmp_path):
    vlm = {"checkpoint": str(tiny_vlm(tmp_path / "vlm")), "batch_size": 3}
    path = write(("a", "is there a red", FOX), ("b", "a", SKY))
    config = {"name": "vqa", "questions": str(path), "vlm": vlm, "cache": str(tmp_path / "cache")}
    check_metric(config, prompts=["is there a red", "a"], size=32)
    assert (tmp_path / "cache" / "answers.jsonl").exists()
