"""A local vision-language model, with a tiny LLaVA."""

import pytest
import torch

from longalign.runtime import Runtime
from longalign.testing.tiny import VLM_WORDS, tiny_vlm
from longalign.vlm.base import HashedImage, Request
from longalign.vlm.config import LocalVLMConfig

YES, NO = VLM_WORDS.index("yes"), VLM_WORDS.index("no")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def vlm(folder):
    return LocalVLMConfig(checkpoint=str(folder), batch_size=4).build(Runtime())


def requests(options=("yes", "no"), images=1):
    pictures = [HashedImage.of(torch.rand(3, 40, 30 + i)) for i in range(4)]
    texts = ("is there a red", "a", "are there no is is is red")
    return [Request(text, (picture,) * images, options) for picture in pictures for text in texts]


def test_answer_is_the_more_probable_token(vlm):
    asked = requests()
    answers = dict(vlm.answers(asked))
    logits = torch.cat([vlm.next_token([request]) for request in asked])
    expected = ["yes" if row[YES] > row[NO] else "no" for row in logits]
    assert [answers[i] for i in range(len(asked))] == expected and set(expected) == {"yes", "no"}


def test_batch_of_different_lengths_equals_single_requests(vlm):
    asked = requests()[:4]
    singles = torch.cat([vlm.next_token([request]) for request in asked])
    torch.testing.assert_close(vlm.next_token(asked), singles, rtol=1e-4, atol=1e-4)


def test_two_images_in_a_request(vlm):
    assert {answer for _, answer in vlm.answers(requests(("1", "2", "tie"), images=2))} <= {"1", "2", "tie"}


def test_option_without_own_token_is_rejected(vlm):
    with pytest.raises(ValueError, match=r"\['left', 'right'\].* 'left' "):  # both unknown words
        vlm.option_tokens(["left", "right"])
    assert vlm.option_tokens(["yes", "no"]) == [[YES], [NO]]


def test_dtype_and_weights_are_part_of_the_identity(vlm, folder, tmp_path):
    half = LocalVLMConfig(checkpoint=str(folder), dtype="bfloat16").build(Runtime())
    other = LocalVLMConfig(checkpoint=str(tiny_vlm(tmp_path, seed=1))).build(Runtime())
    assert next(half.model.parameters()).dtype == torch.bfloat16 and len(dict(half.answers(requests()))) == 12
    assert len({vlm.identity, half.identity, other.identity}) == 3


def test_checkpoint_without_chat_template_is_rejected(folder, tmp_path):
    tiny_vlm(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="chat template"):
        LocalVLMConfig(checkpoint=str(tmp_path)).build(Runtime())
