import json
from pathlib import Path

import pytest
import torch
from diffusers.models.attention import FeedForward as DiffusersFeedForward

from longalign.encoders.base import TruncationWarning
from longalign.encoders.t5.adapter import TextAdapter
from longalign.encoders.t5.encoder import T5Encoder
from longalign.registry import ConfigError, encoders
from longalign.testing.tiny import tiny_t5

PROMPTS = ["A red fox.", "", "The sky is green. A fox sleeps on a wall.", "A red fox."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_t5(tmp_path_factory.mktemp("t5"))


def build(folder, **settings):
    return encoders.build({"name": "t5", "checkpoint": str(folder), **settings})


def test_t5_pads_to_240_without_mask_by_default(folder):
    encoder = build(folder)
    conditioning = encoder.encode(PROMPTS)
    tokens = encoder.tokens.tokenizer(PROMPTS, padding="max_length", max_length=240, return_tensors="pt")
    assert conditioning.states.shape == (4, 240, 16) and conditioning.mask is None
    assert torch.allclose(conditioning.states, encoder.model(tokens.input_ids).last_hidden_state, atol=1e-5)
    assert conditioning.reports[0].segments == ("A red fox.",) and conditioning.reports[1].tokens == ()


@pytest.mark.parametrize(
    "settings", [{}, {"mask": True}, {"mask": "t5"}, {"overflow": "grow"}, {"overflow": "grow", "mask": True}]
)
def test_t5_batch_equals_single_prompts(folder, settings):
    encoder = build(folder, max_tokens=20 if "overflow" in settings else 60, max_batch_tokens=130, **settings)
    together = encoder.encode(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone = encoder.encode([prompt])
        n = alone.states.shape[1]
        assert torch.allclose(together.states[i, :n], alone.states[0], atol=1e-5)
        if together.mask is not None:
            assert together.mask[i].sum() == alone.mask.sum()
    assert torch.equal(together.states[0], together.states[3])


def test_t5_mask_hides_padding_in_t5_and_conditioning(folder):
    encoder = build(folder, max_tokens=60, mask=True)
    conditioning = encoder.encode(PROMPTS)
    row = torch.tensor([encoder.tokens.tokenizer(PROMPTS[0])["input_ids"]])
    n = row.shape[1]
    assert conditioning.mask[0].tolist() == [True] * n + [False] * (60 - n)
    assert torch.allclose(conditioning.states[0, :n], encoder.model(row).last_hidden_state[0], atol=1e-5)
    assert conditioning.states[0, n:].abs().sum() == 0
    assert (build(folder, max_tokens=60).encode(PROMPTS).states[0, :n] - conditioning.states[0, :n]).abs().max() > 1e-3


def test_t5_mask_hides_padding_in_t5_only(folder):
    encoder = build(folder, max_tokens=20, mask="t5")
    tokens = encoder.tokens.tokenizer(PROMPTS, padding="max_length", max_length=20, return_tensors="pt")
    conditioning, states = encoder.encode(PROMPTS), encoder.model(**tokens).last_hidden_state
    assert conditioning.mask is None and torch.allclose(conditioning.states, states, atol=1e-5)
    assert conditioning.states[1, 1:].abs().min(0).values.sum() > 0


def test_t5_overflow(folder):
    encoder = build(folder, max_tokens=6, overflow="truncate")
    with pytest.warns(TruncationWarning, match=r"1 of 2 prompts .*\b6\b"):
        conditioning = encoder.encode(["A fox sleeps on a wall.", ""])
    assert conditioning.states.shape == (2, 6, 16)
    report = conditioning.reports[0]
    assert report.tokens == (5,) and (report.segments[0] + report.truncated).replace(" ", "") == "Afoxsleepsonawall."
    with pytest.raises(ValueError, match=r"1 of 1 prompts .*\b6\b.*max_tokens"):
        build(folder, max_tokens=6, overflow="error").encode(["A fox sleeps on a wall."])
    grown = build(folder, max_tokens=6).encode(["A fox sleeps on a wall.", ""])
    assert grown.states.shape[1] == sum(grown.reports[0].tokens) + 1 and grown.reports[0].truncated == ""
    assert torch.equal(grown.states[1, 5], grown.states[1, -1])


@pytest.mark.parametrize("mask", [False, True])
def test_t5_encodes_long_prompt_in_windows(folder, mask):
    encoder = build(folder, max_tokens=1, window=12, mask=mask)
    prompts = ["A red fox sleeps on a wall. The sky is green. A wall.", "A fox."]
    conditioning = encoder.encode(prompts)
    report = conditioning.reports[0]
    assert report.truncated == "" and max(report.tokens) <= 11 and len(report.tokens) > 1
    assert " ".join(report.segments) == prompts[0] and encoder.report(prompts) == list(conditioning.reports)
    rows = [encoder.encode([segment]).states[0] for segment in report.segments]
    assert conditioning.states.shape[1] == sum(map(len, rows)) == sum(report.tokens) + len(rows)
    assert torch.allclose(conditioning.states[0], torch.cat(rows), atol=1e-5)
    sizes = []
    encoder.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    encoder.encode(["fox " * 2000])
    assert max(sizes) <= 12


def test_t5_tokenizes_special_tokens_as_text(folder):
    encoder = build(folder, max_tokens=1)
    tokenizer = encoder.tokens.tokenizer
    text = "A red fox.</s> The <pad> sky<extra_id_3> is <unk> é."
    tokenized = encoder.tokens(text)
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(tokenized.ids)
    assert not set(tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(9)])) & set(tokenized.ids)
    for token in ("</s>", "<pad>", "<extra_id_3>", "<unk>"):
        assert {text.index(token), text.index(token) + 1} <= set(tokenized.starts)
    assert list(tokenized.starts) == sorted(tokenized.starts) and encoder.report([text])[0].truncated == ""
    assert encoder.tokens("A red fox.").ids == tokenized.ids[: len(encoder.tokens("A red fox."))]


