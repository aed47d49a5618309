"""``longalign eval`` with the metric `vqa` and a judge, both with a server."""

import json

import pytest
import torch
from chat_server import chat_server, images_of, question_of, reply

from longalign.cli.main import main
from longalign.image_folder import append_images, image_row

PROMPTS = ["A fox.", "The sky."]
COLUMNS = "item_id,text,proposition_id,dependency,category_broad,question_natural_language"
ROWS = ["a,A fox.,1,0,entity,a fox?", "a,A fox.,2,1,attribute,a red fox?", "b,The sky.,1,0,entity,a sky?"]


@pytest.fixture
def models(tmp_path):
    """``NAME=FOLDER`` of a dark and a bright model."""
    values = {"dark": 0.1, "bright": 0.9}
    for name, value in values.items():
        (tmp_path / name).mkdir()
        rows = [image_row(i, prompt, 0) for i, prompt in enumerate(PROMPTS)]
        append_images(tmp_path / name, rows, torch.full((2, 3, 8, 8), value), {})
    (tmp_path / "questions.csv").write_text("\n".join([COLUMNS, *ROWS]))
    return [f"{name}={tmp_path / name}" for name in values]


def respond(number, body):
    """Answers that bright images show everything, dark ones only entities; prefers the brighter image."""
    bright = [image.mean() > 100 for image in images_of(body)]
    if len(bright) == 2:
        return reply("1" if bright[0] else "2")
    return reply("yes" if bright[0] or "red" not in question_of(body) else "no")


def config(url, cache, **keys):
    return json.dumps({**keys, "vlm": {"base_url": url, "model": "m", "attempts": 1}, "cache": str(cache)})


def test_eval_reports_vqa_categories_and_win_rates(models, tmp_path, capsys):
    arguments = ["eval", "--images", *models, "--json", str(tmp_path / "table.json")]
    with chat_server(respond) as server:
        vqa = config(server.url, tmp_path / "cache", name="vqa", questions=str(tmp_path / "questions.csv"))
        arguments += ["--metric", vqa, "--judge", config(server.url, tmp_path / "cache")]
        assert main(arguments) == 0
        sent = len(server.requests)
        assert main(arguments) == 0 and len(server.requests) == sent == 6 + 4
    means = json.loads((tmp_path / "table.json").read_text())["means"]
    names = ("vqa", "vqa/category/attribute", "vqa/category/entity", "win_rate")
    assert [means["dark"][name]["mean"] for name in names] == [0.75, 0, 1, 0.5]
    assert [means["bright"][name]["mean"] for name in names] == [1, 1, 1, 1]
    shown = capsys.readouterr().out
    assert "vqa, %" in shown and "category" in shown and "attribute" in shown and "win-rate, %" in shown


def test_eval_with_endpoint_that_fails_exits_with_a_message(models, tmp_path, capsys):
    with chat_server(lambda number, body: (503, b"loading", {})) as server:
        assert main(["eval", "--images", *models, "--judge", config(server.url, tmp_path / "cache")]) == 2
    message = capsys.readouterr().err
    assert server.url in message and "503" in message and "loading" in message


@pytest.mark.parametrize(
    ("judge", "count", "words"),
    [
        ("{vlm: {base_url: 'http://localhost/v1'}}", 2, "vlm.model"),
        ("{vlm: {checkpoint: /no/such/folder}}", 2, "vlm.checkpoint"),
        ("judge", 2, "'judge'"),
        ("{vlm: {base_url: 'http://localhost/v1', model: m}}", 1, "'dark'"),
    ],
)
def test_eval_rejects_invalid_judges(models, judge, count, words, capsys):
    assert main(["eval", "--images", *models[:count], "--judge", judge]) == 2
    assert words in capsys.readouterr().err
