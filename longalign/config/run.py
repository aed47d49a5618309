"""Run configs: load, validate, override, compare and dump. Importing this module does not import torch."""

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

from longalign.config.files import checkpoint_file, read_mapping, read_metadata
from longalign.errors import ConfigError, ConfigProblem, check_size, flatten, nested, shorten, suggestion
from longalign.inference.solvers import Solver
from longalign.registry import Part, PartError, Section, trainers


def _names(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    if isinstance(value, (str, Mapping)):
        raise ValueError(f"expected a list, got {shorten(value)}; write [{shorten(value)}] for a single item")
    return value


#: parts that a trainer is built from by default
DEFAULT_NEEDS = ("backbone", "encoder")

Decay = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


class LoopConfig(Section):
    """Settings of the training loop.

    Attributes:
        steps: optimizer steps.
        batch_size: items per process and micro-step.
        accumulation: micro-steps per optimizer step.
        lr: learning rate of AdamW.
        betas: AdamW's two decay rates.
        weight_decay: AdamW's weight decay.
        warmup: steps of linear learning-rate warmup from zero.
        clip: maximum gradient norm, or null for no clipping.
        precision: mixed precision, "no", "bf16" or "fp16"; frozen modules are kept in that dtype.
        gradient_checkpointing: recompute activations in the backward pass to save memory: those of the denoiser, of the
            autoencoder if rewards score decoded images, or of a trained reward.
        channels_last: use the channels-last memory format for denoiser and autoencoder; for backbones with a UNet.
        compile: compile the denoiser with ``torch.compile``; true for "inductor", or the name of a backend.
        ema: decay of the exponential moving average of the trainable parameters, or null for none.
        save_every: steps between checkpoints, or null for a single checkpoint at the end.
        keep: number of newest checkpoints to keep, or null for all.
        log_every: steps between log entries; values are averaged over these steps.
        trackers: additional loggers, "tensorboard" or "wandb"; one or a list.
        workers: data loading processes; 0 loads in the training process.
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
    """Validation images, sampled with fixed seeds during training.

    Attributes:
        prompts: the prompts, or a file with one per line (.txt) or one mapping with "prompt" per line (.jsonl).
        every: steps between validations; images are also sampled at the start and at the end.
        num_steps: sampling steps.
        guidance: classifier-free guidance scale; 1 disables it.
        solver: "unipc", "ddim", "dpm++", or "lcm" for a consistency-distilled model, with 4 steps and guidance 1.
    """

    prompts: Annotated[tuple[str, ...], Field(min_length=1)] | Text
    every: PositiveInt = 500
    num_steps: PositiveInt = 25
    guidance: Annotated[float, Field(ge=1)] = 7.5
    solver: Solver = "unipc"


class CacheConfig(Section):
    """Latents and text states that ``longalign cache`` precomputes and training reads from disk.

    A cache is rejected if the encoder, autoencoder, data, precision or images have changed since it was made.

    Attributes:
        folder: folder of the cache.
        latents: cache image latents; null to cache them if the data has images. Training samples from the cached
            posterior exactly as without a cache.
        prompts: cache the frozen text states; the text models are then not loaded for training.
    """

    folder: Text
    latents: bool | None = None
    prompts: bool = True


class RunConfig(Section):
    """Config of one run. Each part is a name, or a mapping with ``name`` and the keys of the part.

    Attributes:
        backbone: the diffusion model to fine-tune; omit it for trainers that do not use one.
        encoder: the prompt encoder; omit it for trainers that do not use one.
        rewards: the rewards that score images, in the order the trainer receives them.
        trainer: the training method; null for sampling- or scoring-only configs.
        data: the training data; required with a trainer.
        loop: steps, batch size, learning rate, checkpoints, logging.
        validation: images sampled during training, or null for none.
        cache: precomputed latents and text states, written by `longalign cache`, or null for none.
        seed: random seed of weights, noise and data order.
        output: folder for checkpoints, logs and validation images.
        init_from: a checkpoint to start from: its file, its folder, a run's folder (the newest one), or ``owner/name``
            on the Hub; a new LoRA is trained on top of its frozen LoRA.
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
        """Defaults the parts that the trainer does not use to null; the others stay required."""
        if not isinstance(values, Mapping):
            return values
        needs = _needs(values.get("trainer"))
        return {**{key: None for key in DEFAULT_NEEDS if key not in needs}, **values}

    @model_validator(mode="after")
    def _check_compatible(self) -> RunConfig:
        problems = self._compatibility_problems()
        if self.trainer is not None and self.data is None:
            problems.append(("data", "this key is required with a trainer"))
        if self.cache is not None:
            problems += self._cache_problems(self.cache)
        for part in (self.backbone, self.encoder, *self.rewards, self.trainer, self.data):
            problems += _run_problems(part, self) if part is not None else []
        if problems:
            raise nested(problems)
        return self

    def _compatibility_problems(self) -> list[ConfigProblem]:
        problems: list[ConfigProblem] = []
        needs, name = getattr(self.trainer, "needs", DEFAULT_NEEDS), self.trainer and self.trainer.name
        for key in DEFAULT_NEEDS:
            is_set = getattr(self, key) is not None
            if is_set != (key in needs):
                message = f"the trainer '{name}' uses no {key}; remove this key" if is_set else "this key is required"
                problems.append((key, message))
        for key in ("channels_last", "compile"):
            if "backbone" not in needs and getattr(self.loop, key):
                message = f"only applies to a backbone, but the trainer '{name}' uses none; set it to false"
                problems.append((f"loop.{key}", message))
        takes, gives = (getattr(part, "has_pooled", None) for part in (self.backbone, self.encoder))
        if self.backbone is not None and self.encoder is not None and None not in (takes, gives) and takes != gives:
            message = (
                f"'{self.backbone.name}' {'needs a' if takes else 'takes no'} pooled embedding, but "
                f"'{self.encoder.name}' returns {'none' if takes else 'one'}; choose a matching encoder"
            )
            problems.append(("encoder", message))
        if self.trainer is not None and self.rewards and not getattr(self.trainer, "uses_rewards", False):
            message = f"'{name}' uses no rewards, got {len(self.rewards)}; remove them, or choose the trainer 'reward'"
            problems.append(("rewards", message))
        compares_pairs = getattr(self.trainer, "compares_pairs", False)
        if self.data is not None and self.data.has_pairs != compares_pairs:
            if compares_pairs:
                message = f"'{name}' needs two images per prompt, but '{self.data.name}' has one; choose 'pairs'"
            else:
                user = f"the trainer '{name}' takes one" if name else "the config has no trainer"
                message = f"'{self.data.name}' has two images per prompt, but {user}; choose the trainer 'denscore'"
            problems.append(("data", message))
        return problems

    def _cache_problems(self, cache: CacheConfig) -> list[ConfigProblem]:
        if self.data is None:
            return [("data", "this key is required with a cache")]
        if self.backbone is None or self.encoder is None:
            return [("cache", "a cache needs a backbone and an encoder; remove this key")]
        if cache.latents and not self.data.has_images:
            return [("cache.latents", f"'{self.data.name}' has prompts only, no images; set it to false")]
        if not cache.prompts and cache.latents is False:
            return [("cache", "latents and prompts are both false; set at least one to true")]
        return []


def _run_problems(part: Any, run: RunConfig) -> list[ConfigProblem]:
    """Problems that a part's `check_run` returns, or its failure as a problem."""
    try:
        problems = list(part.check_run(run))
        if all(isinstance(path, str) and isinstance(message, str) for path, message in problems):
            return problems
        problem = f"expected a list of (path, message) pairs of strings, got {shorten(problems)}"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    return [("", f"check_run of '{part.name}' ({type(part).__module__}.{type(part).__name__}) failed: {problem}")]


def _needs(trainer: Any) -> tuple[str, ...]:
    """Parts that a trainer, given by name, mapping or config, is built from."""
    name = trainer.get("name") if isinstance(trainer, Mapping) else getattr(trainer, "name", trainer)
    try:
        return getattr(trainers.get(name), "needs", DEFAULT_NEEDS) if isinstance(name, str) else DEFAULT_NEEDS
    except PartError:  # reported when the key itself is validated
        return DEFAULT_NEEDS


def load_config(source: Mapping[str, Any] | str | Path | RunConfig) -> RunConfig:
    """Reads and validates a config without loading or downloading any weights.

    Args:
        source: a mapping, a ``.yaml`` or ``.json`` file, or a checkpoint: its file, its folder, or a run's folder (the
            newest checkpoint). Paths inside a config are relative to the working directory.

    Raises:
        ConfigError: all problems at once, each with its path, e.g. ``encoder.parts.1.modle``.
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
        raise ConfigError([*flatten(error, RunConfig), *_version_differences(path)]) from error


def _version_differences(path: Path | None) -> list[ConfigProblem]:
    """Packages of a checkpoint that are missing here or have a different version."""
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
        package, _, saved_version = owner.partition(" ")
        try:
            installed = version(package) if saved_version else saved_version
        except PackageNotFoundError:
            installed = None
        if installed != saved_version:
            state = "is not installed here; install it" if installed is None else f"{installed} is installed here"
            provided = f", which provided {', '.join(parts)}" if parts else ""
            out.append(("", f"the checkpoint was made with {owner}{provided}; {package} {state}"))
    return out


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Returns the config as plain values, with all defaults; `load_config` of them returns an equal config."""
    return config.model_dump(mode="json")


def to_yaml(config: RunConfig) -> str:
    """Returns the config as YAML, with all defaults; `load_config` of such a file returns an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def to_json(config: RunConfig) -> str:
    """Returns the config as one line of JSON, as stored in the metadata of checkpoints."""
    return json.dumps(to_dict(config), ensure_ascii=False)


def override(config: Mapping[str, Any] | str | Path | RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Changes values of a config and validates the result.

    A part that is replaced by a bare name gets the defaults of the new part.

    Args:
        config: any source that `load_config` accepts.
        changes: dotted path to value, applied in order, e.g. ``{"encoder": "t5", "rewards.0.omega": 0.0}``.

    Raises:
        ConfigError: if a path does not exist, or the changed config is invalid.
    """
    tree = to_dict(load_config(config))
    problems: list[ConfigProblem] = []
    for path, value in changes.items():
        try:
            _set_path(tree, path, _plain(value))
        except LookupError as error:
            problems.append((shorten(path) if not isinstance(path, str) else path, str(error.args[0])))
    if problems:
        raise ConfigError(problems)
    return load_config(tree)


def diff(a: RunConfig, b: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Differences of two configs, as dotted path to both values.

    Parts with different names and lists of different lengths differ as a whole. Overriding ``a`` with the second
    values gives ``b``.
    """
    return dict(_differences("", to_dict(a), to_dict(b)))


def _differences(path: str, a: Any, b: Any) -> list[tuple[str, tuple[Any, Any]]]:
    same_structure = type(a) is type(b) and len(a) == len(b) if isinstance(a, (dict, list)) else False
    if isinstance(a, dict) and same_structure:
        same_structure = a.keys() == b.keys() and a.get("name") == b.get("name")
    if not same_structure:
        return [] if a == b and type(a) is type(b) else [(path, (a, b))]
    pairs = ((k, a[k], b[k]) for k in a) if isinstance(a, dict) else ((str(i), a[i], b[i]) for i in range(len(a)))
    return [d for key, x, y in pairs for d in _differences(f"{path}.{key}" if path else key, x, y)]


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _set_path(tree: Any, path: str, value: Any) -> None:
    if not isinstance(path, str):
        raise LookupError("expected a dotted path of keys")
    *parents, last = path.split(".")
    for depth, step in enumerate(parents):
        tree = tree[_resolve_step(tree, step, ".".join(parents[:depth]))]
    # a new key of a mapping is checked by validation
    key: Any = last if isinstance(tree, dict) else _resolve_step(tree, last, ".".join(parents))
    old = tree.get(key) if isinstance(tree, dict) else tree[key]
    if isinstance(value, str) and isinstance(old, dict) and "name" in old:
        value = {"name": value}  # later changes may set keys of the new part
    tree[key] = value


def _resolve_step(tree: Any, step: str, parent: str) -> Any:
    """Key or index of one step of a path. Raises LookupError if it does not exist."""
    if isinstance(tree, dict):
        if step not in tree:
            hint = suggestion(step, map(str, tree)) or f"; available: {', '.join(map(str, tree))}"
            raise LookupError(f"no key '{step}'{f' in {parent}' if parent else ''}{hint}")
        return step
    if isinstance(tree, list):
        if not re.fullmatch("[0-9]{1,9}", step) or int(step) >= len(tree):
            state = f"which has {len(tree)}, counted from 0" if tree else f"which is empty; set {parent} as a whole"
            raise LookupError(f"no entry '{step}' in {parent}, {state}")
        return int(step)
    raise LookupError(f"{parent} is {shorten(tree)} and has no keys; set {parent} as a whole")
