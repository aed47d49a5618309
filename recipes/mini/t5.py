"""The `mini` T5 encoder, trained with heads that predict a caption's facts from the mean state and the token states.

A third head predicts the facts of each token's own sentence and their place. Without it, training rarely learns to
combine tokens within a sentence. Run: ``python recipes/mini/t5.py [steps]``.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from itertools import accumulate

import numpy as np
import torch
from common import WEIGHTS, scene_and_caption, train
from facts import IGNORED, SIZES, FactHead, TokenHead, label_tensor, labels_of_caption
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from longalign.mini.captions import Caption
from longalign.mini.tokenizers import write_t5_tokenizer

STEPS, WORDS = int(sys.argv[1]) if len(sys.argv) > 1 else 2000, 800
"""Training steps, and words per batch."""


def labels_of_tokens(captions: list[Caption], offsets: Tensor) -> Tensor:
    """Labels ``(b, n, slots)`` of each token's sentence, for tokens with character ``offsets`` ``(b, n, 2)``.

    All slots of special tokens and padding are `IGNORED`.
    """
    rows, index = [[IGNORED] * len(SIZES)], torch.zeros(offsets.shape[:2], dtype=torch.long)
    for i, caption in enumerate(captions):
        starts = [0, *accumulate(len(sentence.text) + 1 for sentence in caption.sentences)]
        for j, (start, end) in enumerate(offsets[i].tolist()):
            if end > start:
                index[i, j] = len(rows) + bisect_right(starts, end - 1) - 1
        rows += [labels_of_caption(Caption((sentence,))) for sentence in caption.sentences]
    return label_tensor(rows)[index]


class Scaled(nn.Module):
    """Parametrization that learns ``weight / factor``, which scales the weight's learning rate by ``factor``."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return self.factor * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / self.factor


def prepare(encoder: T5EncoderModel) -> list[nn.Module]:
    """Initializes T5 for fast training; returns the modules with parametrized weights, to undo after training.

    T5 does not scale attention by 1 / sqrt(d), so the queries get a learning rate lower by this factor; otherwise the
    softmax soon saturates. The relative position bias starts from slopes of several widths (like ALiBi, Press et al.,
    2022) and gets a higher learning rate.
    """
    config, stack = encoder.config, encoder.encoder
    bias = stack.block[0].layer[0].SelfAttention.relative_attention_bias
    # distances of the buckets in each direction: the first half exact, then logarithmic up to max_distance
    half = config.relative_attention_num_buckets // 2
    single = half // 2
    ratio = config.relative_attention_max_distance / single
    distance = torch.tensor([i if i < single else single * ratio ** (i / single - 1) for i in range(half)])
    slopes = 0.5 ** torch.arange(1, config.num_heads + 1)
    with torch.no_grad():
        bias.weight.copy_(-torch.cat([distance, distance])[:, None] * slopes)
        encoder.shared.weight.mul_(0.2)
    queries = [block.layer[0].SelfAttention.q for block in stack.block]
    for module, factor in [(bias, 10.0), *((query, config.d_kv**-0.5) for query in queries)]:
        parametrize.register_parametrization(module, "weight", Scaled(factor))
    return [bias, *queries]


def main() -> None:
    torch.manual_seed(0)
    folder = WEIGHTS / "t5"
    rng = np.random.default_rng(3)
    corpus = [scene_and_caption(rng, (1, 9), (8, 300), 0.5)[1].text for _ in range(2000)]
    tokenizer = T5Tokenizer.from_pretrained(write_t5_tokenizer(folder, corpus))
    config = T5Config(
        vocab_size=len(tokenizer), d_model=192, d_kv=32, d_ff=384, num_layers=3, num_heads=6, dropout_rate=0.0,
        feed_forward_proj="relu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    encoder = T5EncoderModel._from_config(config, attn_implementation="eager")
    head, token_head, sentence_head = FactHead(192), TokenHead(192), FactHead(192)

    parametrized = prepare(encoder)

    def batch(rng: np.random.Generator, words: int, size: int) -> list[Caption]:
        return [scene_and_caption(rng, (1, 9), (words, words), 0.5)[1] for _ in range(size)]

    def predict(captions: list[Caption]) -> dict[str, tuple[Tensor, Tensor]]:
        tokens = tokenizer([c.text for c in captions], padding=True, return_offsets_mapping=True, return_tensors="pt")
        token_labels = labels_of_tokens(captions, tokens.pop("offset_mapping"))
        states, mask = encoder(**tokens).last_hidden_state, tokens.attention_mask[..., None]
        labels = label_tensor([labels_of_caption(c) for c in captions])
        return {
            "pooled": head((states * mask).sum(1) / mask.sum(1), labels),
            "tokens": token_head(states, tokens.attention_mask, labels),
            "sentence": sentence_head(states.flatten(0, 1), token_labels.flatten(0, 1)),
        }

    def compute_loss(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        # captions of one length per step, for little padding; a constant number of words per batch
        words = round(8 * 20 ** rng.random())
        results = predict(batch(rng, words, WORDS // words))
        loss = torch.stack([loss for loss, _ in results.values()]).sum()
        return {"loss": loss, **{f"{name}_read": accuracy for name, (_, accuracy) in results.items()}}

    held_out = {words: batch(np.random.default_rng([5, words]), words, 100) for words in (15, 40, 80, 160)}

    def evaluate() -> dict[str, float]:
        out = {}
        for words, data in held_out.items():
            results = predict(data)
            out |= {f"held_{name}_{words}": results[name][1].item() for name in ("pooled", "tokens")}
        return out

    parts = nn.ModuleList([encoder, head, token_head, sentence_head])
    train("t5", parts, compute_loss, steps=STEPS, lr=2e-3, warmup=50, muon=8.0,
        outer=("shared", "relative", "1.linear", "3.linear", "queries", "ground", "place"),
        evaluate=evaluate, evaluate_every=200)  # fmt: skip
    for module in parametrized:
        parametrize.remove_parametrizations(module, "weight")
    encoder.half().save_pretrained(folder)


if __name__ == "__main__":
    main()
