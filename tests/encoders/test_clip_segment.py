from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import AutoTokenizer

from longalign.encoders.base import TruncationWarning
from longalign.encoders.clip.config import ClipSegmentConfig
from longalign.encoders.clip.segment import ClipSegmentEncoder
from longalign.registry import encoders
from longalign.runtime import Runtime
from longalign.segmenters import LongAlign, Manual, Sentence
from longalign.testing.tiny import tiny_clip, tiny_clip_text, tiny_t5
from longalign.tokens import Tokenized

LONG = "a red fox, a wall and the sky " * 12
PROMPTS = ["A fox. The sky is green!", "", LONG, "A fox.", "Walls? " + LONG + ". A fox.", "A fox. A fox. The wall"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip_text(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "tokenizer")


class PositionTextModel(nn.Module):
    """A text model whose state at a position is (token id, position)."""

    def __init__(self, window=77):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=2, max_position_embeddings=window, vocab_size=49408)
        self.weight = nn.Parameter(torch.ones(()))
        self.rows = []

    def forward(self, input_ids):
        self.rows += input_ids.tolist()
        positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return SimpleNamespace(last_hidden_state=torch.stack([input_ids, positions], -1).float() * self.weight)


def position_encoder(tokenizer, window=77, segmenter=None, **settings):
    config = ClipSegmentConfig(**settings)
    return ClipSegmentEncoder.from_modules(config, PositionTextModel(window), tokenizer, segmenter or Sentence())


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def as_tuples(states):
    return [tuple(state) for state in states.tolist()]


def test_clip_segment_merges_sot_drops_eot_and_pads_with_pad_star(tokenizer):
    sot, eot = tokenizer.bos_token_id, tokenizer.eos_token_id
    a, fox, stop = ids(tokenizer, "a fox.")
    states = position_encoder(tokenizer, max_tokens=10).encode(["A fox. Fox."]).states
    # the last 60 of 77 positions are 17 to 76, their mean is 46.5
    expected = [(sot, 0), (a, 1), (fox, 2), (stop, 3), (sot, 0), (fox, 1), (stop, 2), *[(eot, 46.5)] * 3]
    assert as_tuples(states[0]) == expected


def test_clip_segment_empty_prompt_is_one_sot_and_239_pads(tokenizer):
    conditioning = position_encoder(tokenizer).encode(["", " \n"])
    sot, eot = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert as_tuples(conditioning.states[0]) == as_tuples(conditioning.states[1]) == [(sot, 0), *[(eot, 46.5)] * 239]
    assert conditioning.mask is None and conditioning.reports[0].segments == ()


def test_clip_segment_pad_star_scales_with_window(tokenizer):
    states = position_encoder(tokenizer, window=20, max_tokens=3).encode([""]).states
    # 60/77 of 20 is 16: positions 4 to 19
    assert states[0, 1].tolist() == [tokenizer.eos_token_id, 11.5]


@pytest.mark.parametrize(
    ("sot", "eot", "expected"),
    [
        ("all", "all", "SfESgE"),
        ("all", "last", "SfSgE"),
        ("first", "none", "Sfg"),
        ("first", "last", "SfgE"),
        ("none", "all", "fEgE"),
        ("none", "none", "fg"),
    ],
)
def test_clip_segment_sot_and_eot_strategies(tokenizer, sot, eot, expected):
    encoder = position_encoder(tokenizer, segmenter=Manual("BREAK"), sot=sot, eot=eot, pad="none")
    conditioning = encoder.encode([["fox", "green"], "", "fox"])
    fox, green = ids(tokenizer, "fox")[0], ids(tokenizer, "green")[0]
    names = {tokenizer.bos_token_id: "S", tokenizer.eos_token_id: "E", fox: "f", green: "g"}
    merged = [
        "".join(names[int(i)] for i in row[mask, 0])
        for row, mask in zip(conditioning.states, conditioning.mask, strict=True)
    ]
    assert merged[0] == expected
    empty = {"all": "E", "last": "E", "none": ""}[eot]
    assert merged[1] == (("" if sot == "none" else "S") + empty or "S")
    assert conditioning.states[~conditioning.mask].abs().sum() == 0
    assert conditioning.states.shape[1] == len(expected)


