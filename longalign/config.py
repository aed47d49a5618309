"""A whole run as one value: read it, check it, change it, compare it. Importing this module does not import torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from longalign.errors import ConfigError, ConfigProblem, check_size, flatten, nested, shorten, suggestion
from longalign.files import checkpoint_file, read_mapping, read_metadata
from longalign.registry import Part, PartError, Section, trainers


def _names(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    if isinstance(value, (str, Mapping)):
        raise ValueError(f"expected a list, one entry per item; put this one into a list: [{shorten(value)}]")
    return value


#: the parts that a trainer is built from unless it says otherwise
TRAINED = ("backbone", "encoder")

Decay = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


class LoopConfig(Section):
    """How a trainer is run.

    Attributes:
        steps: optimiser steps.
        batch_size: items per process and micro-step.
        accumulation: micro-steps per optimiser step.
        lr: learning rate of AdamW.
        betas: AdamW's two decay rates.
        weight_decay: AdamW's weight decay.
        warmup: steps over which the learning rate rises linearly from zero.
        clip: largest norm of the gradient, or null for no clipping.
        precision: mixed precision, "no", "bf16" or "fp16"; frozen modules are kept in that dtype.
        gradient_checkpointing: recompute activations in the backward pass to save memory: the denoiser's, and the
            autoencoder's where rewards see what it decodes; or a trained reward's.
        channels_last: lay out the weights of denoiser and autoencoder with channels last; for backbones with a UNet.
        compile: compile the denoiser by ``torch.compile``: true is "inductor", or another of its backends.
        ema: decay of an exponential moving average of what is trained, or null for none.
        save_every: steps between checkpoints, or null for one at the end only.
        keep: how many checkpoints to keep, the newest ones, or null for all.
        log_every: steps between logged values, which are means over these steps.
        trackers: where values are logged besides the progress bar: "tensorboard", "wandb"; one or a list.
        workers: processes that load data; 0 loads in the training process.
    """

    steps: PositiveInt = 1000
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 8
    accumulation: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    lr: PositiveFloat = 3e-5
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 1e-2
    warmup: NonNegativeInt = 0
    clip: PositiveFloat | None = 0.3
    precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    channels_last: bool = False
    compile: bool | Literal["inductor", "cudagraphs", "aot_eager", "eager"] = False
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    save_every: PositiveInt | None = 500
    keep: PositiveInt | None = 2
    log_every: PositiveInt = 10
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], BeforeValidator(_names)] = ()
    workers: Annotated[int, Field(ge=0, le=1000)] = 0


class ValidationConfig(Section):
    """Images drawn while training, always from the same noise.

    Attributes:
        prompts: the prompts, or a file with one per line (.txt) or one mapping with "prompt" per line (.jsonl).
        every: steps between samplings; there is one at the start and one at the end too.
        num_steps: sampling steps.
        guidance: scale of classifier-free guidance; 1 is none.
        solver: "unipc", "ddim", "dpm++", or "lcm" for a consistency-distilled model, with 4 steps and guidance 1.
    """

    prompts: Annotated[tuple[str, ...], Field(min_length=1)] | Text
    every: PositiveInt = 500
    num_steps: PositiveInt = 25
    guidance: Annotated[float, Field(ge=1)] = 7.5
    solver: Literal["unipc", "ddim", "dpm++", "lcm"] = "unipc"


class CacheConfig(Section):
    """What ``longalign cache`` computes once and training then reads from disk.

    A cache made with another encoder, autoencoder, data or precision, or of images that have changed since, is refused.

    Attributes:
        folder: where it is.
        latents: whether images are encoded; null where the data has some. Training draws from what the autoencoder says
            of them, as it does without.
        prompts: whether the encoder's frozen states are kept; its text models are then not loaded for training.
    """

    folder: Text
    latents: bool | None = None
    prompts: bool = True


class RunConfig(Section):
    """One run. Each part is a name, or a mapping of ``name`` and the part's own keys.

    Attributes:
        backbone: what is fine-tuned; left out where the trainer trains something else.
        encoder: how prompts are encoded; left out likewise.
        rewards: what images are scored with; several are given to the trainer as they are listed.
        trainer: how it is trained; null in a config that only draws or scores.
        data: what it is trained on; needed where there is a trainer.
        loop: steps, batch size, learning rate, checkpoints, logging.
        validation: images drawn while training, or null for none.
        cache: latents and text states on disk, which `longalign cache` makes, or null for none.
        seed: seeds weights, noise and the order of the data.
        output: folder of checkpoints, logs and validation images.
        init_from: a checkpoint to start from: its file, its folder, a run's folder (the newest one), or ``owner/name``
            on the hub; its LoRA is kept, frozen, under the new one.
    """

    backbone: Part("backbones") | None
    encoder: Part("encoders") | None
    rewards: Annotated[tuple[Part("rewards"), ...], BeforeValidator(_listed)] = ()
    trainer: Part("trainers") | None = None
    data: Part("data") | None = None
    loop: LoopConfig = LoopConfig()
    validation: ValidationConfig | None = None
    cache: CacheConfig | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    output: Text = "runs/longalign"
    init_from: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _default_unused_parts(cls, values: Any) -> Any:
        """Null for the parts that the trainer is built without; the others stay required."""
        if not isinstance(values, Mapping):
            return values
        needs = _needs(values.get("trainer"))
        return {**{key: None for key in TRAINED if key not in needs}, **values}

    @model_validator(mode="after")
    def _parts_agree(self) -> RunConfig:
        problems = self._needed_problems()
        if self.trainer is not None and self.data is None:
            problems.append(("data", "this key is required where there is a trainer"))
        if self.cache is not None:
            problems += self._cache_problems(self.cache)
        for part in (self.backbone, self.encoder, *self.rewards, self.trainer, self.data):
            problems += _checked(part, self) if part is not None else []
        if problems:
            raise nested(problems)
        return self

    def _needed_problems(self) -> list[ConfigProblem]:
        problems: list[ConfigProblem] = []
        needs, name = getattr(self.trainer, "needs", TRAINED), self.trainer and self.trainer.name
        for key in TRAINED:
            given = getattr(self, key) is not None
            if given != (key in needs):
                message = f"'{name}' uses no {key}; leave it out" if given else "this key is required"
                problems.append((key, message))
        for key in ("channels_last", "compile"):
            if "backbone" not in needs and getattr(self.loop, key):
                problems.append((f"loop.{key}", f"it is for a backbone, and '{name}' uses none; set it to false"))
        takes, gives = (getattr(part, "has_pooled", None) for part in (self.backbone, self.encoder))
        if self.backbone is not None and self.encoder is not None and None not in (takes, gives) and takes != gives:
            which = "needs a pooled embedding, and" if takes else "takes no pooled embedding, as"
            message = f"'{self.backbone.name}' {which} '{self.encoder.name}' gives {'none' if takes else 'one'}"
            problems.append(("encoder", f"{message}; choose an encoder made for it"))
        if self.trainer is not None and self.rewards and not getattr(self.trainer, "uses_rewards", False):
            message = f"'{name}' uses no rewards, got {len(self.rewards)}; expected none, or a trainer such as 'reward'"
            problems.append(("rewards", message))
        compares = getattr(self.trainer, "compares_pairs", False)
        if self.data is not None and getattr(self.data, "has_pairs", False) != compares:
            if compares:
                message = f"'{name}' compares two images of a prompt, and '{self.data.name}' has one; choose 'pairs'"
            else:
                who = f"'{name}' does not compare them" if name else "there is no trainer to compare them"
                message = f"'{self.data.name}' has two images of each prompt, and {who}; 'denscore' does"
            problems.append(("data", message))
        return problems

    def _cache_problems(self, cache: CacheConfig) -> list[ConfigProblem]:
        if self.data is None:
            return [("data", "this key is required where there is a cache")]
        if self.backbone is None or self.encoder is None:
            return [("cache", "there is nothing to cache without a backbone and an encoder; leave it out")]
        if cache.latents and not getattr(self.data, "has_images", True):
            return [("cache.latents", f"'{self.data.name}' has prompts only, of which there are no latents")]
        if not cache.prompts and cache.latents is False:
            return [("cache", "expected latents or prompts to be cached, and both are false")]
        return []


def _checked(part: Any, run: RunConfig) -> list[ConfigProblem]:
    """What stands against a part in a run, or what went wrong in asking it."""
    try:
        problems = list(part.check_run(run))
        if all(isinstance(path, str) and isinstance(message, str) for path, message in problems):
            return problems
        problem = f"it must give pairs of texts, (path, message), not {shorten(problems)}"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    return [("", f"check_run of '{part.name}' ({type(part).__module__}.{type(part).__name__}) failed: {problem}")]


def _needs(trainer: Any) -> tuple[str, ...]:
    """The parts that a trainer, given by name, mapping or config, is built from."""
    name = trainer.get("name") if isinstance(trainer, Mapping) else getattr(trainer, "name", trainer)
    try:
        return getattr(trainers.get(name), "needs", TRAINED) if isinstance(name, str) else TRAINED
    except PartError:  # the key itself says what is wrong
        return TRAINED


def load_config(source: Mapping[str, Any] | str | Path | RunConfig) -> RunConfig:
    """Reads and checks a config, before anything is loaded or downloaded.

    Args:
        source: a mapping, a ``.yaml`` or ``.json`` file, or a checkpoint: its file, its folder, or a run's folder, of
            which the newest checkpoint is taken. Paths inside a config are relative to the working directory.

    Raises:
        ConfigError: all faults at once, each with its path, e.g. ``encoder.parts.1.modle``.
        FileNotFoundError: if the file does not exist.
    """
    path = Path(source) if isinstance(source, (str, Path)) else None
    if path is not None:
        source = read_mapping(path)
    if isinstance(source, RunConfig):
        source = to_dict(source)
    if not isinstance(source, Mapping):
        raise ConfigError([("", f"expected a mapping or a path, got {shorten(source)}")])
    check_size(source)
    try:
        return RunConfig.model_validate(dict(source))
    except ValidationError as error:
        raise ConfigError([*flatten(error, RunConfig), *_made_with(path)]) from error


def _made_with(path: Path | None) -> list[ConfigProblem]:
    """Which packages a checkpoint was made with that are missing here or of another version."""
    if path is None or path.suffix in (".yaml", ".yml", ".json"):
        return []
    path = checkpoint_file(path)
    metadata = read_metadata(path)
    owners: dict[str, list[str]] = {}
    try:
        for part, owner in json.loads(metadata.get("providers", "{}")).items():
            if owner != "this process":
                owners.setdefault(str(owner), []).append(part)
        owners.setdefault(f"longalign {json.loads(metadata['versions'])['longalign']}", [])
    except (ValueError, TypeError, LookupError, AttributeError):
        pass
    out = [("", f"this is the config of {path}")]
    for owner, parts in owners.items():
        package, _, then = owner.partition(" ")
        try:
            now = version(package) if then else then
        except PackageNotFoundError:
            now = None
        if now != then:
            here = "is not installed here; install it" if now is None else f"is {now} here"
            of = f", which provided {', '.join(parts)}" if parts else ""
            out.append(("", f"the checkpoint was made with {owner}{of}; {package} {here}"))
    return out


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The config as plain values with all defaults filled in; `load_config` of it gives an equal config."""
    return config.model_dump(mode="json")


