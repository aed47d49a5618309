"""Share of the processor's peak that training steps reach, and where the rest of their time goes.

Steps of the synthetic scenes on one thread. Executed operations are counted by torch and divided by CPU seconds, the
smallest of several alternating rounds. The peak is that of a large matrix product in float32.

Run ``python benchmarks/efficiency.py [--rounds 3]``. It writes a table next to itself and takes half a minute.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from reward_step import table
from rollout import BATCH, cpu_seconds, text_in_every_call
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from longalign.compose import build_from_config
from longalign.config.changes import override
from longalign.config.run import load_config
from longalign.evaluation.record import machine_text
from longalign.loop.batches import load_batches, plan_batches
from longalign.runtime import Runtime, examples_folder


def peak() -> float:
    """Operations per second of a product of two float32 matrices of 1024 x 1024."""
    a = torch.rand(1024, 1024)
    return 2 * 1024**3 / cpu_seconds(10, {"product": lambda: a @ a})["product"]


@contextmanager
def plain_sampling(trainer: Any) -> Iterator[None]:
    """Keys and values of the text in every call, and a separate LoRA."""
    with text_in_every_call(trainer.backbone), patch.object(trainer.backbone, "merged_lora", nullcontext):
        yield


def make_step(name: str) -> tuple[Any, Callable[[], None]]:
    """The trainer of an example, and its step on one batch without the optimizer."""
    changes: dict[str, Any] = {"loop.batch_size": BATCH, **({"init_from": None} if name == "mini-reward" else {})}
    composition = build_from_config(override(load_config(examples_folder() / f"{name}.yaml"), changes), Runtime())
    trainer = composition.trainer.train()
    data = load_batches(composition.data, plan_batches(composition.data, BATCH, 0, 0, 0, 1), trainer.needs_images, 0)
    batch = next(data)

    def step() -> None:
        trainer.step(batch, torch.Tensor.backward)
        trainer.zero_grad()

    return trainer, step


ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
#: operators by what they compute; the rest is overhead
KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "addmm_", "baddbmm_"),
    "convolutions": ("mkldnn_convolution", "_slow_conv2d_forward", "convolution_backward", "_slow_conv2d_backward"),
    "attention": (ATTENTION, f"{ATTENTION}_backward"),
    "copies": ("copy_", "cat", "fill_", "index", "index_put_", "_index_put_impl_", "clone"),
    "normalization, activations, sums": (
        "native_group_norm", "native_layer_norm", "native_group_norm_backward", "native_layer_norm_backward", "silu",
        "silu_backward", "gelu", "gelu_backward", "add", "add_", "mul", "mul_", "div", "div_", "sum", "sub", "neg",
        "sigmoid", "upsample_nearest2d", "upsample_nearest2d_backward",
    ),
}  # fmt: skip


def efficiency(rounds: int) -> list[str]:
    """Share of the processor's peak that steps reach."""
    aten, fastest = torch.ops.aten, peak()
    attention: dict[Any, Any] = {
        getattr(aten, ATTENTION): lambda q, k, v, *_, **__: 4 * _products(q, k),
        getattr(aten, f"{ATTENTION}_backward"): lambda g, q, k, *_, **__: 10 * _products(q, k),
        aten.addmm_: lambda out, a, b, *_, **__: 2 * math.prod(a) * b[-1],
        aten.baddbmm_: lambda out, a, b, *_, **__: 2 * math.prod(a) * b[-1],
    }
    align, reward = make_step("mini-align"), make_step("mini-reward")

    def before() -> None:
        with plain_sampling(reward[0]):
            reward[1]()

    steps = {"align step": align[1], "reward step, plain sampling": before,
             "reward step": reward[1]}  # fmt: skip
    times, rows, counts = cpu_seconds(rounds, steps), [], {}
    for name, step in steps.items():
        with FlopCounterMode(display=False, custom_mapping=attention) as counter:
            step()
        counts[name] = {
            str(op).removeprefix("aten."): flops for op, flops in counter.get_flop_counts()["Global"].items()
        }
        total = sum(counts[name].values())
        speed = total / times[name]
        rows.append([name, f"{total / 1e9:.0f}", f"{times[name]:.2f}", f"{speed / 1e9:.0f}", f"{speed / fastest:.0%}"])
    lines = [
        f"Steps of the synthetic scenes with {BATCH} images on one thread, without the optimizer, against a float32 "
        f"matrix product of {fastest / 1e9:.0f} GFLOP/s. The second row is the reward step without two savings: keys "
        "and values of the text computed once, and a LoRA merged for sampling.", "",
        *table(["step", "GFLOP", "CPU seconds", "GFLOP/s", "share of the product"], rows),
        "CPU seconds by kind of operator, by torch's profiler, scaled to the seconds above:", "",
    ]  # fmt: skip
    cells: dict[str, list[str]] = {kind: [] for kind in [*KINDS, "the rest: Python, autograd, allocation"]}
    for name in ("align step", "reward step"):
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            steps[name]()
        events = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in recorded.key_averages()}
        total = sum(events.values())
        for kind in cells:
            own = sum(events.pop(op, 0.0) for op in KINDS[kind]) if kind in KINDS else sum(events.values())
            seconds = own / total * times[name]
            flops = sum(counts[name].get(op, 0) for op in KINDS.get(kind, ()))
            flops += counts[name].get("convolution", 0) if kind == "convolutions" else 0
            cells[kind] += [f"{seconds:.2f}", f"{own / total:.0%}", f"{flops / seconds / 1e9:.0f}" if flops else ""]
    head = [
        "kind",
        *(f"{name}: {column}" for name in ("align", "reward") for column in ("seconds", "share", "GFLOP/s")),
    ]
    return [*lines, *table(head, [[kind, *row] for kind, row in cells.items()])]


def _products(query: Sequence[int], key: Sequence[int]) -> int:
    """Multiplications of all queries with all keys."""
    return math.prod(query) * key[-2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"), help="file for the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["# Share of the peak", "", "`python benchmarks/efficiency.py`", "", *efficiency(options.rounds)]
    options.output.write_text("\n".join([*lines, f"Machine: {machine_text()}; one thread.", ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
