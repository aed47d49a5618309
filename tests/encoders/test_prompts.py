"""Prompts that no encoder may lose a part of, and what is rejected before any model reads it."""

import json
import warnings
from io import StringIO

import pytest
import torch
from tiny import tiny_clip, tiny_clip_text, tiny_hpsv2, tiny_sd3, tiny_sdxl, tiny_t5

from longalign.cli import main
from longalign.data.lines import read_prompts
from longalign.evaluate import score_sentences
from longalign.image_io import write_png
from longalign.registry import encoders, rewards, segmenters

SCENES = (
    "A wide valley opens between two ridges of dark basalt, and a river, silver in the first light, winds through "
    "terraces of rice. On the left bank three women in straw hats bend over the seedlings; the nearest, in a faded "
    "indigo jacket, carries a basket of woven cane. Behind them a water buffalo with mud up to its knees waits beside "
    "a wooden sledge. Mist lies in the furrows. A stone bridge of a single arch leads to a village of about 20 houses, "
    "whose slate roofs shine after the rain. ",
    'In the workshop, "Closed on Mondays." is painted over the door in red letters (they are slightly crooked). A '
    "lamp with a green shade throws a cone of light onto a bench, where a clock of 3.5 kg lies open: brass wheels, a "
    "coiled spring, two screws on a saucer. Mr. Abel, in his sixties, holds a loupe to his right eye. To his left hang "
    "chisels, e.g. a skew and a gouge, ordered by size. ",
)
PROMPTS = ["A fox.", SCENES[0], SCENES[1], "".join(SCENES), "".join(SCENES) * 3, "".join(SCENES) * 8, "红的墙。" * 90]