def to_yaml(config: RunConfig) -> str:
    """The config as YAML with all defaults filled in; `load_config` of a file of it gives an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def to_json(config: RunConfig) -> str:
    """The config as one line of JSON, as it stands in a checkpoint's metadata."""
    return json.dumps(to_dict(config), ensure_ascii=False)


def override(config: Mapping[str, Any] | str | Path | RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """A config with some values changed, checked anew.

    A part replaced by a bare name keeps nothing of the old one: it has the new part's defaults.

    Args:
        config: anything `load_config` takes.
        changes: dotted path to value, applied in order, e.g. ``{"encoder": "t5", "rewards.0.omega": 0.0}``.

    Raises:
        ConfigError: if a path leads through something that is not there, or the changed config is not valid.
    """
    tree = to_dict(load_config(config))
    problems: list[ConfigProblem] = []
    for path, value in changes.items():
        try:
            _put(tree, path, _plain(value))
        except LookupError as error:
            problems.append((shorten(path) if not isinstance(path, str) else path, str(error.args[0])))
    if problems:
        raise ConfigError(problems)
    return load_config(tree)


def diff(a: RunConfig, b: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Where two configs differ, as dotted path to the two values.

    A part of another name, and a list of another length, differ as a whole; so the second values, given to
    `override` with ``a``, make ``b``.
    """
    return dict(_differences("", to_dict(a), to_dict(b)))


def _differences(path: str, a: Any, b: Any) -> list[tuple[str, tuple[Any, Any]]]:
    alike = type(a) is type(b) and len(a) == len(b) if isinstance(a, (dict, list)) else False
    if isinstance(a, dict) and alike:
        alike = a.keys() == b.keys() and a.get("name") == b.get("name")
    if not alike:
        return [] if a == b and type(a) is type(b) else [(path, (a, b))]
    pairs = ((k, a[k], b[k]) for k in a) if isinstance(a, dict) else ((str(i), a[i], b[i]) for i in range(len(a)))
    return [d for key, x, y in pairs for d in _differences(f"{path}.{key}" if path else key, x, y)]


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _put(tree: Any, path: str, value: Any) -> None:
    if not isinstance(path, str):
        raise LookupError("expected a path of keys with dots between them")
    *way, last = path.split(".")
    for depth, step in enumerate(way):
        tree = tree[_step(tree, step, ".".join(way[:depth]))]
    # A new key of a mapping is for validation to judge, which knows what keys there may be.
    key: Any = last if isinstance(tree, dict) else _step(tree, last, ".".join(way))
    old = tree.get(key) if isinstance(tree, dict) else tree[key]
    if isinstance(value, str) and isinstance(old, dict) and "name" in old:
        value = {"name": value}  # so that a later change may set a key of the new part
    tree[key] = value


def _step(tree: Any, step: str, where: str) -> Any:
    if isinstance(tree, dict):
        if step not in tree:
            near = suggestion(step, map(str, tree)) or f"; available: {', '.join(map(str, tree))}"
            raise LookupError(f"there is no '{step}'{f' in {where}' if where else ''}{near}")
        return step
    if isinstance(tree, list):
        if not re.fullmatch("[0-9]{1,9}", step) or int(step) >= len(tree):
            have = f"has {len(tree)}, counted from 0" if tree else f"is empty; set {where} as a whole"
            raise LookupError(f"there is no entry '{step}' in {where}, which {have}")
        return int(step)
    raise LookupError(f"there is nothing inside {where}, which is {shorten(tree)}; set {where} as a whole")
