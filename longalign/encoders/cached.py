"""Encoders that read precomputed text-model states from a store and apply adapters to them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longalign.caching.store import Store, key_of
from longalign.encoders.adapter import Adapter
from longalign.encoders.base import Conditioning, Encoder, PromptReport
from longalign.encoders.config import EncoderConfig
from longalign.runtime import Runtime
from longalign.segmenters import Prompt, check_prompts

#: config keys that do not affect the states
IGNORED_KEYS = ("max_batch_tokens",)


def prompt_key(prompt: Prompt) -> bytes:
    """Returns the store key of a prompt. A list of segments has a different key than its joined text."""
    return key_of(prompt if isinstance(prompt, str) else json.dumps(list(prompt)))


def settings(config: EncoderConfig) -> dict[str, Any]:
    """Returns the config entries that the frozen states of an encoder depend on."""
    return {
        key: value for key, value in config.frozen_config().model_dump(mode="json").items() if key not in IGNORED_KEYS
    }


def build_cached(config: EncoderConfig, stores: Iterator[Store], runtime: Runtime) -> Encoder:
    """Builds an encoder without text models. Trainable parameters have the same names as in the full encoder.

    Args:
        config: the encoder's config.
        stores: the stores of the encoders in `EncoderConfig.leaves`, in that order.
        runtime: device and dtype.
    """
    if inner := config.inner_encoders():
        return config.build(runtime, parts=[build_cached(part, stores, runtime) for part in inner])
    key, adapter = config.adapter_key, config.adapter_config()
    if key is None or adapter is None:
        return CachedEncoder(next(stores), None, device=runtime.device)
    return CachedEncoder(next(stores), adapter.build(runtime), device=runtime.device, key=key)


class CachedEncoder(Encoder):
    """Reads the states of prompts from a store and applies the adapter, if any.

    A batch has the same shape as from the full encoder. Without a mask all prompts have the same length; with a mask
    the batch has the length of the longest prompt.

    Args:
        store: store with the output of `entries`, including the entry of the empty prompt.
        adapter: trainable map from the states to the denoiser's width.
        device: device of the conditioning.
        key: attribute name of the adapter, which is part of the adapter's weight names in checkpoints.
    """

    def __init__(self, store: Store, adapter: Adapter | None, *, device: str, key: str = "adapter"):
        super().__init__()
        self.store, self.key, self.to_device = store, key, device
        self.add_module(key, adapter)
        empty = self._entry("")
        self.length = int(empty["length"])
        self.dim = empty["states"].shape[1] if adapter is None else adapter.out_dim

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        conditioning = collate_states([self._entry(prompt) for prompt in check_prompts(prompts)], self.length).to(
            self.to_device
        )
        adapter = getattr(self, self.key)
        return conditioning if adapter is None else adapter.adapt(conditioning)

    def report(self, prompts: Sequence[Prompt]) -> list[PromptReport]:
        raise ValueError(
            "truncation reports are not available with cached prompts; build the encoder from a config without cache"
        )

    def _entry(self, prompt: Prompt) -> dict[str, Tensor]:
        require_cached(self.store, prompt)
        return self.store[prompt_key(prompt)]


def require_cached(store: Store, prompt: Prompt) -> None:
    """Raises ValueError if the prompt is not in the store."""
    if prompt_key(prompt) not in store:
        raise ValueError(
            f"the prompt {str(prompt)[:60]!r} is not in the cache {store.folder}; "
            "run `longalign cache` again with this config"
        )


@torch.no_grad()
def entries(encoder: Encoder, prompts: Sequence[str], length: int | None) -> list[dict[str, Tensor]]:
    """Encodes prompts into store entries.

    Args:
        encoder: an encoder without trainable parameters.
        prompts: prompts to encode in one call.
        length: length of the encoded empty prompt; None when encoding the empty prompt itself.

    Returns:
        One dict per prompt:

        - ``states`` ``(k, d)``: states without trailing repeats of the last state.
        - ``length``: length to which the states are padded.
        - ``real``: number of unmasked states; only with a mask.
        - ``pooled`` ``(p,)``: pooled embedding; only if the encoder returns one.

    Raises:
        ValueError: if the conditioning is not static, or depends on other prompts in the batch.
    """
    conditioning = encoder.encode(prompts)
    if not conditioning.is_static:
        raise ValueError(
            "conditioning that depends on the timestep or combines several predictions cannot be cached; set "
            "cache.prompts to false"
        )
    rows = []
    for i in range(len(prompts)):
        states = conditioning.states[i]
        entry: dict[str, Tensor] = {}
        if conditioning.mask is not None:
            real = int(conditioning.mask[i].sum())
            if not bool(conditioning.mask[i, :real].all()):
                raise ValueError("only masks with padding at the end can be cached; set cache.prompts to false")
            padded_length = max(real, length or states.shape[0])
            states, entry["real"] = states[:real], torch.tensor([real])
        else:
            padded_length = len(states)
            if length not in (None, padded_length) and len(prompts) > 1:
                # the batch has grown to its longest prompt; encode separately for the length of each prompt
                return [entries(encoder, [prompt], length)[0] for prompt in prompts]
            differs = (states != states[-1]).any(1).nonzero()
            last = int(differs[-1]) + 1 if len(differs) else 0  # all states from here on are equal
            if length is not None and last == padded_length - 1:
                states = torch.cat([states, _padding_state(encoder, prompts[i], states)])
            else:
                states = states[: last + 1]
        entry |= {"states": states, "length": torch.tensor([padded_length])}
        if conditioning.pooled is not None:
            entry["pooled"] = conditioning.pooled[i]
        rows.append(entry)
    return rows


def _padding_state(encoder: Encoder, prompt: str, states: Tensor) -> Tensor:
    """Returns the state ``(1, d)`` with which a prompt's states ``(n, d)`` are padded in a longer batch.

    Returns an empty tensor ``(0, d)`` if a batch cannot be longer.
    """
    longer = f"{prompt} {prompt}"
    if any(report.truncated for report in encoder.report([longer])):
        return states[:0]
    batched = encoder.encode([prompt, longer]).states[0]
    unpadded, padding = batched.split([len(states), len(batched) - len(states)])
    if not len(padding):
        return padding
    equal_states = torch.allclose(unpadded, states, rtol=1e-3, atol=1e-4)
    if not equal_states or not torch.equal(padding, padding[:1].expand_as(padding)):
        raise ValueError(
            f"the states of {prompt[:60]!r} depend on other prompts in the batch and cannot be cached; set "
            "cache.prompts to false"
        )
    return padding[:1]


def collate_states(rows: Sequence[dict[str, Tensor]], min_length: int) -> Conditioning:
    """Collates store entries into a conditioning of at least ``min_length`` states."""
    length = max(min_length, *(int(entry["length"]) for entry in rows))
    masked = "real" in rows[0]
    padded = []
    for entry in rows:
        states = entry["states"]
        padding = states.new_zeros(1, states.shape[1]) if masked else states[-1:]
        padded.append(torch.cat([states[:length], padding.expand(max(0, length - len(states)), -1)]))
    conditioning = Conditioning(torch.stack(padded))
    if masked:
        real = torch.stack([entry["real"] for entry in rows])
        conditioning = replace(conditioning, mask=torch.arange(length) < real)
    if "pooled" in rows[0]:
        conditioning = replace(conditioning, pooled=torch.stack([entry["pooled"] for entry in rows]))
    return conditioning