@pytest.mark.parametrize("sot", ["all", "none"])
def test_clip_segment_reads_context_and_drops_its_states(tokenizer, sot):
    encoder = position_encoder(tokenizer, segmenter=Manual("BREAK"), sot=sot, eot="last", pad="none", context=1)
    states = encoder.encode([["a fox", "green", "wall"]]).states[0]
    a, fox, green, wall = ids(tokenizer, "a fox green wall")
    start = [(tokenizer.bos_token_id, 0)] * (sot == "all")
    expected = [*start, (a, 1), (fox, 2), *start, (green, 3), *start, (wall, 2), (tokenizer.eos_token_id, 3)]
    assert as_tuples(states) == expected


def test_clip_segment_context_is_whole_segments_that_fit_the_window(tokenizer):
    encoder = position_encoder(tokenizer, window=7, segmenter=Manual("BREAK"), sot="none", pad="none", context=3)
    conditioning = encoder.encode([["a fox", "green", "wall", "a wall green fox"]])
    # wall: after "a fox green"; the last segment and "wall" fill the window of five tokens
    assert conditioning.states[0, :, 1].tolist() == [1, 2, 3, 4, 2, 3, 4, 5]
    assert conditioning.reports[0].segments == ("a fox", "green", "wall", "a wall green fox")


def test_clip_segment_plain_padding_is_empty_prompt_at_same_position(tokenizer):
    states = position_encoder(tokenizer, max_tokens=80, pad="pad").encode([""]).states
    sot, eot = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert as_tuples(states[0]) == [(sot, 0), *[(eot, i) for i in range(1, 77)], *[(eot, 76)] * 3]


def test_clip_segment_truncate_warns_once_and_reports_text(tokenizer):
    encoder = position_encoder(tokenizer, max_tokens=6, overflow="truncate")
    with pytest.warns(TruncationWarning, match=r"2 of 3 prompts .*\b6 .* 0: 'green\. Fox\.'") as caught:
        conditioning = encoder.encode(["A fox. A green. Fox.", "Fox.", "A fox. A fox."])
    assert len(caught) == 1 and caught[0].filename == __file__
    message = str(caught[0].message)
    assert "max_tokens" in message and "overflow to 'grow'" in message and "'truncate'" not in message
    assert conditioning.states.shape == (3, 6, 2)
    assert conditioning.states[0, :, 1].tolist() == [0, 1, 2, 3, 0, 1]
    report = conditioning.reports[0]
    assert (report.segments, report.tokens, report.truncated) == (("A fox.", "A"), (3, 1), "green. Fox.")
    assert conditioning.reports[1].truncated == "" and encoder.report(["A fox. A fox."]) == [conditioning.reports[2]]


def test_clip_segment_dropping_only_eot_is_no_truncation(tokenizer):
    assert (
        position_encoder(tokenizer, max_tokens=4, eot="all", overflow="truncate")
        .encode(["A fox."])
        .reports[0]
        .truncated
        == ""
    )


def test_clip_segment_grows_unless_overflow_is_error(tokenizer):
    with pytest.raises(ValueError, match=r"1 of 1 prompts.*\b3\b.*'fox\.'.*max_tokens"):
        position_encoder(tokenizer, max_tokens=3, overflow="error").encode(["Fox. fox."])
    conditioning = position_encoder(tokenizer, max_tokens=3).encode(["Fox. fox.", "Fox."])
    assert conditioning.states[:, :, 1].tolist() == [[0, 1, 2, 0, 1, 2], [0, 1, 2, 46.5, 46.5, 46.5]]
    assert conditioning.reports[0].truncated == ""


