"""Writes tokenizers of the bundled tiny models: CLIP's with a reduced vocabulary, and a T5 unigram tokenizer.

The reduced CLIP vocabulary keeps all bytes, the most frequent merges and every merge of the given words. These words
are split exactly as by the full tokenizer, and any other text can be tokenized too. Ids follow CLIP's order (bytes,
word-final bytes, merges by rank, ``<sot>``, ``<eot>``), so transformers and open_clip can use the same vocabulary.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from open_clip.tokenizer import SimpleTokenizer

NUM_COMMON_MERGES = 400
_SOT, _EOT = "<|startoftext|>", "<|endoftext|>"


def reduced_merges(words: Iterable[str], num_common: int = NUM_COMMON_MERGES) -> list[tuple[str, str]]:
    """Returns the byte-pair merges of a reduced CLIP vocabulary, ordered by their rank in CLIP's full vocabulary.

    Args:
        words: texts in which each word must get the same tokens as from CLIP's full tokenizer; all merges that occur in
            these words are kept.
        num_common: number of the most frequent merges, i.e. those of the lowest ranks, that are kept in any case.
    """
    full = SimpleTokenizer()
    ranks_used = set(sorted(full.bpe_ranks.values())[:num_common])
    for word in sorted({w for text in words for w in full.pat.findall(text.lower())}):
        symbols = [full.byte_encoder[b] for b in word.encode()]
        symbols[-1] += "</w>"
        while len(symbols) > 1:
            ranks = [full.bpe_ranks.get(pair, len(full.bpe_ranks)) for pair in pairwise(symbols)]
            best = min(ranks)
            if best == len(full.bpe_ranks):
                break
            ranks_used.add(best)
            i = ranks.index(best)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    by_rank = {rank: (pair[0], pair[1]) for pair, rank in full.bpe_ranks.items()}
    return [by_rank[rank] for rank in sorted(ranks_used)]


def write_clip_tokenizer(folder: Path, words: Sequence[str] | None = None, max_length: int = 77) -> Path:
    """Writes a transformers ``CLIPTokenizer`` with a reduced vocabulary (see `reduced_merges`) into ``folder``.

    Args:
        folder: output folder; created if missing.
        words: texts in which each word must get the same tokens as from CLIP's full tokenizer; None for the phrases of
            the synthetic captions.
        max_length: maximum number of tokens of a prompt for the text model, special tokens included.

    Returns:
        ``folder``.
    """
    from transformers import CLIPTokenizerFast  # pyright: ignore[reportAttributeAccessIssue]

    merges = reduced_merges(_default_words() if words is None else words)
    alphabet = list(SimpleTokenizer().byte_encoder.values())
    symbols = [*alphabet, *(a + "</w>" for a in alphabet), *(a + b for a, b in merges)]
    symbols += [_SOT, _EOT]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(f"{a} {b}" for a, b in merges) + "\n")
    ends = {"unk_token": _EOT, "bos_token": _SOT, "eos_token": _EOT, "pad_token": _EOT}
    _write_settings(folder, "CLIPTokenizer", max_length, ends)
    # constructors differ between versions of transformers, but all load these two files to the same tokenizer
    (folder / "tokenizer.json").unlink(missing_ok=True)
    CLIPTokenizerFast.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_open_clip_bpe(folder: Path, words: Sequence[str] | None = None) -> Path:
    """Writes the vocabulary of `write_clip_tokenizer` into ``folder``, in the format of open_clip's tokenizer.

    The arguments are as for `write_clip_tokenizer`. Returns the path of the new file ``bpe_simple_vocab.txt.gz``.
    """
    merges = reduced_merges(_default_words() if words is None else words)
    folder.mkdir(parents=True, exist_ok=True)
    # open_clip parses every line after the first as a merge, so the file must not end with a newline
    text = "#version: 0.2\n" + "\n".join(f"{a} {b}" for a, b in merges)
    path = folder / "bpe_simple_vocab.txt.gz"
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return path


def write_t5_tokenizer(folder: Path, texts: Sequence[str] | None = None, vocab_size: int = 600) -> Path:
    """Trains a unigram model and writes it as a transformers ``T5Tokenizer`` into ``folder``. Returns ``folder``.

    After the training, every word of the texts is added to the vocabulary, with its relative frequency as probability.
    With few texts, the training alone would omit the shortest and most frequent words.

    Args:
        folder: output folder; created if missing.
        texts: texts to train on; None for the phrases of the synthetic captions.
        vocab_size: number of pieces to train, before words and T5's 100 ``<extra_id>`` tokens are added.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    texts = _default_words() if texts is None else texts
    words: dict[str, Any] = {"replacement": "▁", "prepend_scheme": "always"}
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(**words)
    printable = [chr(c) for c in range(33, 127)]
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    trained.train_from_iterator(
        texts,
        trainers.UnigramTrainer(
            vocab_size=vocab_size, initial_alphabet=printable, show_progress=False, unk_token="<unk>",
            special_tokens=list(special.values()),
        ),
    )  # fmt: skip
    vocab = dict(json.loads(trained.to_str())["model"]["vocab"])
    counts = Counter(f"▁{word}" for text in texts for word in re.findall(r"[^\W_]+", text))
    vocab |= {word: math.log(count / counts.total()) for word, count in counts.items()}
    sentinels = [f"<extra_id_{i}>" for i in range(99, -1, -1)]
    tokenizer = Tokenizer(models.Unigram([*vocab.items(), *((name, 0.0) for name in sentinels)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**words)]
    )
    tokenizer.decoder = decoders.Metaspace(**words)
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    tokenizer.add_special_tokens([*special.values(), *sentinels])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_settings(folder, "T5Tokenizer", 512, special)
    return folder


def _write_settings(folder: Path, kind: str, max_length: int, special: dict[str, str]) -> None:
    settings = {"tokenizer_class": kind, "model_max_length": max_length, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _default_words() -> Sequence[str]:
    from longalign.mini.captions import all_phrases

    return all_phrases()
