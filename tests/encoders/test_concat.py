from dataclasses import replace

import pytest
import torch
from torch import nn

from longalign.encoders.base import Conditioning, Encoder, PromptReport, TruncationWarning
from longalign.encoders.concat import ConcatEncoder
from longalign.registry import ConfigError, encoders
from longalign.segmenters import check_prompts
from longalign.testing.tiny import tiny_clip_text, tiny_t5


class Constant(Encoder):
    """An encoder whose states are all one number."""

    def __init__(self, value, length, *, dim=2, mask=None, pooled=None, truncated="", kind=Conditioning):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(value)))
        self.dim, self.length, self.mask, self.pooled = dim, length, mask, pooled
        self.truncated, self.kind = truncated, kind

    def encode(self, prompts):
        b = len(check_prompts(prompts))
        mask = None if self.mask is None else torch.tensor([self.mask] * b)
        pooled = None if self.pooled is None else torch.full((b, 1), float(self.pooled))
        states = self.value.expand(b, self.length, self.dim)
        return self.kind(states, mask, pooled, tuple(self.report(prompts)))

    def report(self, prompts):
        return [PromptReport((prompt,), (len(prompt),), self.truncated) for prompt in prompts]


class TimestepConditioning(Conditioning):
    """Its states have twice their final width."""

    def at(self, timestep):
        return Conditioning(self.states[..., : self.states.shape[2] // 2] + timestep[:, None, None])


class Doubled(Conditioning):
    def predict(self, call, latents, timesteps):
        return 2 * super().predict(call, latents, timesteps)


def test_concat_joins_states_and_masks():
    conditioning = ConcatEncoder([Constant(1, 2), Constant(3, 2, mask=[True, False], pooled=7)]).encode(["a", "b"])
    assert conditioning.states[..., 0].tolist() == [[1, 1, 3, 3]] * 2
    assert conditioning.mask.tolist() == [[True, True, True, False]] * 2
    assert conditioning.pooled.tolist() == [[7], [7]]
    assert type(conditioning) is Conditioning
    assert ConcatEncoder([Constant(1, 2), Constant(3, 1)]).encode(["a"]).mask is None


def test_concat_merges_reports():
    encoder = ConcatEncoder([Constant(1, 1, truncated=text) for text in ("x y", "", "y", "y")])
    report = encoder.encode(["ab"]).reports[0]
    assert report.segments == ("ab",) * 4 and report.tokens == (2,) * 4
    assert report.truncated == "x y\ny"
    assert [part.truncated for part in report.parts] == ["x y", "", "y", "y"]
    assert encoder.report(["ab"]) == [report]


def moving_and_fixed():
    class Wide(Constant):
        def encode(self, prompts):
            conditioning = super().encode(prompts)
            return replace(conditioning, states=conditioning.states.repeat(1, 1, 2))

    return ConcatEncoder([Constant(1, 1), Wide(2, 1, kind=TimestepConditioning)])


def test_concat_supports_timestep_dependent_parts():
    conditioning = moving_and_fixed().encode(["a", "b", "c"])
    assert not conditioning.is_static
    assert conditioning.at(torch.tensor([0, 10, 20])).states[..., 0].tolist() == [[1, 2], [1, 12], [1, 22]]
    some = conditioning[torch.tensor([2])].to(dtype=torch.float64)
    later = some.at(torch.tensor([5]))
    assert later.states[..., 0].tolist() == [[1, 7]] and later.states.dtype == torch.float64
    assert [report.segments for report in later.reports] == [("c", "c")]


def test_concat_gradient_reaches_all_trainable_parts():
    encoder = ConcatEncoder([Constant(1, 1), Constant(2, 3)])
    encoder.encode(["a"]).states.sum().backward()
    assert [part.value.grad.item() for part in encoder.parts] == [2, 6]


def test_concat_rejects_invalid_parts():
    with pytest.raises(ValueError, match=r"widths \[2, 3\]"):
        ConcatEncoder([Constant(1, 1), Constant(1, 1, dim=3)])
    with pytest.raises(ValueError, match=r"\bone part\b.* none"):
        ConcatEncoder([])
    with pytest.raises(ValueError, match=r"pooled embedding.*\b2\b"):
        ConcatEncoder([Constant(1, 1, pooled=1), Constant(1, 1, pooled=2)]).encode(["a"])
    with pytest.raises(ValueError, match=r"several predictions.*inner encoder"):
        ConcatEncoder([Constant(1, 1), Constant(1, 1, kind=Doubled)]).encode(["a"])
    with pytest.raises(ValueError, match=r"'a'.*\[prompt\]"):
        ConcatEncoder([Constant(1, 1)]).encode("a")
    with pytest.raises(ConfigError, match=r"parts\.1\.chekpoint: .*'checkpoint'"):
        encoders.validate({"name": "concat", "parts": ["clip-segment", {"name": "t5", "chekpoint": "x"}]})


def test_concat_builds_model_of_the_paper(tmp_path):
    config = {
        "name": "concat",
        "parts": [
            {"name": "clip-segment", "checkpoint": str(tiny_clip_text(tmp_path / "clip")), "segmenter": "longalign"},
            {"name": "t5", "checkpoint": str(tiny_t5(tmp_path / "t5")),
             "adapter": {"in_dim": 16, "int_dim": 8, "out_dim": 16}},
        ],
    }  # fmt: skip
    encoder = encoders.build(config).train()
    conditioning = encoder.encode(["A red fox. The sky is green.", ""])
    assert conditioning.states.shape == (2, 480, 16) and conditioning.mask is None
    assert conditioning.reports[0].segments == ("A red fox.", " The sky is green.", "A red fox. The sky is green.")
    conditioning.states.sum().backward()
    clip, t5 = encoder.parts
    assert all(p.grad is not None for p in t5.adapter.parameters())
    assert not any(p.requires_grad for p in [*clip.parameters(), *t5.model.parameters()])
    assert encoder.encode(["A red fox. " * 100]).reports[0].truncated == ""
    truncating = [{**part, "overflow": "truncate"} for part in config["parts"]]
    with pytest.warns(TruncationWarning) as caught:
        assert encoders.build({**config, "parts": truncating}).encode(["A red fox. " * 100]).states.shape[1] == 480
    assert len(caught) == 2


def test_encoder_configs_round_trip():
    for value in (
        "clip-segment", "clip-truncate", "longclip", "t5",
        {"name": "clip-segment", "segmenter": {"name": "packed", "n": 30}, "pad": "none"},
        {"name": "concat", "parts": ["clip-segment", {"name": "t5", "adapter": {"checkpoint": "x"}}]},
    ):  # fmt: skip
        config = encoders.validate(value)
        assert encoders.validate(config.model_dump()) == config
    dumped = encoders.validate("clip-segment").model_dump()
    assert dumped["segmenter"] == {"name": "sentence"} and dumped["max_tokens"] == 240 and dumped["pad"] == "pad*"
