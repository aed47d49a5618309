"""Unusual prompts for all encoders, rewards and segmenters: no errors, no lost text, finite outputs."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longalign.registry import encoders, rewards, segmenters
from longalign.segmenters import sentences, split_to_window

pytestmark = pytest.mark.reliability

ODD = [
    "", "a", " ", "\n\t ", "\u00a0", "?!", "...", ". . . .", '"', "((((", "\x00", "a\x00b", "\x1b[31mred", "\x85\x9f",
    "A\r\nB\rC", "a\u2028b\u2029c", "שלום. עולם.", "\u202eabc\u202c", "مرحبا", "红的墙。蓝的天！",
    "赤い狐がいる。", "빨간 여우.",
    "😀" * 30, "👨‍👩‍👧‍👦 👩🏽‍🚀", "\ufeffA fox.", "\ue000\uf8ff", "\U000e0041\U000e007f",
    "e\u0301" * 40, "a" + "\u0301" * 1000,
    "ﬁ ½ Ⅷ ℃", "A fox.<|endoftext|> A wall.", "<|startoftext|>", "</s> <pad> <unk>", "<extra_id_0>", "<end_of_text>x",
    "[CLS] [MASK]", "{prompt}", "%s %d", "<b>fox</b> &lt;a&gt; &amp;amp;", "A fox:1.3 (wall) [sky]", "BREAK",
    "a" * 3000, "fox " * 2000, "好" * 1500, "A fox. " * 800, "U.S. " * 400, "1." * 500,
]  # fmt: skip
ENCODERS = [
    {"name": "clip-segment", "checkpoint": "mini/sd"},
    {"name": "clip-segment", "checkpoint": "mini/sd", "pad": "none"},
    {"name": "clip-segment", "checkpoint": "mini/sd", "segmenter": "packed"},
    {"name": "clip-segment", "checkpoint": "mini/sd", "segmenter": "tokens"},
    {"name": "clip-segment", "checkpoint": "mini/sd", "segmenter": "manual"},
    {"name": "longclip", "checkpoint": "mini/longclip"},
    {"name": "t5", "checkpoint": "mini/t5"},
    {"name": "t5", "checkpoint": "mini/t5", "mask": True},
]
REWARDS = [
    {"name": "clip", "checkpoint": "mini/clip"},
    {"name": "pickscore", "checkpoint": "mini/clip", "text": "segments"},
    {"name": "denscore", "checkpoint": "mini/clip"},
]


def without_spaces(text):
    return "".join(text.split())


@pytest.mark.parametrize("config", ENCODERS, ids=lambda config: "-".join(map(str, config.values())).replace("/", ""))
def test_encode_odd_prompts_without_truncation(config):
    encoder = encoders.build(config)
    for prompt in ODD:
        if config.get("segmenter") == "manual" and prompt == "BREAK":
            with pytest.raises(ValueError, match="no text"):
                encoder.encode([prompt])
            continue
        conditioning = encoder.encode([prompt, "A fox."])
        assert conditioning.states.isfinite().all() and conditioning.reports[0].truncated == ""
        tokens = encoder.tokens(prompt)
        if tokens.ids and config["name"] != "t5":  # T5 maps any sequence of unknown characters to one token
            encoded = "".join(conditioning.reports[0].segments)
            assert without_spaces(encoded) == without_spaces(prompt) or not any(
                encoder.tokens(c).ids for c in set(without_spaces(prompt)) - set(encoded)
            )


@pytest.mark.parametrize("config", REWARDS, ids=lambda config: config["name"])
def test_score_odd_prompts_without_truncation(config):
    reward = rewards.build(config)
    image = torch.rand(1, 3, 64, 64)
    for prompt in ODD:
        assert reward.score(image, [prompt]).isfinite().all()
        segments = reward.segments(prompt)
        assert without_spaces("".join(segments)) == without_spaces(prompt)
        assert max(map(reward.towers.count_tokens, segments)) <= reward.towers.window


@pytest.mark.parametrize("name", ["sentence", "packed", "tokens", "manual"])
@settings(derandomize=True, deadline=None, max_examples=500)
@given(
    text=st.text(
        st.sampled_from("aBx1 .!?\"'()[]“”。！，\n\t•-—…éÉ\u0301\u200d😀") | st.characters(codec="utf-8"), max_size=200
    )
)
def test_segmenters_keep_all_text(name, text):
    segments = segmenters.build(name)(text, lambda piece: len(piece.encode()))
    assert without_spaces("".join(segments)) == without_spaces(text) and all(segment.strip() for segment in segments)
    assert without_spaces("".join(split_to_window(segments, 7, lambda piece: len(piece.encode())))) == without_spaces(
        text
    )


@settings(derandomize=True, deadline=None, max_examples=200)
@given(text=st.text(st.characters(codec="utf-8"), max_size=300))
def test_encode_random_text(text):
    encoder = test_encode_random_text.__dict__.setdefault("encoder", encoders.build(ENCODERS[0]))
    conditioning = encoder.encode([text])
    assert conditioning.states.isfinite().all() and conditioning.reports[0].truncated == ""


ROWS = {
    '"U.S. "*n': lambda n: "U.S. " * (n // 5),
    '"a"*n + " b. C"': lambda n: "a" * n + " b. C",
    '"["*n + ")"*n + " a. B"': lambda n: "[" * (n // 2) + ")" * (n // 2) + " a. B",
    "'(\"Ab.\") '*n": lambda n: '("Ab.") ' * (n // 8),
    '"! "*n': lambda n: "! " * (n // 2),
    '"1."*n': lambda n: "1." * (n // 2),
    '"a."*n': lambda n: "a." * (n // 2),
    "sentences with a quotation": lambda n: 'He said "a b." then. ' * (n // 21),
    "plain sentences": lambda n: "A cat sits. " * (n // 12),
}


@pytest.mark.parametrize("name", ROWS)
def test_sentences_takes_linear_time(name, capsys):
    seconds = []
    for n in (10_000, 100_000, 200_000):
        text = ROWS[name](n)
        start = time.process_time()
        segments = sentences(text)
        seconds.append(time.process_time() - start)
        assert without_spaces("".join(segments)) == without_spaces(text)
    with capsys.disabled():
        print(f"\n| `{name}` | " + " | ".join(f"{s:.3f}" for s in seconds) + " |")
    assert seconds[1] < 2 and seconds[2] < 4


@pytest.mark.parametrize("text", ["a" * 100_000, "好" * 20_000, "😀" * 20_000, "fox " * 10_000])
def test_report_text_without_periods_takes_bounded_time(text):
    encoder = encoders.build(ENCODERS[0])
    start = time.process_time()
    encoder.report([text])
    assert time.process_time() - start < 60
    assert encoder.tokens._size <= 1_000_000
