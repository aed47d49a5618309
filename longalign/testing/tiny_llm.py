"""Builders of tiny random checkpoints of models with a language model as text encoder; see `longalign.testing.tiny`."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from longalign.testing.tiny import noisy, once

__all__ = ["tiny_llm"]

WIDTH = 16
"""Width of the hidden states."""
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Chat template in the format ChatML."""
GEMMA_WORDS = ("paint", "this:", "a", "red", "fox.", "fox", "the", "sky", "is", "green.", "wall.")


@once
def tiny_llm(folder: Path, kind: Literal["qwen3", "qwen2.5-vl", "gemma2"] = "qwen3") -> Path:
    """Writes a language model 16 wide and its tokenizer in diffusers layout: ``text_encoder/``, ``tokenizer/``.

    The tokens of the two Qwens are bytes, and their chat template is ChatML. Those of Gemma are words with the space
    before them, after ``<bos>``.
    """
    import transformers

    tokenizer = _word_tokenizer() if kind == "gemma2" else _byte_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    torch.manual_seed(7)
    if kind == "qwen3":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings))
    elif kind == "gemma2":
        model = transformers.Gemma2Model(transformers.Gemma2Config(**settings, query_pre_attn_scalar=8))
    else:
        del settings["head_dim"]
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        vision = {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": WIDTH, "depth": 1, "num_heads": 2}
        config = transformers.Qwen2_5_VLConfig(
            text_config={**settings, "rope_parameters": rope, "rope_scaling": rope}, vision_config=vision
        )
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    noisy(model).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def _byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokens = Tokenizer(models.BPE(vocabulary, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<|endoftext|>", eos_token="<|im_end|>", chat_template=CHAT,
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip


def _word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ("<pad>", "<eos>", "<bos>", "<unk>")
    words = [*special, "▁", *(space + word for word in GEMMA_WORDS for space in ("▁", ""))]
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    tokens.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A <bos> $B", [("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>",
        padding_side="right",
    )  # fmt: skip
