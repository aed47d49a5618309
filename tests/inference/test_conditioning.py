import pytest
import torch

from longalign.encoders.base import Conditioning, Encoder, PromptReport
from longalign.inference.diffusers import condition, truncation_messages


class WordEncoder(Encoder):
    """One state of width 2 per word, padded to the longest prompt and truncated after two words."""

    dim = 2

    def __init__(self, masked=False, pooled=False):
        super().__init__()
        self.masked, self.pooled = masked, pooled

    def encode(self, prompts):
        counts = [min(len(p.split()), 2) for p in prompts]
        states = torch.zeros(len(prompts), max(counts), 2)
        mask = torch.zeros(len(prompts), max(counts), dtype=torch.bool)
        for i, n in enumerate(counts):
            states[i, :n] = 1.0
            mask[i, :n] = True
        reports = tuple(PromptReport((p,), (n,), " ".join(p.split()[2:])) for p, n in zip(prompts, counts, strict=True))
        pooled = torch.tensor(counts).float()[:, None] if self.pooled else None
        return Conditioning(states, mask if self.masked else None, pooled, reports)


class Pipe:
    device = torch.device("cpu")
    dtype = torch.float16


class PlainPipe(Pipe):
    def __call__(self, prompt=None, negative_prompt=None, prompt_embeds=None, negative_prompt_embeds=None): ...


class PooledPipe(Pipe):
    def __call__(
        self, prompt=None, negative_prompt=None, prompt_embeds=None, negative_prompt_embeds=None,
        pooled_prompt_embeds=None, negative_pooled_prompt_embeds=None,
    ): ...  # fmt: skip


class MaskedPipe(Pipe):
    def __call__(
        self, prompt=None, negative_prompt="", prompt_embeds=None, negative_prompt_embeds=None,
        prompt_attention_mask=None, negative_prompt_attention_mask=None,
    ): ...  # fmt: skip


class OneBranchPipe(Pipe):
    def __call__(self, prompt=None, prompt_embeds=None): ...


def test_condition_branches_have_equal_length_and_pipeline_dtype():
    conditioning = condition(PlainPipe(), ["a b", "c"], encoder=WordEncoder())
    assert set(conditioning) == {"prompt_embeds", "negative_prompt_embeds"}
    assert conditioning["prompt_embeds"].shape == conditioning["negative_prompt_embeds"].shape == (2, 2, 2)
    assert conditioning["prompt_embeds"].dtype == torch.float16
    assert conditioning["prompt_embeds"][:, :, 0].tolist() == [[1, 1], [1, 0]]
    assert conditioning["negative_prompt_embeds"].abs().sum() == 0


def test_condition_repeats_single_negative_prompt():
    conditioning = condition(PlainPipe(), ["a b", "c"], "x", encoder=WordEncoder())
    assert conditioning["negative_prompt_embeds"][:, :, 0].tolist() == [[1, 0], [1, 0]]


def test_condition_passes_pooled_embeddings_if_accepted():
    conditioning = condition(PooledPipe(), "a b", "c", encoder=WordEncoder(pooled=True))
    assert conditioning["pooled_prompt_embeds"].tolist() == [[2]] and conditioning[
        "negative_pooled_prompt_embeds"
    ].tolist() == [[1]]
    with pytest.raises(ValueError, match=r"PooledPipe .*'pooled_prompt_embeds'"):
        condition(PooledPipe(), "a b", encoder=WordEncoder())
    with pytest.warns(UserWarning, match="PlainPipe .*'pooled_prompt_embeds'"):
        condition(PlainPipe(), "a b", encoder=WordEncoder(pooled=True))


def test_condition_passes_masks_if_accepted():
    conditioning = condition(MaskedPipe(), ["a b", "c"], "d", encoder=WordEncoder(masked=True))
    assert conditioning["prompt_attention_mask"].tolist() == [[True, True], [True, False]]
    assert conditioning["negative_prompt"] is None
    with pytest.warns(UserWarning, match="PlainPipe .*attention mask"):
        condition(PlainPipe(), ["a b", "c"], "d", encoder=WordEncoder(masked=True))
    condition(PlainPipe(), ["a b"], "c d", encoder=WordEncoder(masked=True))


def test_condition_warns_about_truncation_and_negative_prompt():
    with pytest.warns(UserWarning, match=r"prompt 0: .*\b2 tokens.*\b2 words.*'c d'"):
        condition(PlainPipe(), "a b c d", encoder=WordEncoder())
    with pytest.warns(UserWarning, match="OneBranchPipe .*'negative_prompt_embeds'"):
        conditioning = condition(OneBranchPipe(), "a", "b", encoder=WordEncoder())
    assert set(conditioning) == {"prompt_embeds"}
    assert truncation_messages([PromptReport(("a",), (1,))]) == []


def test_condition_rejects_wrong_width_and_pipeline_without_embeds():
    class Config:
        cross_attention_dim = 768

    class Denoiser:
        config = Config()

    pipe = PlainPipe()
    pipe.unet = Denoiser()
    with pytest.raises(ValueError, match=r"PlainPipe .*width 768\b.*got 2\b"):
        condition(pipe, "a", encoder=WordEncoder())

    class TextPipe(Pipe):
        def __call__(self, prompt): ...

    with pytest.raises(ValueError, match=r"'prompt_embeds'.*TextPipe"):
        condition(TextPipe(), "a", encoder=WordEncoder())


def test_condition_rejects_timestep_dependent_conditioning():
    class TimestepConditioning(Conditioning):
        def at(self, timestep):
            return self

    class TimestepEncoder(WordEncoder):
        def encode(self, prompts):
            return TimestepConditioning(super().encode(prompts).states)

    with pytest.raises(ValueError, match=r"PlainPipe .*timestep"):
        condition(PlainPipe(), "a", encoder=TimestepEncoder())
