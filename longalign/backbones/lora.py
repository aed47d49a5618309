"""LoRA on a diffusers network: target modules, adding, reading, merging and concatenation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import attention
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig as PeftConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from longalign.backbones.config import LoraConfig
from longalign.backbones.lora_layers import fuse_forward

# newer diffusers has attention classes of single models, such as FLUX's, with a common base class
ANCESTORS = (Attention, getattr(attention, "AttentionModuleMixin", Attention), ResnetBlock2D, GEGLU)
LAYERS = (nn.Linear, nn.Conv2d)
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class LoraWeights:
    """Name, config and weights of one LoRA.

    For each layer ``<module>``, ``state`` contains ``<module>.lora_A.weight``, the down projection ``(rank, in)``, and
    ``<module>.lora_B.weight``, the up projection ``(out, rank)``. For convolutions, these are kernels of 4 dimensions.
    """

    name: str
    config: LoraConfig
    state: Mapping[str, Tensor]


def is_part_of(name: str, modules: str | None) -> bool:
    """Whether the module or weight ``name`` is, or lies in, a module whose whole name matches ``modules``.

    ``modules`` is a regular expression; None matches no module.
    """
    return modules is not None and re.match(rf"(?:{modules})(?:\.|$)", name) is not None


def lora_targets(denoiser: nn.Module, targets: Sequence[str] | str | None = None) -> list[str]:
    """Returns the names of the layers that get a LoRA, each once, in the order of ``named_modules``.

    Args:
        denoiser: a diffusers network.
        targets: list of names or ends of names, or a regular expression that the whole name must match. None selects
            all Linear and Conv2d inside attention, ResnetBlock2D and GEGLU; Stable Diffusion 1.5 has 224 of them.

    Raises:
        ValueError: if no layer matches, or one of the listed names matches no layer.
    """
    if targets is None:
        found = _default_targets(denoiser)
        if not found:
            raise ValueError(
                f"{type(denoiser).__name__} has no Linear or Conv2d inside attention, ResnetBlock2D or GEGLU to add a "
                f"LoRA to; set lora.targets, or set lora to null to train all weights. {_layer_list(denoiser)}"
            )
        return found
    layers = [name for name, module in denoiser.named_modules() if isinstance(module, LAYERS)]
    patterns = [targets] if isinstance(targets, str) else [rf"(.*\.)?{re.escape(suffix)}" for suffix in targets]
    unmatched = [
        target
        for target, pattern in zip([targets] if isinstance(targets, str) else targets, patterns, strict=True)
        if not any(re.fullmatch(pattern, name) for name in layers)
    ]
    if unmatched:
        kind = "regular expression" if isinstance(targets, str) else "suffix"
        raise ValueError(
            f"lora.targets: no Linear or Conv2d of {type(denoiser).__name__} has a name that matches the {kind} "
            f"{', '.join(map(repr, unmatched))}. {_layer_list(denoiser)}"
        )
    return [name for name in layers if any(re.fullmatch(pattern, name) for pattern in patterns)]


def _default_targets(denoiser: nn.Module) -> list[str]:
    found: dict[str, None] = {}
    for ancestor, module in denoiser.named_modules():
        if isinstance(module, ANCESTORS):
            for name, child in module.named_modules():
                if isinstance(child, LAYERS):
                    found[f"{ancestor}.{name}"] = None
    return list(found)


def _layer_list(denoiser: nn.Module, limit: int = 40) -> str:
    """Returns a sentence with the first ``limit`` layer names of a network; block indices are replaced by ``*``."""
    names = [name for name, module in denoiser.named_modules() if isinstance(module, LAYERS)]
    names = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"Its Linear and Conv2d layers: {', '.join(names[:limit]) or 'none'}{more}"


def lora_layers(denoiser: nn.Module, name: str) -> list[tuple[str, Any]]:
    """Returns ``(module_name, layer)`` for each of peft's LoRA layers that has the LoRA ``name``."""
    return [(key, m) for key, m in denoiser.named_modules() if isinstance(m, LoraLayer) and name in m.lora_A]


