from dataclasses import dataclass

import pytest
import torch
from torch import nn

from longalign.encoders.base import Conditioning, Encoder, PromptReport
from longalign.segmenters import check_prompts


def test_conditioning_indexes_rows_and_casts():
    reports = tuple(PromptReport((name,), (1,)) for name in "abc")
    conditioning = Conditioning(torch.arange(3.0).view(3, 1, 1), pooled=torch.arange(3.0).view(3, 1), reports=reports)
    for index in (slice(1, 3), torch.tensor([1, 2]), torch.tensor([False, True, True]), slice(-2, None)):
        rows = conditioning[index]
        assert rows.states.flatten().tolist() == rows.pooled.flatten().tolist() == [1, 2]
        assert rows.reports == reports[1:]
    assert conditioning.to(dtype=torch.float16).states.dtype == torch.float16
    assert conditioning.at(torch.tensor([5])) is conditioning


@dataclass(frozen=True)
class Nested(Conditioning):
    inner: tuple = ()


def test_map_reaches_nested_tensors():
    inner = Conditioning(torch.arange(6.0).view(3, 1, 2), mask=torch.ones(3, 1, dtype=torch.bool))
    nested = Nested(torch.zeros(3, 1, 1), inner=(inner, {"key": torch.arange(3.0)}, "text"))
    (rows, values, text), casted = nested[torch.tensor([2])].inner, nested.to(dtype=torch.float16).inner
    assert rows.states.tolist() == [[[4, 5]]] and values["key"].tolist() == [2] and text == "text"
    assert casted[0].states.dtype == casted[1]["key"].dtype == torch.float16 and casted[0].mask.dtype == torch.bool
    assert nested.is_static


def test_check_prompts_rejects_invalid_prompts():
    assert check_prompts(("a", ["b", "c"])) == ["a", ["b", "c"]]
    with pytest.raises(ValueError, match=r"'a cat'.*\[prompt\]"):
        check_prompts("a cat")
    with pytest.raises(ValueError, match=r"\bone prompt\b.* none"):
        check_prompts([])
    with pytest.raises(ValueError, match=r"prompt 1 .* got 3"):
        check_prompts(["a", 3])


def test_encoder_train_keeps_frozen_modules_in_eval_mode():
    encoder = Encoder()
    encoder.frozen = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5)).requires_grad_(False)
    encoder.trained = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))
    encoder.train()
    assert not encoder.frozen[1].training and encoder.trained[1].training
    encoder.eval()
    assert not encoder.trained[1].training


def test_adapter_parameters_are_those_that_could_be_trained():
    encoder = Encoder()
    encoder.frozen, encoder.adapter = nn.Linear(1, 1).requires_grad_(False), nn.Linear(1, 1)
    names = {"adapter.weight", "adapter.bias"}
    for trainable in (False, False, True):
        encoder.train_adapter(trainable)
        assert set(encoder.adapter_parameters()) == names
        assert {name for name, p in encoder.named_parameters() if p.requires_grad} == (names if trainable else set())
