import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from longalign.encoders.base import TruncationWarning
from longalign.encoders.clip.weights import text_state
from longalign.mini.tokenizers import write_clip_tokenizer
from longalign.registry import encoders
from longalign.testing.tiny import tiny_clip_text, tiny_longclip_file

LONG = " ".join(["fox"] * 80)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return encoders.build({"name": "clip-truncate", "checkpoint": str(tiny_clip_text(tmp_path_factory.mktemp("clip")))})


def test_clip_truncate_states_match_diffusers(encoder):
    prompts = ["A red fox. The sky", "", "a wall"]
    tokens = encoder.tokens.tokenizer(prompts, padding="max_length", max_length=77, return_tensors="pt")
    conditioning = encoder.encode(prompts)
    assert conditioning.states.shape == (3, 77, 16) and conditioning.mask is None
    assert torch.allclose(conditioning.states, encoder.text_model(tokens.input_ids).last_hidden_state, atol=1e-5)
    assert not conditioning.states.requires_grad


def test_clip_truncate_warns_once_and_reports_text(encoder):
    with pytest.warns(TruncationWarning, match=r"1 of 2 prompts .*\b77\b") as caught:
        conditioning = encoder.encode([LONG + " end", "fox"])
    assert len(caught) == 1
    report = conditioning.reports[0]
    assert report.tokens == (75,) and report.segments[0].split() == ["fox"] * 75
    assert report.truncated == "fox fox fox fox fox end"
    assert (
        encoder.report([LONG + " end", "fox"]) == list(conditioning.reports) and conditioning.reports[1].truncated == ""
    )


def test_clip_truncate_raises_on_overflow_error_and_joins_segments(encoder):
    strict = type(encoder)(encoder.text_model, encoder.tokens.tokenizer, overflow="error", max_batch_tokens=77)
    with pytest.raises(ValueError, match=r"1 of 1 prompts .*\b77\b.*clip-segment"):
        strict.encode([LONG])
    assert torch.equal(strict.encode([["a", "fox"]]).states, strict.encode(["a fox"]).states)
    with pytest.raises(ValueError, match=r"'a fox'.*\[prompt\]"):
        strict.encode("a fox")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = write_clip_tokenizer(tmp_path_factory.mktemp("longclip"), ["fox"], 248)
    return tiny_longclip_file(folder / "longclip-L.pt", len(AutoTokenizer.from_pretrained(folder)))


def reference(state, ids):
    """OpenAI's text transformer with torch's attention."""
    positions = torch.cat([state["positional_embedding"][:20], state["positional_embedding_res"][20:]])
    x = state["token_embedding.weight"][ids] + positions[: len(ids)]
    width = x.shape[-1]
    mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1)

    def norm(x, name):
        return nn.functional.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"])

    for layer in range(2):
        block = f"transformer.resblocks.{layer}"
        attention = nn.MultiheadAttention(width, width // 64)
        part = {k.removeprefix(f"{block}.attn."): v for k, v in state.items() if k.startswith(f"{block}.attn.")}
        attention.load_state_dict(part)
        y = norm(x, f"{block}.ln_1")
        x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        y = norm(x, f"{block}.ln_2") @ state[f"{block}.mlp.c_fc.weight"].T + state[f"{block}.mlp.c_fc.bias"]
        y = y * torch.sigmoid(1.702 * y)
        x = x + y @ state[f"{block}.mlp.c_proj.weight"].T + state[f"{block}.mlp.c_proj.bias"]
    return norm(x, "ln_final")


def test_longclip_loads_original_file(original):
    encoder = encoders.build({"name": "longclip", "checkpoint": str(original)})
    with torch.no_grad():
        state = torch.load(original, weights_only=True)
        row = encoder.tokens.tokenizer(LONG)["input_ids"]
        states = encoder.encode([LONG]).states
        assert states.shape == (1, 248, 64)
        assert torch.allclose(states[0, :82], reference(state, torch.tensor(row)), atol=1e-4)
    in_folder = encoders.build({"name": "longclip", "checkpoint": str(original.parent)})
    assert torch.equal(in_folder.encode(["fox"]).states, encoder.encode(["fox"]).states)


def test_longclip_first_20_positions_are_clips(original):
    state = torch.load(original, weights_only=True)
    positions = text_state(state)["embeddings.position_embedding.weight"]
    assert torch.equal(positions[19], state["positional_embedding"][19])
    assert torch.equal(positions[20], state["positional_embedding_res"][20])


def test_longclip_loads_transformers_layout(tmp_path):
    folder = tiny_clip_text(tmp_path, "transformers", positions=248)
    whole = encoders.build({"name": "longclip", "checkpoint": str(folder)})
    prompts = [" ".join(["A red fox."] * 100), "A red fox."]
    conditioning = whole.encode(prompts)
    assert (
        conditioning.states.shape[1] == 2 * 248
        and conditioning.reports[0].truncated == ""
        and sum(conditioning.reports[0].tokens) == 400
    )
    parts = whole.encode(list(conditioning.reports[0].segments)).states
    assert torch.allclose(conditioning.states[0], parts.flatten(0, 1), atol=1e-5)
    assert torch.equal(conditioning.states[1, 248:], conditioning.states[1, 247:248].expand(248, -1))
    encoder = encoders.build({"name": "longclip", "checkpoint": str(folder), "overflow": "truncate"})
    assert encoder.encode([LONG]).reports[0].truncated == ""
    with pytest.warns(TruncationWarning, match=r"1 of 1 prompts .*\b248\b"):
        assert encoder.encode([" ".join(["fox"] * 247)]).reports[0].truncated == "fox"


def test_longclip_rejects_wrong_checkpoints(tmp_path, original):
    with pytest.raises(ValueError, match=r"\b248\b.*\b77\b.*short'"):
        encoders.build({"name": "longclip", "checkpoint": str(tiny_clip_text(tmp_path / "short"))})
    torch.save({"weight": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"'token_embedding\.weight'.*\['weight'\]"):
        encoders.build({"name": "longclip", "checkpoint": str(tmp_path / "other.pt")})
    torch.save(nn.Linear(1, 1), tmp_path / "code.pt")
    with pytest.raises(ValueError, match=r"code\.pt .*'torch\.nn"):
        encoders.build({"name": "longclip", "checkpoint": str(tmp_path / "code.pt")})
    with pytest.raises(ValueError, match=r"'longclip-B\.pt'"):
        encoders.build({"name": "longclip", "checkpoint": str(original.parent), "filename": "longclip-B.pt"})