def test_clip_segment_splits_long_segment_without_truncation(tokenizer):
    encoder = position_encoder(tokenizer, max_tokens=600)
    report = encoder.encode([LONG]).reports[0]
    assert len(report.segments) > 1 and max(report.tokens) <= 75 and report.truncated == ""
    assert " ".join(report.segments) == LONG.strip()
    assert all(segment.endswith(",") for segment in report.segments[:-1])


def authors_states(encoder, prompts):
    """Segment encoding as in the authors' code: CLIP's tokenizer truncates each segment to 77 tokens."""
    tokenizer, model = encoder.tokens.tokenizer, encoder.text_model
    empty = tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids
    pad = model(empty).last_hidden_state[0, -60:].mean(0)
    out = []
    for prompt in prompts:
        texts = LongAlign()(prompt, len) or [prompt]
        rows = tokenizer(texts, max_length=77, padding=True, truncation=True, return_tensors="pt").input_ids
        kept = (rows != tokenizer.eos_token_id) & (rows != tokenizer.pad_token_id)
        states = model(rows).last_hidden_state[kept][:240]
        out.append(torch.cat([states, pad.expand(240 - len(states), -1)]))
    return torch.stack(out)


@pytest.mark.filterwarnings("ignore::longalign.encoders.base.TruncationWarning")
def test_clip_segment_reproduces_authors_states(folder):
    settings = {"segmenter": "longalign", "overflow": "truncate", "truncate_segments": True}
    encoder = encoders.build({"name": "clip-segment", "checkpoint": str(folder), **settings})
    prompts = [*PROMPTS, f"{LONG}. A fox. {LONG}. {LONG}; {LONG}. Walls?"]
    assert max(len(ids(encoder.tokens.tokenizer, text)) for text in prompts) > 240
    torch.testing.assert_close(encoder.encode(prompts).states, authors_states(encoder, prompts), atol=1e-5, rtol=1e-4)


def test_clip_segment_truncated_segments_are_reported(tokenizer):
    long = " ".join(["fox"] * 80)
    encoder = position_encoder(tokenizer, max_tokens=100, segmenter=LongAlign(), truncate_segments=True)
    with pytest.warns(TruncationWarning, match=r"1 of 2 .* 100 tokens or 75 tokens in .* 0: 'fox .*_segments to f"):
        conditioning = encoder.encode([f"{long}. A sky.", "A fox."])
    report = conditioning.reports[0]
    assert report.tokens == (75, 3) and report.truncated == "fox fox fox fox fox."
    assert conditioning.states[0, :80, 1].tolist() == [*range(76), 0, 1, 2, 3]
    with pytest.raises(ValidationError, match=r"overflow: error.*truncate_segments"):
        ClipSegmentConfig(overflow="error", truncate_segments=True)


def test_clip_segment_encodes_equal_segments_once(tokenizer):
    encoder, long = position_encoder(tokenizer), " ".join(["a wall and the sky"] * 10)
    encoder.encode(["Fox. A fox.", "A fox. Fox.", long])
    rows = encoder.text_model.rows
    assert sorted(map(len, rows)) == [5, 5, len(ids(tokenizer, long)) + 2, 77]


@pytest.mark.parametrize(
    "settings", [{}, {"sot": "first", "eot": "last", "pad": "pad"}, {"max_batch_tokens": 30, "context": 2}]
)
def test_clip_segment_batch_equals_single_prompts(folder, settings):
    encoder = encoders.build({"name": "clip-segment", "checkpoint": str(folder), "max_tokens": 400, **settings})
    together = encoder.encode(PROMPTS).states
    alone = torch.cat([encoder.encode([prompt]).states for prompt in PROMPTS])
    assert torch.allclose(together, alone, atol=1e-5)
    assert (together[0] - together[3]).abs().max() > 0.1


