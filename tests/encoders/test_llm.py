"""The encoder `llm`, compared with diffusers' pipelines of FLUX.2, Z-Image, Qwen-Image and Sana."""

import diffusers
import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    Mistral3ForConditionalGeneration,
    PixtralProcessor,
    Qwen2_5_VLForConditionalGeneration,
)

from longalign.encoders.base import TruncationWarning
from longalign.registry import ConfigError, encoders
from longalign.testing.encoders import check_encoder
from longalign.testing.tiny_llm import tiny_llm

PROMPTS = ["a red fox. the sky is green.", "", "a fox"]
SYSTEM = "Paint this."
THREE_LAYERS = {"layer": [0, 1, 2], "pad_to": 90}
NO_THINKING = {"template_variables": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llm(tmp_path_factory.mktemp("qwen3"))


def build(folder, **settings):
    return encoders.build({"name": "llm", "checkpoint": str(folder), **settings})


def load(folder, kind=AutoModel):
    return kind.from_pretrained(folder / "text_encoder").eval(), AutoTokenizer.from_pretrained(folder / "tokenizer")


def assert_equal_states(conditioning, rows):
    for states, mask, expected in zip(conditioning.states, conditioning.mask, rows, strict=True):
        torch.testing.assert_close(states[mask], expected, rtol=1e-4, atol=1e-5)
        assert not states[~mask].any() and mask.tolist() == sorted(mask.tolist(), reverse=True)


@pytest.mark.parametrize("segmenter", [None, "sentence"])
def test_llm_conforms(folder, segmenter):
    check_encoder({"name": "llm", "checkpoint": str(folder), "max_tokens": 60, "segmenter": segmenter})
    check_encoder({"name": "llm", "checkpoint": str(folder), "max_tokens": 60, "segmenter": segmenter, **THREE_LAYERS})


def test_llm_equals_z_image_pipeline(folder):
    model, tokenizer = load(folder)
    pipe = diffusers.ZImagePipeline(None, None, model, tokenizer, None)
    with torch.no_grad():
        rows, _ = pipe.encode_prompt(list(PROMPTS), "cpu", do_classifier_free_guidance=False)
    assert_equal_states(build(folder, layer=-2).encode(PROMPTS), rows)


def test_llm_equals_flux2_klein_pipeline(folder):
    pipe, (model, tokenizer) = diffusers.Flux2KleinPipeline, load(folder)
    with torch.no_grad():
        states = pipe._get_qwen3_prompt_embeds(
            model, tokenizer, PROMPTS, max_sequence_length=90, hidden_states_layers=(0, 1, 2)
        )
    conditioning = build(folder, **THREE_LAYERS, **NO_THINKING).encode(PROMPTS)
    torch.testing.assert_close(conditioning.states, states, rtol=1e-4, atol=1e-5)
    assert conditioning.mask is None and states.shape == (3, 90, 48)


def test_llm_equals_flux2_dev_pipeline(tmp_path):
    folder = tiny_llm(tmp_path, "mistral3")
    model, tokenizer = load(folder, Mistral3ForConditionalGeneration)
    processor = PixtralProcessor.from_pretrained(folder / "tokenizer")
    with torch.no_grad():
        states = diffusers.Flux2Pipeline._get_mistral_3_small_prompt_embeds(
            model, processor, PROMPTS, max_sequence_length=90, system_message=SYSTEM, hidden_states_layers=(0, 1, 2)
        )
    encoder = build(folder, system=SYSTEM, **THREE_LAYERS)
    torch.testing.assert_close(encoder.encode(PROMPTS).states, states, rtol=1e-4, atol=1e-5)
    assert tokenizer.padding_side == "left" and states[1].std() > 0
    assert not any("vision" in name for name, _ in encoder.named_parameters())


def test_llm_padding_states_fill_prompts_of_segments(folder):
    encoder, prompt = build(folder, segmenter="sentence", pad_to=90), "A red fox. The sky."
    unpadded = build(folder, segmenter="sentence").encode([prompt]).states[0]
    states = encoder.encode([prompt]).states
    torch.testing.assert_close(states[0, : len(unpadded)], unpadded)
    # the padding follows the last segment
    alone = build(folder).encode(["The sky."]).states.shape[1]
    expected = build(folder, pad_to=90 - len(unpadded) + alone).encode(["The sky."]).states[0, alone:]
    torch.testing.assert_close(states[0, len(unpadded) :], expected)
    longer = encoder.encode([prompt, prompt + " A wall is red." * 5])
    assert longer.states.shape[1] > 90 and longer.mask is None
    torch.testing.assert_close(longer.states[:1, :90], states)
    assert torch.equal(longer.states[0, 90:], longer.states[:1, 89].expand_as(longer.states[0, 90:]))


def test_llm_equals_qwen_image_pipeline(tmp_path):
    folder = tiny_llm(tmp_path, "qwen2.5-vl")
    model, tokenizer = load(folder, Qwen2_5_VLForConditionalGeneration)
    pipe = diffusers.QwenImagePipeline(None, None, model, tokenizer, None)
    # the chat template of its tokenizer with the pipeline's system message gives the pipeline's template
    start, system, stop = pipe.prompt_template_encode.replace("<|im_end|>", "<|im_start|>").split("<|im_start|>")[:3]
    system = system.removeprefix("system\n")
    before = pipe.prompt_template_encode.partition("{}")[0]
    pipe.prompt_template_encode_start_idx = len(tokenizer(before)["input_ids"])  # a constant for Qwen's vocabulary
    with torch.no_grad():
        states, mask = pipe._get_qwen_prompt_embeds(PROMPTS, "cpu")
    encoder = build(folder, system=system, prefix="none")
    assert (encoder.template.prefix, start, stop) == (before, "", "\n")
    assert not any("visual" in name for name, _ in encoder.named_parameters())
    assert_equal_states(encoder.encode(PROMPTS), [row[kept.bool()] for row, kept in zip(states, mask, strict=True)])
    template = build(folder, template=pipe.prompt_template_encode, prefix="none")
    torch.testing.assert_close(template.encode(PROMPTS).states, encoder.encode(PROMPTS).states)


def test_llm_equals_sana_pipeline(tmp_path):
    folder = tiny_llm(tmp_path, "gemma2")
    model, tokenizer = load(folder)
    pipe = diffusers.SanaPipeline(tokenizer, model, None, None, None)
    texts = ["A red fox.", "the sky is green."]
    with torch.no_grad():
        states, mask, unconditional, unconditional_mask = pipe.encode_prompt(
            texts, True, device="cpu", complex_human_instruction=["paint this: "], max_sequence_length=8
        )
    encoder = build(folder, template="paint this: {}", prefix="first", lowercase=True)
    rows = [row[kept.bool()] for row, kept in zip(states, mask, strict=True)]
    assert_equal_states(encoder.encode(texts), rows)
    # of the empty prompt the pipeline keeps <bos>, whose state does not depend on what follows
    assert_equal_states(encoder.encode([""]), [unconditional[0][unconditional_mask[0].bool()]])


def test_llm_segments_are_encoded_on_their_own(folder):
    encoder = build(folder, segmenter="sentence", max_tokens=20, prefix="all")
    prompt = "A red fox. The sky is green and it is very large."
    conditioning = encoder.encode([prompt, "A fox."])
    report = conditioning.reports[0]
    assert report.truncated == "" and " ".join(report.segments) == prompt
    assert len(report.segments) == 3 and max(report.tokens) <= 20
    alone = build(folder)
    rows = [alone.encode([segment]).states[0] for segment in report.segments]
    before, after = len("<user\n"), len("<\n<assistant\n")  # of the chat template; < is a special token
    parts = [row[before : len(row) - after] for row in rows]
    assert_equal_states(conditioning[:1], [torch.cat([rows[0][:before], *parts, rows[-1][len(rows[-1]) - after :]])])
    torch.testing.assert_close(encoder.encode(["A fox."]).states, alone.encode(["A fox."]).states)


def test_llm_truncation_is_reported(folder):
    encoder = build(folder, max_tokens=6)
    with pytest.warns(TruncationWarning, match=r"1 of 2 prompts exceed 6 tokens.*max_tokens.*segmenter"):
        conditioning = encoder.encode(["A red fox.", "A fox."])
    assert conditioning.reports[0].segments == ("A red",) and conditioning.reports[0].truncated == "fox."
    assert conditioning.mask.all()  # both have the same length, with all tokens of the template
    with pytest.raises(ValueError, match="exceed 6 tokens"):
        build(folder, max_tokens=6, overflow="error").encode(["A red fox."])


def test_llm_special_tokens_in_a_prompt_are_text(folder):
    encoder = build(folder)
    text = "a <|im_end|> fox"
    states = encoder.encode([text]).states
    assert states.shape[1] == len("<user\n") + len(text) + len("<\n<assistant\n")


def test_llm_rejects_wrong_settings(folder, tmp_path):
    for settings, message in (
        ({"template": "no place"}, r"one \{\}"),
        ({"template": "{} and {}"}, r"got 2"),
        ({"template": "{}", "system": SYSTEM}, r"'system' requires"),
        ({"template": "a {}", **NO_THINKING}, r"'template_variables' requires"),
        ({"layer": []}, r"layer"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(folder, **settings)
    for settings, message in (
        ({"template": "{}"}, "no state of an empty prompt"),
        ({"max_tokens": 1024}, r"at most 10\d\d"),
        ({"layer": -4}, "2 layers"),
        ({"layer": [1, 3]}, r"layer 3 .*from -3 to 2"),
        ({"pad_to": 1025}, "at most 1024"),
        ({"template_variables": {"thinking": False}}, "no variable thinking"),
        ({"template_variables": {"messages": []}}, "no variable messages"),
    ):
        with pytest.raises(ValueError, match=message):
            build(folder, **settings)
    with pytest.raises(ValueError, match="no chat template; set template"):
        build(tiny_llm(tmp_path, "gemma2"))
