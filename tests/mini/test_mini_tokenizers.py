"""The reduced tokenizers split captions like the full ones and encode any text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from open_clip.tokenizer import SimpleTokenizer
from transformers import AutoTokenizer, CLIPTokenizerFast

from longalign.mini.captions import describe
from longalign.mini.scenes import sample_scene
from longalign.mini.tokenizers import write_clip_tokenizer, write_open_clip_bpe, write_t5_tokenizer

ODD = "Ünïcode 日本 3.14 — “quotes” & <b>tags</b> zyzzyva"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    write_clip_tokenizer(folder / "clip")
    write_open_clip_bpe(folder / "open_clip")
    return folder


def captions(count: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [describe(sample_scene(rng), rng, words=words).text for words in np.linspace(8, 400, count).astype(int)]


def test_reduced_clip_vocabulary_splits_captions_like_the_full_one(folder: Path):
    full, reduced = SimpleTokenizer(), SimpleTokenizer(str(folder / "open_clip" / "bpe_simple_vocab.txt.gz"))
    assert len(reduced.encoder) < 1500
    for text in captions(20):
        assert [reduced.decoder[i] for i in reduced.encode(text)] == [full.decoder[i] for i in full.encode(text)]


def test_transformers_and_open_clip_tokenizers_give_equal_ids(folder: Path):
    ours = CLIPTokenizerFast.from_pretrained(folder / "clip")
    theirs = SimpleTokenizer(str(folder / "open_clip" / "bpe_simple_vocab.txt.gz"))
    for text in [*captions(10), "A zyzzyva, 3.14 m long!"]:
        ids = ours(text, truncation=True, max_length=1000).input_ids
        assert ids == [theirs.sot_token_id, *theirs.encode(text), theirs.eot_token_id]
    assert ours.eos_token_id == len(ours) - 1


def test_clip_tokenizer_encodes_any_text(folder: Path):
    tokenizer = CLIPTokenizerFast.from_pretrained(folder / "clip")
    assert tokenizer.decode(tokenizer(ODD, add_special_tokens=False).input_ids).replace(" ", "") == (
        ODD.lower().replace(" ", "")
    )


def test_write_t5_tokenizer_round_trips_captions(tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(write_t5_tokenizer(tmp_path, captions(40), vocab_size=200))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    text = captions(3)[1]
    ids = tokenizer(text).input_ids
    assert ids[-1] == 1
    assert 2 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