def inject_lora(denoiser: Any, config: LoraConfig, name: str, unused: str | None = None) -> list[nn.Parameter]:
    """Adds a LoRA to a network with peft, and returns its weights.

    Args:
        denoiser: network that gets the LoRA.
        config: settings of the LoRA.
        name: peft's name of the LoRA; a network can have several LoRAs.
        unused: regular expression of names of modules; layers in these modules get no LoRA, see
            `Backbone.unused_modules`. None excludes no layer.

    Returns:
        The trainable float32 weights: of each layer the down projection, then the up projection.

    Raises:
        ValueError: if ``config.targets`` selects no layer (see `lora_targets`), or only layers in the modules of
            ``unused``.
    """
    selected = lora_targets(denoiser, config.targets)
    targets = [target for target in selected if not is_part_of(target, unused)]
    if not targets:
        raise ValueError(
            f"lora.targets: the selected layers cannot change the prediction of {type(denoiser).__name__}, got "
            f"{', '.join(selected)}; select other layers"
        )
    after_up = config.dropout_placement == "up"
    settings: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": config.rank * config.scale,
        "lora_dropout": 0.0 if after_up else config.dropout,
        # a list would also match longer names that end in one of these
        "target_modules": "|".join(map(re.escape, targets)),
        "init_lora_weights": "gaussian",
    }
    inject_adapter_in_model(PeftConfig(**settings), denoiser, name)
    denoiser._hf_peft_config_loaded = True  # as diffusers' add_adapter, which some networks lack
    parameters = []
    for _, layer in lora_layers(denoiser, name):
        fuse_forward(layer, dropout=config.dropout if after_up else 0.0)
        for projection in (layer.lora_A[name], layer.lora_B[name]):
            projection.weight.data = projection.weight.data.float()
            projection.requires_grad_(True)
            parameters.append(projection.weight)
    return parameters


def read_lora(denoiser: nn.Module, name: str) -> dict[str, Tensor]:
    """Returns the weights of the LoRA ``name``, detached but not copied, with the keys of `LoraWeights`."""
    state = {}
    for key, layer in lora_layers(denoiser, name):
        state[f"{key}.lora_A.weight"] = layer.lora_A[name].weight.detach()
        state[f"{key}.lora_B.weight"] = layer.lora_B[name].weight.detach()
    return state


@torch.no_grad()
def write_lora(denoiser: nn.Module, name: str, state: Mapping[str, Tensor]) -> None:
    """Copies weights, with the keys of `LoraWeights`, into the LoRA ``name`` of a network.

    Raises:
        ValueError: if names or shapes of the weights do not match those of the LoRA.
    """
    weights = read_lora(denoiser, name)
    check_same_names(f"LoRA '{name}'", weights, state)
    for key, tensor in weights.items():
        tensor.copy_(state[key])


