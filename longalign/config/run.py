"""Loads, validates and dumps the config of a run. Importing this module does not import torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from longalign.config.compatibility import problems
from longalign.config.monitor import MonitorConfig
from longalign.config.parsing import CONFIG_SUFFIXES, read_mapping
from longalign.config.sections import CacheConfig, LoopConfig, Text
from longalign.errors import ConfigError, ConfigProblem, check_size, flatten, nested, shorten
from longalign.files.paths import checkpoint_file, read_metadata
from longalign.registry import Part, PartError, Section, trainers
from longalign.trainers.config import TrainerConfig


def _listed(value: Any) -> Any:
    if isinstance(value, (str, Mapping)):
        raise ValueError(f"expected a list, got {shorten(value)}; write [{shorten(value)}] for a single item")
    return value


class RunConfig(Section):
    """Config of one run.

    Each part of the run (backbone, encoder, trainer, data, and each entry of the list ``rewards``) is a name, or a
    mapping with ``name`` and further keys.
    """

    backbone: Part("backbones") | None
    """the diffusion model to fine-tune, a denoiser and an autoencoder; required unless the trainer uses none."""
    encoder: Part("encoders") | None
    """the prompt encoder, whose output conditions the backbone; required unless the trainer uses none."""
    rewards: Annotated[tuple[Part("rewards"), ...], BeforeValidator(_listed)] = ()
    """list of the rewards that score images, in the order in which the trainer receives them."""
    trainer: Part("trainers") | None = None
    """the training method; null for a config that is only used for sampling or scoring."""
    data: Part("data") | None = None
    """the training data; required with a trainer."""
    loop: LoopConfig = LoopConfig()
    """settings of the training loop: steps, batch size, learning rate, checkpoints, logging."""
    monitor: MonitorConfig | None = None
    """sampling of held-out prompts during training, with metrics; null for none."""
    cache: CacheConfig | None = None
    """image latents and text states that ``longalign cache`` precomputes; null for none."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """random seed for the initialization of new weights, the noise and the data order."""
    output: Text = "runs/longalign"
    """folder for checkpoints, logs and the images of the monitor."""
    init_from: Text | None = None
    """a longalign checkpoint to start from: a file, a folder, a run's folder (the newest checkpoint), or ``owner/name``
    on the Hub; null: the weights of the parts themselves. The checkpoint's LoRA is merged into the frozen weights, and
    a new LoRA is trained.
    """

    @model_validator(mode="before")
    @classmethod
    def _default_unused_parts(cls, values: Any) -> Any:
        """Sets backbone and encoder to None if the trainer does not use them; otherwise they stay required keys."""
        if not isinstance(values, Mapping):
            return values
        if "validation" in values:
            raise nested([("validation", "this key was renamed to 'monitor'; the key `seeds` sets the images' seeds")])
        needs = _needs(values.get("trainer"))
        return {**{key: None for key in TrainerConfig.needs if key not in needs}, **values}

    @model_validator(mode="after")
    def _check_compatible(self) -> RunConfig:
        if found := list(problems(self)):
            raise nested(found)
        return self


def _needs(trainer: Any) -> tuple[str, ...]:
    """Returns which of "backbone" and "encoder" a trainer needs; both if the trainer is None or unknown.

    ``trainer`` is the value of the key: a name, a mapping or a config.
    """
    name = trainer.get("name") if isinstance(trainer, Mapping) else trainer
    if isinstance(trainer, TrainerConfig):
        return trainer.needs
    try:
        config = trainers.get(name) if isinstance(name, str) else TrainerConfig
    except PartError:  # reported when the key itself is validated
        config = TrainerConfig
    return config.needs if issubclass(config, TrainerConfig) else TrainerConfig.needs


def load_config(source: Mapping[str, Any] | str | Path | RunConfig) -> RunConfig:
    """Reads and validates the config of a run without loading or downloading any weights.

    Args:
        source: a mapping, a ``.yaml`` or ``.json`` file, a `RunConfig`, or a local checkpoint: a file, a folder, or a
            run's folder (the newest checkpoint). Relative paths inside a config start at the working directory.

    Raises:
        ConfigError: if the config is invalid; lists all problems, each with its dotted path, e.g.
            ``encoder.parts.1.modle``.
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
    """Returns a message for each package with which a checkpoint was made and that has a different version here.

    Missing packages are included. The list is empty if ``path`` is a config file or None.
    """
    if path is None or path.suffix in CONFIG_SUFFIXES:
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
    """Returns a config as a mapping of JSON values, including defaults; `load_config` of it gives an equal config."""
    return config.model_dump(mode="json")


def to_yaml(config: RunConfig) -> str:
    """Returns a config as YAML text, including defaults; `load_config` of a file with it gives an equal config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def to_json(config: RunConfig) -> str:
    """Returns a config as one line of JSON, including defaults, as stored in the metadata of checkpoints."""
    return json.dumps(to_dict(config), ensure_ascii=False)
