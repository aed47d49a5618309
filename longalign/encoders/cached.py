"""Encoders whose frozen text model ran before: its states are read from a store, and adapters run on top."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from longalign.encoders.adapter import TextAdapter, adapt
from longalign.encoders.base import Conditioning, Encoder, PromptReport, check_prompts
from longalign.encoders.concat import ConcatEncoder
from longalign.encoders.configs import AdapterConfig, ConcatConfig
from longalign.registry import PartConfig
from longalign.runtime import Runtime
from longalign.segment import Prompt
from longalign.store import Store, key_of

#: keys of configs that change no state
IGNORED_KEYS = ("max_batch_tokens",)


def prompt_key(prompt: Prompt) -> bytes:
    """The key of a prompt's states; a prompt given as segments is another one than its text."""
    return key_of(prompt if isinstance(prompt, str) else json.dumps(list(prompt)))


def leaves(config: PartConfig) -> list[PartConfig]:
    """The encoders that each have a cache of their own: the parts of ``concat``, or the one there is."""
    if isinstance(config, ConcatConfig):
        return [leaf for part in config.parts for leaf in leaves(part)]
    return [config]


def adapter_key(config: PartConfig) -> str | None:
    """The key of an encoder's config that holds an adapter, whatever its name; None if there is no adapter.

    An encoder of a plugin can be cached if it applies the adapter as its last step, is built without it where the key
    is null, and keeps it as an attribute of the key's name.

    Raises:
        ValueError: if there are several.
    """
    keys = [key for key in type(config).model_fields if isinstance(getattr(config, key), AdapterConfig)]
    if len(keys) > 1:
        raise ValueError(
            f"'{config.name}' has adapters in {' and '.join(keys)}, and an encoder with one at most can be cached; set "
            "cache.prompts to false"
        )
    return keys[0] if keys else None


def frozen(config: PartConfig) -> PartConfig:
    """The config of what of an encoder training cannot change: the encoder without its adapter."""
    key = adapter_key(config)
    return config if key is None else config.model_copy(update={key: None})


def settings(config: PartConfig) -> dict[str, Any]:
    """The keys of an encoder's config that its frozen states depend on."""
    return {key: value for key, value in frozen(config).model_dump(mode="json").items() if key not in IGNORED_KEYS}


def build_cached(config: PartConfig, store: Callable[[PartConfig], Store], runtime: Runtime) -> Encoder:
    """The encoder of a config without its text models; what is trained of it has the names that it has with them.

    Args:
        config: of the encoder.
        store: gives the store of each of its `leaves`.
        runtime: where it is built.
    """
    if isinstance(config, ConcatConfig):
        return ConcatEncoder([build_cached(part, store, runtime) for part in config.parts])
    key = adapter_key(config)
    if key is None:
        return CachedEncoder(store(config), device=runtime.device)
    return CachedEncoder(store(config), TextAdapter.from_config(getattr(config, key), runtime), runtime.device, key)


class CachedEncoder(Encoder):
    """States of prompts from a store, through an adapter if there is one.

    A batch has the shape that the encoder itself would give it: a batch without a mask is of one length, and one with a
    mask is as long as its longest prompt.

    Args:
        store: entries as `entries` makes them; the empty prompt is among them.
        adapter: maps the states to the denoiser's width; its parameters are the trainable ones.
        device: where the conditioning is wanted.
        key: attribute of the adapter, by which its weights are named in checkpoints.
    """

    def __init__(self, store: Store, adapter: TextAdapter | None = None, device: str = "cpu", key: str = "adapter"):
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
        return conditioning if adapter is None else adapt(adapter, conditioning)

    def report(self, prompts: Sequence[Prompt]) -> list[PromptReport]:
        raise ValueError("a cache of prompts does not say what was cut; build the encoder from a config without cache")

    def _entry(self, prompt: Prompt) -> dict[str, Tensor]:
        require_cached(self.store, prompt)
        return self.store[prompt_key(prompt)]