def test_clip_segment_states_match_text_model(folder):
    encoder = encoders.build({"name": "clip-segment", "checkpoint": str(folder), "segmenter": "longalign"})
    states = encoder.encode(["A fox. Sky"]).states[0]
    row = torch.tensor([encoder.tokens.tokenizer("A fox.")["input_ids"]])
    assert torch.allclose(states[:4], encoder.text_model(row).last_hidden_state[0, :4], atol=1e-5)
    empty = encoder.tokens.tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids
    pad = encoder.text_model(empty).last_hidden_state[0, -60:].mean(0)
    assert torch.allclose(states[-1], pad, atol=1e-5)
    assert isinstance(encoder.segmenter, LongAlign)


def test_clip_segment_keeps_token_equal_to_padding(folder):
    other = AutoTokenizer.from_pretrained(folder / "tokenizer", pad_token="!")
    states = position_encoder(other, max_tokens=5).encode(["fox!"]).states
    assert states[0, 2].tolist() == [other.pad_token_id, 2]
    assert states[0, 3].tolist() == [other.pad_token_id, 46.5]


def test_clip_segment_is_frozen_but_usable_in_a_graph(folder):
    encoder = encoders.build({"name": "clip-segment", "checkpoint": str(folder)}).train()
    assert not encoder.text_model.training
    assert not any(p.requires_grad for p in encoder.parameters())
    states = encoder.encode(["A fox."]).states
    layer = nn.Linear(16, 1)
    layer(states).sum().backward()
    assert not states.requires_grad and layer.weight.grad.abs().sum() > 0


def test_clip_segment_loads_diffusers_and_transformers_layouts(tmp_path, folder):
    whole = tiny_clip_text(tmp_path / "whole", "transformers")
    transformers_layout = encoders.build({"name": "clip-segment", "checkpoint": str(whole)})
    diffusers_layout = encoders.build({"name": "clip-segment", "checkpoint": str(folder), "subfolder": "text_encoder"})
    half = encoders.build({"name": "clip-segment", "checkpoint": str(folder)}, Runtime(dtype="bfloat16"))
    assert transformers_layout.dim == diffusers_layout.dim == 16
    assert half.encode(["A fox."]).states.dtype == torch.bfloat16
    assert torch.allclose(half.encode(["A fox."]).states.float(), diffusers_layout.encode(["A fox."]).states, atol=0.1)


def test_clip_segment_rejects_wrong_checkpoints(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=rf"CLIPTextModel .*{tmp_path}.*config\.json"):
        encoders.build({"name": "clip-segment", "checkpoint": str(tmp_path)})
    with pytest.raises(ValueError, match=r"t5' .*CLIPTextModel: \d+ weights"):
        encoders.build({"name": "clip-segment", "checkpoint": str(tiny_t5(tmp_path / "t5"))})
    with pytest.raises(ValueError, match=r"tokenizer .*bare'.*tokenizer\.json"):
        encoders.build({"name": "clip-segment", "checkpoint": str(tiny_clip(tmp_path / "bare", tokenizer=False))})
    model = PositionTextModel()
    model.config.vocab_size = 10
    with pytest.raises(ValueError, match=r"eos_token_id=.*vocab_size=10"):
        ClipSegmentEncoder.from_modules(ClipSegmentConfig(), model, tokenizer, Sentence())


def test_clip_segment_rejects_single_text(tokenizer):
    for method in (position_encoder(tokenizer).encode, position_encoder(tokenizer).report):
        with pytest.raises(ValueError, match=r"'A fox\.'.*\[prompt\]"):
            method("A fox.")


def test_tokenized_split_at():
    text = Tokenized("A red  fox", (5, 6, 7), (0, 2, 7))
    assert text.split_at(2) == ("A red", "fox") and text.split_at(3) == ("A red  fox", "") and text.split_at(0)[0] == ""
