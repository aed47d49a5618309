"""Encoders that read precomputed states of text models from a store and apply adapters to the states."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longalign.encoders.adapter import Adapter
from longalign.encoders.base import Conditioning, Encoder, PromptReport
from longalign.encoders.config import EncoderConfig
from longalign.files.store import Store, key_of
from longalign.runtime import Runtime
from longalign.segmenters import Prompt, check_prompts

#: config keys of encoders that do not affect the states
IGNORED_KEYS = ("max_batch_tokens",)


def prompt_key(prompt: Prompt) -> bytes:
    """Returns a prompt's 16-byte key in a `Store`. A list of segments has a different key than the joined text."""
    return key_of(prompt if isinstance(prompt, str) else json.dumps(list(prompt)))


def settings(config: EncoderConfig) -> dict[str, Any]:
    """Returns the entries of an encoder's config that affect the states of its frozen text models, as JSON values."""
    return {
        key: value for key, value in config.frozen_config().model_dump(mode="json").items() if key not in IGNORED_KEYS
    }


def build_cached(config: EncoderConfig, stores: Iterator[Store], runtime: Runtime) -> Encoder:
    """Builds an encoder that reads cached states instead of running text models.

    The trainable parameters have the same names as in the encoder with text models, so checkpoints fit both encoders.

    Args:
        config: config of the encoder that runs text models.
        stores: one store of cached states per encoder in `EncoderConfig.leaves`, in that order.
        runtime: device of the conditioning; device and dtype for building adapters.
    """
    if inner := config.inner_encoders():
        return config.build(runtime, parts=[build_cached(part, stores, runtime) for part in inner])
    key, adapter = config.adapter_key, config.adapter_config()
    if key is None or adapter is None:
        return CachedEncoder(next(stores), None, device=runtime.device)
    return CachedEncoder(next(stores), adapter.build(runtime), device=runtime.device, key=key)


class CachedEncoder(Encoder):
    """Reads the states of prompts from a store and applies the adapter, if any.

    The conditioning has the shape that the encoder with text models returns: the states are padded to the length of the
    encoded empty prompt or of the longest prompt in the batch, whichever is greater. `report` is not available.

    Args:
        store: store with the output of `entries`, including the entry of the empty prompt.
        adapter: trainable map from the stored states to the denoiser's width; None returns the stored states.
        device: torch device of the conditioning, e.g. ``"cuda"``.
        key: name of the attribute that holds the adapter. It is part of the adapter's weight names in checkpoints.

    Raises:
        ValueError: if the store does not contain the empty prompt. `encode` raises it if the store does not contain one
            of the prompts, and `report` always.
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
    """Encodes prompts into entries of a `Store`.

    Args:
        encoder: an encoder without trainable parameters.
        prompts: prompts to encode in one call.
        length: number of states of the encoded empty prompt; None when encoding the empty prompt itself.

    Returns:
        One dict of tensors per prompt. ``states`` ``(k, d)``: if the encoder returns a mask, the unmasked states. If it
        returns none, the states of the prompt and, if the prompt can be padded, one padding state; equal states at the
        end count as padding. ``length`` ``(1,)``: number of states with padding. ``real`` ``(1,)``: number of unmasked
        states; only with a mask. ``pooled`` ``(p,)``: pooled embedding; only if the encoder returns one.

    Raises:
        ValueError: if the conditioning is not static (see `Conditioning.is_static`), masks other positions than those
            after the prompt, or depends on other prompts in the batch.
    """
    conditioning = encoder.encode(prompts)
    if not conditioning.is_static:
        raise ValueError(
            f"expected a conditioning that can be cached, got a {type(conditioning).__name__}, which depends on the "
            "timestep or combines several predictions; set cache.prompts to false"
        )
    rows = []
    for i in range(len(prompts)):
        states = conditioning.states[i]
        entry: dict[str, Tensor] = {}
        if conditioning.mask is not None:
            real = int(conditioning.mask[i].sum())
            if not bool(conditioning.mask[i, :real].all()):
                raise ValueError(
                    f"expected a mask of padding at the end only, got masked states before unmasked ones for the "
                    f"prompt {prompts[i][:60]!r}, which cannot be cached; set cache.prompts to false"
                )
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
    """Returns the state ``(1, d)`` that pads a prompt's unpadded states ``(n, d)`` in a batch with a longer prompt.

    Returns an empty tensor ``(0, d)`` if no batch can be longer. Raises ValueError if the states depend on the batch.
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
    """Collates entries made by `entries` into a conditioning, one row per entry.

    The states are padded to the greatest ``length`` of the entries, but at least ``min_length``: with a mask and zeros
    if the entries have ``real``, otherwise by repeating the last state.
    """
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
