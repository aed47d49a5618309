"""No encoder loses a part of a prompt by default; invalid prompts are rejected before a model runs."""

import json
import re
import warnings
from io import StringIO

import pytest
import torch

from longalign.cli.main import main
from longalign.evaluation.scoring import score_sentences
from longalign.files.lines import read_prompts
from longalign.image_io import write_png
from longalign.registry import encoders, rewards, segmenters
from longalign.testing.tiny import tiny_clip, tiny_clip_text, tiny_hpsv2, tiny_sd3, tiny_sdxl, tiny_t5

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


def without_spaces(text):
    return "".join(text.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, build in {"sd": tiny_clip_text, "t5": tiny_t5, "xl": tiny_sdxl, "sd3": tiny_sd3}.items():
        build(root / name)
    tiny_clip_text(root / "long", "transformers", positions=248)
    tiny_clip(root / "clip")
    (root / "hpsv2").mkdir()
    tiny_hpsv2(root / "hpsv2")
    return root


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
def test_encoders_lose_no_text_by_default(folder, name, checkpoint, settings):
    encoder = encoders.build({"name": name, "checkpoint": str(folder / checkpoint), **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prompt in PROMPTS:
            conditioning = encoder.encode([prompt])
            for report in conditioning.reports[0].parts or conditioning.reports:
                assert report.truncated == "" and without_spaces("".join(report.segments)) == without_spaces(prompt)
            assert conditioning.states.isfinite().all() and conditioning.states.shape[1] >= sum(
                conditioning.reports[0].tokens
            )


@pytest.mark.parametrize("name", ["clip", "pickscore", "denscore", "hpsv2"])
def test_rewards_lose_no_text_by_default(folder, name):
    reward = rewards.build({"name": name, "checkpoint": str(folder / ("hpsv2" if name == "hpsv2" else "clip"))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reward.text_features(PROMPTS).isfinite().all()
    for prompt in PROMPTS:
        segments = reward.segments(prompt)
        assert without_spaces("".join(segments)) == without_spaces(prompt)
        assert max(map(reward.towers.count_tokens, segments)) <= reward.towers.window


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([None], "prompt 0 .*None"),
        (["A fox.", 3], "prompt 1 .*3"),
        ([b"A fox."], "prompt 0 .*b'A fox"),
        ([{"a": "fox"}], "prompt 0 .*'a'"),
        ([[None]], r"prompt 0 .*\[None\]"),
        (None, "prompts.* None"),
        (3, "prompts.* 3"),
        (b"A fox.", "prompts.* b'A fox"),
        (["A fox.", "\udcff red"], r"prompt 1 .*'\\udcff"),
    ],
)
@pytest.mark.parametrize("segmenter", ["sentence", "manual"])
def test_encoders_reject_invalid_prompts(folder, segmenter, prompts, message):
    encoder = encoders.build({"name": "clip-segment", "checkpoint": str(folder / "sd"), "segmenter": segmenter})
    for method in (encoder.encode, encoder.report):
        with pytest.raises(ValueError, match=message):
            method(prompts)


def test_read_prompts_rejects_lone_surrogate_with_line(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "A fox."}\n{"prompt": "\\ud800 fox"}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 2: 'prompt' "):
        read_prompts(path)
    path.write_text('{"prompt": "\\ud83d\\ude00 fox"}\n')
    assert read_prompts(path) == ["😀 fox"]


def returns_text(prompt, count):
    return prompt


def returns_empty(prompt, count):
    return []


def returns_numbers(prompt, count):
    return [1, 2]


@pytest.mark.parametrize(
    ("segmenter", "message"),
    [
        (returns_text, r"returns_text' .*\bstr\b.*'A fox"),
        (returns_empty, "returns_empty' .*no text.*'A fox"),
        (returns_numbers, r"returns_numbers' .*\blist of int\b.*'A fox"),
    ],
)
def test_segmenter_with_invalid_output_is_rejected(folder, segmenter, message):
    segmenters.register("custom", segmenter)
    try:
        encoder = encoders.build({"name": "clip-segment", "checkpoint": str(folder / "sd"), "segmenter": "custom"})
        reward = rewards.build({"name": "denscore", "checkpoint": str(folder / "clip"), "segmenter": "custom"})
    finally:
        segmenters.unregister("custom")
    for method in (encoder.encode, encoder.report, reward.text_features):
        with pytest.raises(ValueError, match=message):
            method(["A fox."])


def test_clip_tokenizes_special_tokens_as_text(folder):
    encoder = encoders.build({"name": "clip-segment", "checkpoint": str(folder / "sd")})
    ends = {encoder.tokens.tokenizer.bos_token_id, encoder.tokens.tokenizer.eos_token_id}
    text = "A fox.<|endoftext|> A wall <|startoftext|>."
    assert not ends & set(encoder.tokens(text).ids)
    assert without_spaces("".join(encoder.report([text])[0].segments)) == without_spaces(text)


@pytest.mark.parametrize("kind", ["encoder", "reward"])
def test_tokenizer_code_is_not_run_and_no_input_is_read(tmp_path, monkeypatch, kind):
    (tiny_clip_text if kind == "encoder" else tiny_clip)(tmp_path)
    tokenizer_folder = tmp_path / "tokenizer" if kind == "encoder" else tmp_path
    settings = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "EvilTok", "auto_map": {"AutoTokenizer": ["evil_tok.EvilTok", "evil_tok.EvilTok"]}}
    (tokenizer_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (tokenizer_folder / "evil_tok.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass EvilTok: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("input was called"))
    registry, name = (encoders, "clip-segment") if kind == "encoder" else (rewards, "clip")
    try:
        registry.build({"name": name, "checkpoint": str(tmp_path)})
    except ValueError as error:
        assert "tokenizer" in str(error)
    assert not (tmp_path / "ran").exists()


def test_score_command_scores_by_sentence(folder, tmp_path, capsys):
    images = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in images:
        write_png(path, torch.rand(3, 32, 32))
    options = ["--reward", f"{{name: denscore, checkpoint: {folder / 'clip'}}}", "--images", *map(str, images)]
    assert main(["score", *options, "--prompt", "A fox. A wall.", "--by-sentence"]) == 0
    head, *lines = capsys.readouterr().out.strip().splitlines()
    assert head.split("\t") == ["score", "reward", "image", "sentence"]
    assert [line.split("\t")[2:] for line in lines] == [[str(p), s] for p in images for s in ("A fox.", "A wall.")]
    assert main(["score", *options, "--prompt", "\udcff red"]) == 2
    assert re.search(r"--prompt 0 .*udcff", capsys.readouterr().err)
    with pytest.raises(ValueError, match=r"plain.*sentences"):
        score_sentences({"plain": lambda images, prompts: images.mean((1, 2, 3))}, images, ["A fox."], StringIO())
