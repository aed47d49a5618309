"""Speed of encoding segments, against the plain method and against the real tokens alone.

Plain: all segments of a batch are padded to the longest, then the captions are merged one by one in a Python loop, as
the published code describes it. Real tokens alone: the same number of tokens in rows of one length, without padding.
All three run in sequence in each round, so that noise of the machine affects them equally. Medians are reported.
Also measured are the effects of duplicates, a cache and bfloat16, each by itself. The throughput is compared with that
of one large matrix product.

Run ``python benchmarks/encoding.py [--rounds 3] [--layers 12] [--width 768]``. It writes a table next to itself and
takes ten minutes on two cores with 0.13 TFLOP/s.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reward_step import non_default_options
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

from longalign.encoders.cached import CachedEncoder, entries, prompt_key
from longalign.encoders.clip.config import ClipSegmentConfig
from longalign.encoders.clip.segment import ClipSegmentEncoder
from longalign.evaluation.record import machine_text
from longalign.files.store import Store
from longalign.mini.tokenizers import write_clip_tokenizer
from longalign.segmenters.parts import Sentence

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORDS = "circle square red green the a top left right bottom large small stands near old house under two trees"


def text_config(layers: int, width: int, tokenizer: CLIPTokenizerFast) -> CLIPTextConfig:
    """Config of a CLIP text model."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def clip_segment(layers: int, width: int) -> ClipSegmentEncoder:
    """Builds the measured encoder with random weights."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = CLIPTokenizerFast.from_pretrained(write_clip_tokenizer(Path(folder), WORDS.split()))
    text_model = CLIPTextModel(text_config(layers, width, tokenizer)).to(DEVICE)
    return ClipSegmentEncoder.from_modules(ClipSegmentConfig(), text_model, tokenizer, Sentence())


def sentence(rng: np.random.Generator, low: int = 6, high: int = 40) -> str:
    """Samples a sentence of ``low`` to ``high`` words."""
    words = rng.choice(WORDS.split(), int(rng.integers(low, high + 1)))
    return " ".join(words).capitalize() + "."


def mixed(rng: np.random.Generator, count: int) -> list[str]:
    """Samples prompts of 3 to 12 sentences of 6 to 40 words."""
    return [" ".join(sentence(rng) for _ in range(int(rng.integers(3, 13)))) for _ in range(count)]


@torch.no_grad()
def plain(encoder: ClipSegmentEncoder, prompts: Sequence[str]) -> Tensor:
    """Reference: every segment padded to the batch's longest, merged prompt by prompt."""
    tokenizer = encoder.tokens.tokenizer
    plans = encoder.checked_plans(prompts)
    rows = [row for plan in plans for row in plan.rows]
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[tokenizer.eos_token_id] * (longest - len(row))] for row in rows]).to(DEVICE)
    chunk = max(1, encoder.max_batch_tokens // longest)
    states = torch.cat([encoder.text_model(input_ids=part).last_hidden_state for part in ids.split(chunk)])
    padding, merged, begin = encoder._pad_states(states), [], 0
    for plan in plans:
        spans = [states[begin + row, start:stop] for row, start, stop in plan.spans]
        begin += len(plan.rows)
        merged.append(torch.cat(spans))
    length = max(encoder.max_tokens, max(map(len, merged)))
    return torch.stack([torch.cat([m, padding.expand(length - len(m), -1)]) for m in merged])


@torch.no_grad()
def real_tokens(encoder: ClipSegmentEncoder, prompts: Sequence[str]) -> int:
    """Encodes the same number of tokens in rows of the mean length; returns the number of tokens."""
    rows = [row for plan in encoder.checked_plans(prompts) for row in plan.rows]
    tokens = sum(map(len, rows))
    length = round(tokens / len(rows))
    ids = torch.randint(0, 100, (round(tokens / length), length), device=DEVICE)
    for part in ids.split(max(1, encoder.max_batch_tokens // length)):
        encoder.text_model(input_ids=part)
    return tokens


def encode(encoder: ClipSegmentEncoder, prompts: Sequence[str]) -> Tensor:
    """The method of longalign."""
    return encoder.encode(prompts).states


METHODS: dict[str, Callable[[ClipSegmentEncoder, Sequence[str]], object]] = {
    "plain": plain,
    "longalign": encode,
    "real tokens alone": real_tokens,
}


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call, including the work on the device."""
    start = time.perf_counter()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(rounds: int, calls: Mapping[Any, Callable[[], object]]) -> dict[Any, float]:
    """Median seconds of each call. Every round runs each call once."""
    seconds: dict[Any, list[float]] = {key: [] for key in calls}
    for i in range(rounds):
        for key, call in calls.items():
            seconds[key].append(timed(call))
            print(f"round {i + 1}, {key}: {seconds[key][-1]:.2f} s", flush=True)
    return {key: statistics.median(values) for key, values in seconds.items()}


def compare(rounds: int, encoder: ClipSegmentEncoder, prompts: Sequence[str]) -> dict[str, float]:
    """Median seconds of each method for the prompts."""
    return medians(rounds, {name: partial(method, encoder, prompts) for name, method in METHODS.items()})


def matrix_speed(rounds: int, side: int = 4096) -> float:
    """Operations per second of a product of two square float32 matrices, as the reference speed of the machine."""
    a = torch.randn(side, side, device=DEVICE)
    timed(lambda: a @ a)
    return 2 * side**3 / statistics.median(timed(lambda: a @ a) for _ in range(rounds))


def operations_per_token(encoder: ClipSegmentEncoder, length: int) -> float:
    """Operations of the text model per token, in rows of ``length`` tokens."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder.text_model(input_ids=torch.zeros((1, length), dtype=torch.long, device=DEVICE))
    return counter.get_total_flops() / length


def cached_encoder(encoder: ClipSegmentEncoder, prompts: Sequence[str], folder: Path) -> CachedEncoder:
    """Writes the prompts' states to a store as ``longalign cache`` does; returns the encoder that reads them."""
    padded = ClipSegmentEncoder.from_modules(
        ClipSegmentConfig(max_tokens=512), encoder.text_model, encoder.tokens.tokenizer, Sentence()
    )
    store, length = Store(folder, {}, writable=True), 512
    for prompt in ["", *prompts]:
        (entry,) = entries(padded, [prompt], length if prompt else None)
        store.add(prompt_key(prompt), entry)
    store.flush()
    return CachedEncoder(Store(folder, {}), None, device=str(DEVICE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=12, help="layers of the text model (CLIP-L has 12)")
    parser.add_argument("--width", type=int, default=768, help="width of the text model (CLIP-L has 768)")
    parser.add_argument("--prompts", type=int, default=64, help="prompts in the mixed batch")
    parser.add_argument("--half-prompts", type=int, default=8, help="prompts that are also encoded in bfloat16")
    options = parser.parse_args()
    torch.manual_seed(0)
    encoder = clip_segment(options.layers, options.width)
    rng = np.random.default_rng(0)
    lines = ["# Encoding by segments", "", f"`python benchmarks/encoding.py{non_default_options(options, parser)}`", ""]
    size = f"{options.layers} layers of width {options.width}, float32"
    lines += [f"`clip-segment` with a CLIP text model of {size}; medians of {options.rounds} rounds.", ""]

    prompts = mixed(rng, options.prompts)
    difference = (plain(encoder, prompts) - encoder.encode(prompts).states).abs().max().item()
    seconds = compare(options.rounds, encoder, prompts)
    rows = [row for plan in encoder.checked_plans(prompts) for row in plan.rows]
    real = sum(map(len, rows)) / (len(rows) * max(map(len, rows)))
    lines += [
        f"A mixed batch of {len(prompts)} prompts of 3 to 12 sentences of 6 to 40 words ({len(rows)} segments; "
        f"{100 * real:.0f}% of the plain method's positions are real tokens):", "",
        "| method | seconds | relative to plain | relative to real tokens alone |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, value in seconds.items():
        relative = f"{value / seconds['plain']:.2f} | {value / seconds['real tokens alone']:.2f}"
        lines.append(f"| {name} | {value:.2f} | {relative} |")
    lines += ["", f"Largest difference of a state between plain and longalign: {difference:.1e}.", ""]

    total = operations_per_token(encoder, round(sum(map(len, rows)) / len(rows))) * sum(map(len, rows))
    peak, reached = matrix_speed(options.rounds), total / seconds["longalign"]
    lines += [
        f"The real tokens take {total / 1e12:.2f} TFLOP, so longalign runs at {reached / 1e12:.3g} TFLOP/s: "
        f"{100 * reached / peak:.0f}% of the {peak / 1e12:.3g} TFLOP/s of a product of two 4096 x 4096 matrices.", "",
    ]  # fmt: skip

    repeated = [*prompts[: len(prompts) // 4] * 4]
    seconds = compare(options.rounds, encoder, repeated)
    lines += [
        "Duplicates are encoded once: for a batch that contains every prompt four times, the plain method takes "
        f"{seconds['plain'] / seconds['longalign']:.1f} times as long ({seconds['plain']:.2f} s, "
        f"{seconds['longalign']:.2f} s).", "",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        reader = cached_encoder(encoder, prompts, Path(folder))
        read = statistics.median(timed(lambda: reader.encode(prompts)) for _ in range(options.rounds))
    lines += [f"From a cache (`longalign cache`) the mixed batch is read in {read:.2f} s, without encoding.", ""]

    subset = prompts[: options.half_prompts]
    full = statistics.median(timed(lambda: encoder.encode(subset)) for _ in range(options.rounds))
    encoder.text_model.bfloat16()
    half = statistics.median(timed(lambda: encoder.encode(subset)) for _ in range(options.rounds))
    encoder.text_model.float()
    lines += [f"{len(subset)} of the prompts take {half:.2f} s in bfloat16 and {full:.2f} s in float32.", ""]

    lines += ["| segments in a prompt | prompts/s, plain | prompts/s, longalign | ratio |", "|---|---|---|---|"]
    for segments in (1, 5, 20, 60):
        batch = [" ".join(sentence(rng) for _ in range(segments)) for _ in range(max(2, 60 // segments))]
        seconds = compare(options.rounds, encoder, batch)
        speed = {name: len(batch) / value for name, value in seconds.items()}
        ratio = speed["longalign"] / speed["plain"]
        lines.append(f"| {segments} | {speed['plain']:.2f} | {speed['longalign']:.2f} | {ratio:.2f} |")
    lines += ["", f"Machine: {machine_text()}."]
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