def require_cached(store: Store, prompt: Prompt) -> None:
    """Raises ValueError for a prompt that is not in the store."""
    if prompt_key(prompt) not in store:
        raise ValueError(
            f"the prompt {str(prompt)[:60]!r} is not in the cache {store.folder}; "
            "run `longalign cache` again with this config"
        )


@torch.no_grad()
def entries(encoder: Encoder, prompts: Sequence[str], length: int | None) -> list[dict[str, Tensor]]:
    """What a store keeps of each prompt: ``states`` ``(k, d)`` up to where the last one only repeats, the ``length``
    that they are filled up to, the number of ``real`` ones where there is a mask, and ``pooled`` ``(p,)``.

    Args:
        encoder: without trainable parameters.
        prompts: to encode, in one call.
        length: of the encoded empty prompt; None if that is being asked.

    Raises:
        ValueError: if the states of a prompt depend on the timestep, or on the prompts that it is encoded with.
    """
    conditioning = encoder.encode(prompts)
    if type(conditioning).at is not Conditioning.at:
        raise ValueError("a conditioning that changes with the timestep cannot be cached; set cache.prompts to false")
    found = []
    for i in range(len(prompts)):
        states = conditioning.states[i]
        entry: dict[str, Tensor] = {}
        if conditioning.mask is not None:
            real = int(conditioning.mask[i].sum())
            if not bool(conditioning.mask[i, :real].all()):
                raise ValueError("only masks that end with the padding can be cached; set cache.prompts to false")
            own = max(real, length or states.shape[0])
            states, entry["real"] = states[:real], torch.tensor([real])
        else:
            own = len(states)
            if length not in (None, own) and len(prompts) > 1:
                # the batch has grown to its longest prompt; alone each has its own length
                return [entries(encoder, [prompt], length)[0] for prompt in prompts]
            differs = (states != states[-1]).any(1).nonzero()
            last = int(differs[-1]) + 1 if len(differs) else 0  # from here on the states are equal
            if length is not None and last == own - 1:
                states = torch.cat([states, _filling(encoder, prompts[i], states)])
            else:
                states = states[: last + 1]
        entry |= {"states": states, "length": torch.tensor([own])}
        if conditioning.pooled is not None:
            entry["pooled"] = conditioning.pooled[i]
        found.append(entry)
    return found


def _filling(encoder: Encoder, prompt: str, states: Tensor) -> Tensor:
    """What follows the states ``(n, d)`` of a prompt in a batch that is longer, ``(1, d)``, or nothing ``(0, d)`` where
    no batch is."""
    longer = f"{prompt} {prompt}"
    if any(report.truncated for report in encoder.report([longer])):
        return states[:0]
    beside = encoder.encode([prompt, longer]).states[0]
    own, after = beside.split([len(states), len(beside) - len(states)])
    if not len(after):
        return after
    if not torch.allclose(own, states, rtol=1e-3, atol=1e-4) or not torch.equal(after, after[:1].expand_as(after)):
        raise ValueError(
            f"the states of {prompt[:60]!r} depend on the prompts that it is encoded with, so they cannot be cached; "
            "set cache.prompts to false"
        )
    return after[:1]


def collate_states(found: Sequence[dict[str, Tensor]], least: int) -> Conditioning:
    """A conditioning of the entries, at least ``least`` states long."""
    length = max(least, *(int(entry["length"]) for entry in found))
    masked = "real" in found[0]
    rows = []
    for entry in found:
        states = entry["states"]
        filling = states.new_zeros(1, states.shape[1]) if masked else states[-1:]
        rows.append(torch.cat([states[:length], filling.expand(max(0, length - len(states)), -1)]))
    conditioning = Conditioning(torch.stack(rows))
    if masked:
        real = torch.stack([entry["real"] for entry in found])
        conditioning = replace(conditioning, mask=torch.arange(length) < real)
    return (
        replace(conditioning, pooled=torch.stack([e["pooled"] for e in found]))
        if "pooled" in found[0]
        else conditioning
    )