def check_same_names(what: str, expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    """Checks that two state dicts have the same names and shapes.

    Args:
        what: what has the weights, e.g. "the denoiser"; for the message.
        expected: weights of the built network.
        got: weights from a checkpoint.

    Raises:
        ValueError: if names or shapes differ; the message names the first difference.
    """
    missing, unknown = [k for k in expected if k not in got], [k for k in got if k not in expected]
    if missing or unknown:
        problem = f"'{missing[0]}' is missing" if missing else f"'{unknown[0]}' is unknown"
        raise ValueError(
            f"the weights of {what} do not match: {problem} ({len(missing)} missing, {len(unknown)} unknown); "
            "use the base model with which the checkpoint was made"
        )
    for key, tensor in expected.items():
        if tensor.shape != got[key].shape:
            raise ValueError(
                f"the weights of {what} do not match: expected '{key}' of shape {tuple(tensor.shape)}, "
                f"got {tuple(got[key].shape)}; use the base model and rank with which the checkpoint was made"
            )


@torch.no_grad()
def merge_into_base(denoiser: Any, name: str) -> None:
    """Adds the LoRA ``name`` to the base weights, removes its layers from the network and freezes all weights.

    Half-precision weights are rounded stochastically with a fixed seed, so that the merge is unbiased. Most LoRA
    updates are smaller than the spacing of half-precision numbers, and rounding to nearest would discard them.
    """
    generator = torch.Generator().manual_seed(0)
    for key, layer in lora_layers(denoiser, name):
        weight, update = layer.get_base_layer().weight, layer.get_delta_weight(name)
        if weight.dtype in HALF:
            weight.copy_(stochastic_round(weight.float() + update.float(), weight.dtype, generator))
        else:
            weight.add_(update)
        parent, _, child = key.rpartition(".")
        setattr(denoiser.get_submodule(parent), child, layer.get_base_layer())
    # peft and diffusers also record adapters on the model; without this the next LoRA could not be added.
    del denoiser.peft_config
    denoiser._hf_peft_config_loaded = False
    denoiser.requires_grad_(False)


def stochastic_round(exact: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Rounds float32 numbers ``exact`` stochastically to ``dtype``, float16 or bfloat16.

    A number is rounded up with probability ``(exact - low) / (high - low)``, where ``low`` and ``high`` are the
    nearest half-precision numbers below and above. None as ``generator`` uses torch's global generator.
    """
    limits = torch.finfo(dtype)
    spacing = torch.ldexp(torch.full_like(exact, limits.eps), torch.frexp(exact).exponent - 1)
    spacing = spacing.clamp(min=limits.smallest_normal * limits.eps)
    offset = torch.rand(exact.shape, generator=generator, device=generator.device if generator else None).to(
        exact.device
    )
    return (torch.floor(exact / spacing + offset) * spacing).to(dtype)


@contextmanager
def temporarily_merged(
    denoiser: nn.Module, name: str, dtype: torch.dtype | None, buffers: dict[str, Tensor] | None = None
) -> Iterator[None]:
    """Context manager in which calls of a network use copies of the weights with the LoRA ``name`` merged.

    Calls with gradient or with active dropout still compute the LoRA separately. The base weights do not change. Merged
    half-precision weights are rounded stochastically with a fixed seed, because rounding to nearest would discard most
    of a small update.

    Args:
        denoiser: the network.
        name: name of the LoRA.
        dtype: dtype of the copies; None for the dtype of the base weights.
        buffers: dict, at first empty, that keeps the copies by layer name. If the dict is passed again, the copies have
            the addresses of the previous ones, as CUDA graphs require. None frees the copies on exit.
    """
    layers = lora_layers(denoiser, name)
    device = next(denoiser.parameters()).device
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
    try:
        with torch.no_grad():
            for key, layer in layers:
                weight, exact = layer.get_base_layer().weight, layer.lora_A[name].weight.dtype
                up, down = layer.lora_B[name].weight.flatten(1), layer.lora_A[name].weight.flatten(1)
                merged = torch.addmm(weight.flatten(1).to(exact), up, down, alpha=layer.scaling[name]).view_as(weight)
                copy = torch.empty_like(weight, dtype=dtype) if buffers is None or key not in buffers else buffers[key]
                if weight.dtype in HALF:
                    merged = stochastic_round(merged.float(), copy.dtype, generator)
                layer.merged_weight = copy.copy_(merged)
                if buffers is not None:
                    buffers[key] = copy
        yield
    finally:
        for _, layer in layers:
            layer.merged_weight = None


@contextmanager
def without_lora(denoiser: nn.Module, name: str) -> Iterator[None]:
    """Context manager in which the LoRA ``name`` of a network is disabled."""
    layers = [layer for _, layer in lora_layers(denoiser, name)]
    before = [(layer.scaling[name], layer.merged_weight) for layer in layers]
    try:
        for layer in layers:
            layer.scaling[name], layer.merged_weight = 0.0, None
        yield
    finally:
        for layer, (scale, merged) in zip(layers, before, strict=True):
            layer.scaling[name], layer.merged_weight = scale, merged


def concat_loras(loras: Sequence[LoraWeights]) -> dict[str, Tensor]:
    """Concatenates LoRAs into one LoRA of scale 1 whose update is the sum of their updates.

    The result has the keys of ``LoraWeights.state``. Down projections ``A`` and up projections ``B`` are stacked, as
    ``B1 A1 + B2 A2 = [B1 B2] [A1; A2]``. The scales are multiplied into ``B``, and the ranks add up. The result is
    exact, also for convolutions.
    """
    joined: dict[str, Tensor] = {}
    modules = dict.fromkeys(key.rsplit(".lora_", 1)[0] for lora in loras for key in lora.state)
    for module in modules:
        loras_here = [lora for lora in loras if f"{module}.lora_A.weight" in lora.state]
        downs = [lora.state[f"{module}.lora_A.weight"] for lora in loras_here]
        ups = [lora.state[f"{module}.lora_B.weight"] * lora.config.scale for lora in loras_here]
        joined[f"{module}.lora_A.weight"] = torch.cat(downs, dim=0).contiguous()
        joined[f"{module}.lora_B.weight"] = torch.cat(ups, dim=1).contiguous()
    return joined


def peft_settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the arguments of peft's ``LoraConfig`` for a LoRA of scale 1, as JSON-serializable values.

    ``state`` contains the weights of the LoRA, as `concat_loras` returns them.
    """
    ranks = {key.rsplit(".lora_", 1)[0]: len(down) for key, down in state.items() if ".lora_A." in key}
    max_rank = max(ranks.values())
    smaller = {module: rank for module, rank in ranks.items() if rank != max_rank}
    return {
        "r": max_rank,
        "lora_alpha": max_rank,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
    }