def tight(text):
    return "".join(text.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    for name, build in {"sd": tiny_clip_text, "t5": tiny_t5, "xl": tiny_sdxl, "sd3": tiny_sd3}.items():
        build(place / name)
    tiny_clip_text(place / "long", "transformers", positions=248)
    tiny_clip(place / "clip")
    (place / "hpsv2").mkdir()
    tiny_hpsv2(place / "hpsv2")
    return place


@pytest.mark.parametrize(
    ("name", "checkpoint", "settings"),
    [
        ("clip-segment", "sd", {}),
        ("clip-segment", "sd", {"pad": "none", "segmenter": "packed"}),
        ("clip-segment", "sd", {"segmenter": "tokens"}),
        ("clip-segment-sdxl", "xl", {}),
        ("clip-segment-sd3", "sd3", {"width": 32}),
        ("t5", "t5", {}),
        ("t5", "t5", {"mask": True}),
        ("longclip", "long", {}),
    ],
)
def test_no_text_is_lost_by_default(folder, name, checkpoint, settings):
    encoder = encoders.build({"name": name, "checkpoint": str(folder / checkpoint), **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prompt in PROMPTS:
            conditioning = encoder.encode([prompt])
            for report in conditioning.reports[0].parts or conditioning.reports:
                assert report.truncated == "" and tight("".join(report.segments)) == tight(prompt)
            assert conditioning.states.isfinite().all() and conditioning.states.shape[1] >= sum(
                conditioning.reports[0].tokens
            )


@pytest.mark.parametrize("name", ["clip", "pickscore", "denscore", "hpsv2"])
def test_no_text_is_lost_when_scored_by_default(folder, name):
    reward = rewards.build({"name": name, "checkpoint": str(folder / ("hpsv2" if name == "hpsv2" else "clip"))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reward.text_features(PROMPTS).isfinite().all()
    for prompt in PROMPTS:
        segments = reward.segments(prompt)
        assert tight("".join(segments)) == tight(prompt)
        assert max(map(reward.towers.count_tokens, segments)) <= reward.towers.window


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([None], "prompt 0 must be"),
        (["A fox.", 3], "prompt 1 must be"),
        ([b"A fox."], "prompt 0 must be"),
        ([{"a": "fox"}], "prompt 0 must be"),
        ([[None]], "prompt 0 must be"),
        (None, "a sequence of prompts"),
        (3, "a sequence of prompts"),
        (b"A fox.", "a sequence of prompts"),
        (["A fox.", "\udcff red"], r"prompt 1 is not valid text.*'\\udcff"),
    ],
)
@pytest.mark.parametrize("segmenter", ["sentence", "manual"])
def test_what_is_no_text_is_named(folder, segmenter, prompts, message):
    encoder = encoders.build({"name": "clip-segment", "checkpoint": str(folder / "sd"), "segmenter": segmenter})
    for act in (encoder.encode, encoder.report):
        with pytest.raises(ValueError, match=message):
            act(prompts)


def test_half_a_surrogate_pair_in_a_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "A fox."}\n{"prompt": "\\ud800 fox"}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 2: 'prompt' is not valid text"):
        read_prompts(path)
    path.write_text('{"prompt": "\\ud83d\\ude00 fox"}\n')
    assert read_prompts(path) == ["😀 fox"]


def letters(prompt, count):
    return prompt


def nothing(prompt, count):
    return []


def numbers(prompt, count):
    return [1, 2]


@pytest.mark.parametrize(
    ("segmenter", "message"),
    [
        (letters, "letters' must return a list of texts, got a str"),
        (nothing, "nothing' returned no text for the prompt 'A fox"),
        (numbers, "numbers' must return a list of texts, got a list of int"),
    ],
)
def test_a_segmenter_that_returns_something_else_is_named(folder, segmenter, message):
    segmenters.register("own", segmenter)
    try:
        encoder = encoders.build({"name": "clip-segment", "checkpoint": str(folder / "sd"), "segmenter": "own"})
        reward = rewards.build({"name": "denscore", "checkpoint": str(folder / "clip"), "segmenter": "own"})
    finally:
        segmenters.unregister("own")
    for act in (encoder.encode, encoder.report, reward.text_features):
        with pytest.raises(ValueError, match=message):
            act(["A fox."])


def test_special_tokens_in_a_prompt_are_text(folder):
    encoder = encoders.build({"name": "clip-segment", "checkpoint": str(folder / "sd")})
    ends = {encoder.tokens.tokenizer.bos_token_id, encoder.tokens.tokenizer.eos_token_id}
    text = "A fox.<|endoftext|> A wall <|startoftext|>."
    assert not ends & set(encoder.tokens(text).ids)
    assert tight("".join(encoder.report([text])[0].segments)) == tight(text)


@pytest.mark.parametrize("kind", ["encoder", "reward"])
def test_code_beside_a_tokenizer_does_not_run_and_nothing_is_asked(tmp_path, monkeypatch, kind):
    (tiny_clip_text if kind == "encoder" else tiny_clip)(tmp_path)
    place = tmp_path / "tokenizer" if kind == "encoder" else tmp_path
    settings = json.loads((place / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "EvilTok", "auto_map": {"AutoTokenizer": ["evil_tok.EvilTok", "evil_tok.EvilTok"]}}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    (place / "evil_tok.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass EvilTok: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    registry, name = (encoders, "clip-segment") if kind == "encoder" else (rewards, "clip")
    try:
        registry.build({"name": name, "checkpoint": str(tmp_path)})
    except ValueError as error:
        assert "tokenizer" in str(error)
    assert not (tmp_path / "ran").exists()


def test_sentences_are_scored_from_the_command_line(folder, tmp_path, capsys):
    images = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in images:
        write_png(path, torch.rand(3, 32, 32))
    given = ["--reward", f"{{name: denscore, checkpoint: {folder / 'clip'}}}", "--images", *map(str, images)]
    assert main(["score", *given, "--prompt", "A fox. A wall.", "--by-sentence"]) == 0
    head, *lines = capsys.readouterr().out.strip().splitlines()
    assert head.split("\t") == ["score", "reward", "image", "sentence"]
    assert [line.split("\t")[2:] for line in lines] == [[str(p), s] for p in images for s in ("A fox.", "A wall.")]
    assert main(["score", *given, "--prompt", "\udcff red"]) == 2
    assert "--prompt 0 is not valid text" in capsys.readouterr().err
    with pytest.raises(ValueError, match="plain cannot score sentences"):
        score_sentences({"plain": lambda images, prompts: images.mean((1, 2, 3))}, images, ["A fox."], StringIO())