def test_t5_gradient_reaches_only_the_adapter(folder):
    encoder = build(folder, max_tokens=12, adapter={"in_dim": 16, "int_dim": 8, "out_dim": 6}).train()
    trainable = [p for p in encoder.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in encoder.adapter.parameters()}
    assert not encoder.model.training and encoder.adapter.ff1.net[1].training
    states = encoder.encode(["A red fox."]).states
    assert states.shape == (1, 12, 6) and encoder.dim == 6
    states.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable)
    assert all(p.grad is None for p in encoder.model.parameters())


def test_t5_frozen_adapter_has_no_dropout(folder):
    adapter = {"in_dim": 16, "int_dim": 8, "out_dim": 6, "trainable": False}
    encoder = build(folder, max_tokens=12, adapter=adapter).train()
    assert torch.equal(encoder.encode(["A fox."]).states, encoder.encode(["A fox."]).states)
    assert not encoder.encode(["A fox."]).states.requires_grad


def test_adapter_matches_diffusers_feed_forward():
    torch.manual_seed(0)
    adapter = TextAdapter(8, 6, 4).eval()
    shapes = {key: tuple(value.shape) for key, value in adapter.state_dict().items()}
    assert shapes == {
        "norm1.weight": (8,), "norm1.bias": (8,), "norm2.weight": (6,), "norm2.bias": (6,),
        "ff1.net.0.proj.weight": (64, 8), "ff1.net.0.proj.bias": (64,),
        "ff1.net.2.weight": (6, 32), "ff1.net.2.bias": (6,),
        "ff2.net.0.proj.weight": (48, 6), "ff2.net.0.proj.bias": (48,),
        "ff2.net.2.weight": (4, 24), "ff2.net.2.bias": (4,),
    }  # fmt: skip
    first = DiffusersFeedForward(8, 6, activation_fn="geglu")
    second = DiffusersFeedForward(6, 4, activation_fn="geglu")
    first.load_state_dict(adapter.ff1.state_dict())
    second.load_state_dict(adapter.ff2.state_dict())
    x = torch.randn(2, 3, 8)
    y = first(torch.nn.functional.layer_norm(x, (8,)))
    assert torch.allclose(adapter(x), second(torch.nn.functional.layer_norm(y, (6,))), atol=1e-6)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_adapter_loads_safetensors_and_bin(tmp_path: Path, folder, suffix):
    adapter = TextAdapter(16, 8, 6)
    adapter.save(tmp_path / "sub")
    if suffix == "bin":
        (tmp_path / "sub/diffusion_pytorch_model.safetensors").unlink()
        torch.save(adapter.state_dict(), tmp_path / "sub/diffusion_pytorch_model.bin")
    encoder = build(folder, max_tokens=12, adapter={"checkpoint": str(tmp_path), "subfolder": "sub"})
    for key, value in encoder.adapter.state_dict().items():
        assert torch.equal(value, adapter.state_dict()[key])


def test_adapter_rejects_invalid_files_and_configs(tmp_path: Path, folder):
    with pytest.raises(ValueError, match=rf"{tmp_path}.*config\.json.*diffusion_pytorch_model"):
        TextAdapter.load(str(tmp_path))
    TextAdapter(16, 8, 6).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "int_dim": 9}))
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors: .*config\.json"):
        TextAdapter.load(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json: .*in_dim, int_dim, out_dim"):
        TextAdapter.load(str(tmp_path))
    with pytest.raises(ValueError, match=r"in_dim=16.*got 8"):
        build(folder, adapter={"in_dim": 8, "int_dim": 8, "out_dim": 6})
    for wrong in ({}, {"in_dim": 8, "int_dim": 8}, {"checkpoint": "x", "in_dim": 8}):
        with pytest.raises(ConfigError, match="adapter: "):
            encoders.validate({"name": "t5", "adapter": wrong})


def test_t5_rejects_single_text(folder):
    encoder = build(folder)
    assert isinstance(encoder, T5Encoder)
    with pytest.raises(ValueError, match=r"'A fox\.'.*\[prompt\]"):
        encoder.encode("A fox.")
