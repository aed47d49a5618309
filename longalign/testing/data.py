"""The conformance check of a data part."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import torch

from longalign.data.config import DataConfig
from longalign.data.stream import Stream
from longalign.registry import data as datasets
from longalign.runtime import Runtime
from longalign.testing.common import CPU, checked_config, config_checks, expect, run_checks


def check_data(config: Any, *, runtime: Runtime = CPU, count: int = 3) -> None:
    """Checks that data can be used by every trainer.

    It checks the config (see `longalign.testing.common.config_checks`), and the keys, shapes, dtypes and ranges of
    items. An item must be the same when it is read again, and its prompt must equal ``prompt(index)``. An index out of
    range must raise IndexError. It must be possible to pickle the data, for loading workers.

    Args:
        config: name, mapping or config of the data.
        runtime: device and processes.
        count: number of items to read, from the first.

    Raises:
        AssertionError: listing all failed checks.
    """
    checked = checked_config("data", config, DataConfig)
    data = datasets.construct(checked, runtime)
    stream = isinstance(data, Stream)

    def read() -> list[dict[str, Any]]:
        if stream:
            return list(itertools.islice(data.items(0), count))
        return [data[i] for i in range(min(count, len(data)))]

    def items_have_a_prompt_and_an_image() -> None:
        items = read()
        expect(bool(items), "the data has no items")
        for i, item in enumerate(items):
            expect(isinstance(item.get("prompt"), str), f"item {i} has no prompt; expected a string under 'prompt'")
            if not checked.has_images:
                continue
            image, shape = item.get("image"), "(2, 3, h, w)" if checked.has_pairs else "(3, h, w)"
            expect(isinstance(image, torch.Tensor), f"item {i} has no 'image'; expected a tensor {shape}")
            assert isinstance(image, torch.Tensor)
            expect(
                image.shape[:-2] == ((2, 3) if checked.has_pairs else (3,)),
                f"'image' of item {i}: expected {shape}, got {tuple(image.shape)}",
            )
            expect(image.dtype == torch.float32, f"'image' of item {i}: expected float32, got {image.dtype}")
            low, high = float(image.min()), float(image.max())
            expect(low >= 0 and high <= 1, f"'image' of item {i} is in [{low:g}, {high:g}]; expected [0, 1]")
            if checked.has_pairs:
                preference = item.get("preference")
                expect(
                    isinstance(preference, torch.Tensor) and preference.ndim == 0 and 0 <= float(preference) <= 1,
                    f"'preference' of item {i}: expected a tensor () in [0, 1], got {preference!r:.80}",
                )

    def items_repeat() -> None:
        for i, (first, again) in enumerate(zip(read(), read(), strict=True)):
            same = first.keys() == again.keys() and all(_same(first[key], again[key]) for key in first)
            expect(same, f"item {i} changes between reads; seed random choices with the index")

    def indices_are_checked() -> None:
        try:
            data[len(data)]
        except IndexError:
            return
        raise AssertionError("data[len(data)] raised nothing; raise IndexError if the index is out of range")

    def prompts_are_those_of_the_items() -> None:
        expect(
            all(data.prompt(i) == item["prompt"] for i, item in enumerate(read())),
            "prompt(i) differs from data[i]['prompt']",
        )

    def can_be_sent_to_workers() -> None:
        pickle.loads(pickle.dumps(data))

    checks = [
        *config_checks("data", checked),
        items_have_a_prompt_and_an_image,
        items_repeat,
        can_be_sent_to_workers,
    ]
    run_checks("data", config, checks if stream else [*checks, indices_are_checked, prompts_are_those_of_the_items])


def _same(first: Any, again: Any) -> bool:
    return torch.equal(first, again) if isinstance(first, torch.Tensor) else first == again
