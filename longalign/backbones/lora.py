"""LoRA on a diffusers network: where it goes, how it is added, read, merged and joined."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig as PeftConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import dropout

from longalign.backbones.configs import LoraConfig

ANCESTORS = (Attention, ResnetBlock2D, GEGLU)


@dataclass(frozen=True)
class LoraWeights:
    """One LoRA: its name, its config, and its weights ``<module>.lora_A.weight`` (down), ``<module>.lora_B.weight``."""

    name: str
    config: LoraConfig
    state: Mapping[str, Tensor]


def lora_targets(denoiser: nn.Module) -> list[str]:
    """Names of every Linear and Conv2d inside ResnetBlock2D, Attention and GEGLU, each once, in the order in which
    those ancestors are walked: 224 of them in Stable Diffusion 1.5."""
    found: dict[str, None] = {}
    for ancestor, module in denoiser.named_modules():
        if isinstance(module, ANCESTORS):
            for name, child in module.named_modules():
                if isinstance(child, (nn.Linear, nn.Conv2d)):
                    found[f"{ancestor}.{name}"] = None
    return list(found)


def lora_layers(denoiser: nn.Module, name: str) -> list[tuple[str, Any]]:
    """The layers that carry the LoRA ``name``, with the names of the modules that they stand for."""
    return [(key, m) for key, m in denoiser.named_modules() if isinstance(m, LoraLayer) and name in m.lora_A]


def inject_lora(denoiser: Any, config: LoraConfig, name: str) -> list[nn.Parameter]:
    """Adds a LoRA by diffusers' adapter API; returns its parameters, float32, down and up in turn."""
    targets = lora_targets(denoiser)
    if not targets:
        raise ValueError(
            f"{type(denoiser).__name__} has no Linear or Conv2d inside ResnetBlock2D, Attention or GEGLU; expected a "
            "diffusers UNet, or train all weights (lora: null)"
        )
    after_up = config.dropout_placement == "up"
    denoiser.add_adapter(
        PeftConfig(
            r=config.rank,
            lora_alpha=config.rank * config.scale,  # pyright: ignore[reportArgumentType]
            lora_dropout=0.0 if after_up else config.dropout,
            target_modules=targets,
            init_lora_weights="gaussian",
        ),
        adapter_name=name,
    )
    parameters = []
    for _, layer in lora_layers(denoiser, name):
        for projection in (layer.lora_A[name], layer.lora_B[name]):
            projection.weight.data = projection.weight.data.float()
            projection.requires_grad_(True)
            parameters.append(projection.weight)
        if after_up and config.dropout:
            layer.lora_B[name].register_forward_hook(
                lambda module, _, output: dropout(output, config.dropout, module.training)
            )
    return parameters


def read_lora(denoiser: nn.Module, name: str) -> dict[str, Tensor]:
    """The weights of the LoRA ``name``, detached, under the names of the modules that they belong to."""
    state = {}
    for key, layer in lora_layers(denoiser, name):
        state[f"{key}.lora_A.weight"] = layer.lora_A[name].weight.detach()
        state[f"{key}.lora_B.weight"] = layer.lora_B[name].weight.detach()
    return state


@torch.no_grad()
def write_lora(denoiser: nn.Module, name: str, state: Mapping[str, Tensor]) -> None:
    """Copies weights into the LoRA ``name``.

    Raises:
        ValueError: if the names or shapes are not those of this network's LoRA.
    """
    present = read_lora(denoiser, name)
    check_same_names(f"LoRA '{name}'", present, state)
    for key, tensor in present.items():
        tensor.copy_(state[key])


def check_same_names(what: str, expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    """Refuses weights whose names or shapes differ, naming the first one."""
    missing, unknown = [k for k in expected if k not in got], [k for k in got if k not in expected]
    if missing or unknown:
        first = f"'{missing[0]}' is missing" if missing else f"'{unknown[0]}' is unknown"
        raise ValueError(
            f"the weights of {what} do not fit: {first} ({len(missing)} missing, {len(unknown)} unknown); "
            "was the checkpoint made with another base model?"
        )
    for key, tensor in expected.items():
        if tensor.shape != got[key].shape:
            raise ValueError(
                f"the weights of {what} do not fit: '{key}' should have shape {tuple(tensor.shape)}, "
                f"got {tuple(got[key].shape)}; was the checkpoint made with another base model or rank?"
            )


@torch.no_grad()
def merge_into_base(denoiser: Any, name: str) -> None:
    """Adds the LoRA ``name`` to the weights that it belongs to and takes its layers out of the network.

    Weights in half precision are rounded up or down at random, so that the sum is right in the mean: most of a LoRA is
    smaller than their spacing, and rounding to the nearest would leave the old weights.
    """
    generator = torch.Generator().manual_seed(0)
    for key, layer in lora_layers(denoiser, name):
        weight, change = layer.get_base_layer().weight, layer.get_delta_weight(name)
        if weight.dtype in (torch.float16, torch.bfloat16):
            weight.copy_(stochastic_round(weight.float() + change.float(), weight.dtype, generator))
        else:
            weight.add_(change)
        parent, _, child = key.rpartition(".")
        setattr(denoiser.get_submodule(parent), child, layer.get_base_layer())
    # diffusers remembers adapters beside the layers; forgetting them lets the next one start clean.
    del denoiser.peft_config
    denoiser._hf_peft_config_loaded = False
    denoiser.requires_grad_(False)


def stochastic_round(exact: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Float32 numbers in half precision, each rounded up with the probability of how far it is on the way up."""
    limits = torch.finfo(dtype)
    spacing = torch.ldexp(torch.full_like(exact, limits.eps), torch.frexp(exact).exponent - 1)
    spacing = spacing.clamp(min=limits.smallest_normal * limits.eps)
    draw = torch.rand(exact.shape, generator=generator).to(exact.device)
    return (torch.floor(exact / spacing + draw) * spacing).to(dtype)


@contextmanager
def without_lora(denoiser: nn.Module, name: str) -> Iterator[None]:
    """Inside, the network answers as if the LoRA ``name`` were not there."""
    layers = [layer for _, layer in lora_layers(denoiser, name)]
    scales = [layer.scaling[name] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[name] = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[name] = scale


def concat_loras(loras: Sequence[LoraWeights]) -> dict[str, Tensor]:
    """One LoRA equal to the sum of several, their scales folded into ``up``.

    ``B1 A1 + B2 A2 = [B1 B2] [A1; A2]``, so the ranks add up and nothing is lost, for convolutions too.
    """
    joined: dict[str, Tensor] = {}
    modules = dict.fromkeys(key.rsplit(".lora_", 1)[0] for stack in loras for key in stack.state)
    for module in modules:
        holders = [s for s in loras if f"{module}.lora_A.weight" in s.state]
        downs = [s.state[f"{module}.lora_A.weight"] for s in holders]
        ups = [s.state[f"{module}.lora_B.weight"] * s.config.scale for s in holders]
        joined[f"{module}.lora_A.weight"] = torch.cat(downs, dim=0).contiguous()
        joined[f"{module}.lora_B.weight"] = torch.cat(ups, dim=1).contiguous()
    return joined


def peft_settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What peft's ``LoraConfig`` needs to know of a LoRA of scale 1, in values that JSON can hold."""
    ranks = {key.rsplit(".lora_", 1)[0]: len(down) for key, down in state.items() if ".lora_A." in key}
    usual = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != usual}
    return {
        "r": usual,
        "lora_alpha": usual,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "rank_pattern": others,
        "alpha_pattern": others,
    }
