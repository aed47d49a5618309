import pytest
import torch

from longalign.conditioning import condition, truncation_messages
from longalign.encoders.base import Conditioning, Encoder, PromptReport


class WordEncoder(Encoder):
    """One state of width 2 per word, padded to the longest prompt; the third word and what follows is cut."""

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


def test_both_branches_have_one_length_and_the_pipelines_dtype():
    conditioning = condition(PlainPipe(), ["a b", "c"], encoder=WordEncoder())
    assert set(conditioning) == {"prompt_embeds", "negative_prompt_embeds"}
    assert conditioning["prompt_embeds"].shape == conditioning["negative_prompt_embeds"].shape == (2, 2, 2)
    assert conditioning["prompt_embeds"].dtype == torch.float16
    assert conditioning["prompt_embeds"][:, :, 0].tolist() == [[1, 1], [1, 0]]
    assert conditioning["negative_prompt_embeds"].abs().sum() == 0


def test_one_negative_prompt_serves_all():
    conditioning = condition(PlainPipe(), ["a b", "c"], "x", encoder=WordEncoder())
    assert conditioning["negative_prompt_embeds"][:, :, 0].tolist() == [[1, 0], [1, 0]]


def test_pooled_embeddings_go_where_they_are_taken():
    conditioning = condition(PooledPipe(), "a b", "c", encoder=WordEncoder(pooled=True))
    assert conditioning["pooled_prompt_embeds"].tolist() == [[2]] and conditioning[
        "negative_pooled_prompt_embeds"
    ].tolist() == [[1]]
    with pytest.raises(ValueError, match="PooledPipe needs pooled embeddings"):
        condition(PooledPipe(), "a b", encoder=WordEncoder())
    with pytest.warns(UserWarning, match="PlainPipe takes no pooled embeddings"):
        condition(PlainPipe(), "a b", encoder=WordEncoder(pooled=True))


def test_masks_go_where_they_are_taken():
    conditioning = condition(MaskedPipe(), ["a b", "c"], "d", encoder=WordEncoder(masked=True))
    assert conditioning["prompt_attention_mask"].tolist() == [[True, True], [True, False]]
    assert conditioning["negative_prompt"] is None
    with pytest.warns(UserWarning, match="PlainPipe takes no attention mask"):
        condition(PlainPipe(), ["a b", "c"], "d", encoder=WordEncoder(masked=True))
    condition(PlainPipe(), ["a b"], "c d", encoder=WordEncoder(masked=True))


def test_what_cannot_be_said_is_said():
    with pytest.warns(UserWarning, match=r"prompt 0: the encoder read 2 tokens and left out 2 words: 'c d'"):
        condition(PlainPipe(), "a b c d", encoder=WordEncoder())
    with pytest.warns(UserWarning, match="takes no negative prompt"):
        conditioning = condition(OneBranchPipe(), "a", "b", encoder=WordEncoder())
    assert set(conditioning) == {"prompt_embeds"}
    assert truncation_messages([PromptReport(("a",), (1,))]) == []


def test_wrong_widths_and_pipelines_without_embeddings_are_refused():
    class Config:
        cross_attention_dim = 768

    class Denoiser:
        config = Config()

    pipe = PlainPipe()
    pipe.unet = Denoiser()
    with pytest.raises(ValueError, match="states of width 768, this encoder's are 2 wide"):
        condition(pipe, "a", encoder=WordEncoder())

    class TextPipe(Pipe):
        def __call__(self, prompt): ...

    with pytest.raises(ValueError, match="TextPipe takes no 'prompt_embeds'"):
        condition(TextPipe(), "a", encoder=WordEncoder())


def test_a_conditioning_that_changes_with_the_timestep_is_refused():
    class Moving(Conditioning):
        def at(self, timestep):
            return self

    class MovingEncoder(WordEncoder):
        def encode(self, prompts):
            return Moving(super().encode(prompts).states)

    with pytest.raises(ValueError, match="cannot follow a conditioning that changes with the timestep"):
        condition(PlainPipe(), "a", encoder=MovingEncoder())
