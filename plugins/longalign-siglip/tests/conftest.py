"""Tiny random models of SigLIP and SigLIP 2 in the published layouts; no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import json

import pytest

WORDS = ["a", "red", "fox", "sleeps", "on", "wall", "the", "sky", "is", "green"]


def write_tokenizer(folder, lower):
    """A substitute for the published tokenizer: words, ``</s>`` at the end and as padding."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    punctuation = normalizers.Replace(Regex(r"[^\w\s]"), "")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), punctuation] if lower else [punctuation])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="<unk>", model_max_length=64
    ).save_pretrained(folder)
    return len(vocabulary)


def write_character_tokenizer(folder):
    """A substitute for Gemma's tokenizer, a BPE with upper case: characters, ``</s>`` at the end and as padding."""
    from tokenizers import Tokenizer, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", "▁", ".", *map(chr, range(97, 123))])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {
        "eos_token": "</s>",
        "pad_token": "</s>",
        "unk_token": "<unk>",
        "bos_token": "</s>",
        "mask_token": "</s>",
    }
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special).save_pretrained(folder)
    return len(vocabulary)


TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**TOWER, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1}


def write_siglip(folder, lower, **settings):
    import torch
    from transformers import SiglipConfig, SiglipModel

    text = {**TEXT, "vocab_size": write_tokenizer(folder, lower)}
    torch.manual_seed(0)
    config = SiglipConfig(text_config=text, vision_config={**TOWER, "image_size": 32, "patch_size": 16})
    SiglipModel(config).save_pretrained(folder)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}, **settings}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder with a ``SiglipModel``, a tokenizer that makes texts lower case, and image settings."""
    return write_siglip(tmp_path_factory.mktemp("siglip"), lower=True)


@pytest.fixture(scope="session")
def fixed_siglip2(tmp_path_factory):
    """A SigLIP 2 of fixed resolution: a ``SiglipModel`` whose tokenizer keeps upper case; bilinear resizing."""
    return write_siglip(tmp_path_factory.mktemp("siglip2"), lower=False, resample=2)


@pytest.fixture(scope="session")
def naflex(tmp_path_factory):
    """A SigLIP 2 of flexible resolution: a ``Siglip2Model`` with at most 12 patches of 8 px."""
    import torch
    from transformers import Siglip2Config, Siglip2ImageProcessor, Siglip2Model

    folder = tmp_path_factory.mktemp("naflex")
    text = {**TEXT, "vocab_size": write_character_tokenizer(folder)}
    torch.manual_seed(0)
    config = Siglip2Config(text_config=text, vision_config={**TOWER, "num_patches": 16, "patch_size": 8})
    Siglip2Model(config).save_pretrained(folder)
    Siglip2ImageProcessor(patch_size=8, max_num_patches=12).save_pretrained(folder)
    return str(folder)
