"""The small T5 encoder: taught by a linear head that reads a caption's facts from the mean state.

Run: ``python recipes/mini/t5.py [steps]``.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from common import WEIGHTS, fit, scene_and_caption
from facts import FactHead, TokenHead, labels_of_caption, tensor
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from longalign.mini.tokenizers import write_t5_tokenizer

STEPS, WORDS = int(sys.argv[1]) if len(sys.argv) > 1 else 3000, 1600
"""Steps, and words in a batch."""


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
    encoder, head, token_head = T5EncoderModel(config), FactHead(192), TokenHead(192)

    def batch(rng: np.random.Generator, words: int, size: int) -> tuple[list[str], Tensor]:
        captions = [scene_and_caption(rng, (1, 9), (words, words), 0.5)[1] for _ in range(size)]
        return [c.text for c in captions], tensor([labels_of_caption(c) for c in captions])

    def read(texts: list[str], labels: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        states, mask = encoder(**tokens).last_hidden_state, tokens.attention_mask[..., None]
        pooled = head((states * mask).sum(1) / mask.sum(1), labels)
        return pooled, token_head(states, tokens.attention_mask, labels)

    def loss_of(step: int, rng: np.random.Generator) -> dict[str, Tensor]:
        # one length a step: little padding; as many short captions as long ones are long
        words = round(8 * 20 ** rng.random())
        pooled, by_token = read(*batch(rng, words, WORDS // words))
        return {"loss": pooled[0] + by_token[0], "pooled_read": pooled[1], "tokens_read": by_token[1]}

    held_out = {words: batch(np.random.default_rng([5, words]), words, 100) for words in (15, 40, 80, 160)}

    def evaluate() -> dict[str, float]:
        out = {}
        for words, data in held_out.items():
            pooled, by_token = read(*data)
            out |= {f"held_pooled_{words}": pooled[1].item(), f"held_tokens_{words}": by_token[1].item()}
        return out

    fit("t5", nn.ModuleList([encoder, head, token_head]), loss_of, steps=STEPS, lr=2e-3, warmup=50, muon=8.0,
        outer=("shared", "relative", "1.linear", "queries", "ground", "place"),
        evaluate=evaluate, evaluate_every=200)  # fmt: skip
    encoder.half().save_pretrained(folder)


if __name__ == "__main__":
    main()
