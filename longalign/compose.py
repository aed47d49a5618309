"""Builds the parts of a run from its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from longalign.config.run import RunConfig, load_config
from longalign.errors import ConfigError
from longalign.registry import backbones, encoders, rewards, trainers
from longalign.registry import data as datasets
from longalign.runtime import Runtime

if TYPE_CHECKING:
    from longalign.backbones.base import Backbone
    from longalign.data.base import Data
    from longalign.data.stream import Stream
    from longalign.encoders.base import Encoder
    from longalign.rewards.base import Reward
    from longalign.trainers.base import Trainer


class Composition:
    """The parts of a run: backbone, encoder, rewards, trainer and data. Each is built on first access and then reused.

    Args:
        config: config of the run.
        runtime: device, dtype and processes that the parts are built for.
    """

    def __init__(self, config: RunConfig, runtime: Runtime):
        self._config, self._runtime = config, runtime
        self._built: dict[str, Any] = {}

    def __repr__(self) -> str:
        names = {key: getattr(self.config, key) for key in ("backbone", "encoder", "trainer", "data")}
        parts = [f"{key}={part.name}" for key, part in names.items() if part is not None]
        parts += (
            [f"rewards=[{', '.join(reward.name for reward in self.config.rewards)}]"] if self.config.rewards else []
        )
        return f"Composition({', '.join(parts)}; built: {', '.join(self._built) or 'nothing'})"

    @property
    def config(self) -> RunConfig:
        """Config of the run, as passed in."""
        return self._config

    @property
    def runtime(self) -> Runtime:
        """Device, dtype and processes that the parts are built for."""
        return self._runtime

    @property
    def backbone(self) -> Backbone:
        """The diffusion model to fine-tune, with the weights of the checkpoint ``init_from`` if that key is set.

        Raises `ConfigError` if the config has no backbone.
        """
        return self._part("backbone")

    @property
    def encoder(self) -> Encoder:
        """The prompt encoder, with the adapter weights of the checkpoint ``init_from`` if that key is set.

        With ``cache.prompts``, the encoder reads the encoded prompts from the cache, and no text model is loaded.

        Raises `ConfigError` if the config has no encoder.
        """
        return self._part("encoder")

    @property
    def rewards(self) -> list[Reward]:
        """The rewards, in the order of the config; empty if it has none. A plain function is wrapped in a `Reward`."""
        if "rewards" not in self._built:
            from longalign.rewards.base import as_reward

            runtime = self.runtime
            if self.config.trainer is not None and self.config.trainer.trains_rewards:
                runtime = replace(runtime, dtype="float32")  # trainable weights are loaded in full precision
            self._built["rewards"] = [
                as_reward(rewards.construct(config, runtime), config.name) for config in self.config.rewards
            ]
        return self._built["rewards"]

    @property
    def trainer(self) -> Trainer:
        """The trainer. Access also builds the parts that it uses, of backbone, encoder and rewards.

        Raises `ConfigError` if the config has no trainer.
        """
        if "trainer" not in self._built:
            config = self._require("trainer")
            parts = {key: getattr(self, key) for key in config.built_from()}
            self._built["trainer"] = trainers.construct(config, self.runtime, **parts)
        return self._built["trainer"]

    @property
    def data(self) -> Data | Stream:
        """The training data: prompts, and images or pairs of images if the data has any.

        If the config caches latents (``cache.latents``), the data has these latents instead of images.

        Raises `ConfigError` if the config has no data.
        """
        if "data" not in self._built:
            config = self._require("data").for_backbone(self.config.backbone)
            data = datasets.construct(config, self.runtime)
            if self.config.cache is not None:
                from longalign.caching.precompute import cached_data, require_indexed

                data = cached_data(self.config, require_indexed(data, self.config), self.runtime)
            self._built["data"] = data
        return self._built["data"]

    def _require(self, key: Literal["backbone", "encoder", "trainer", "data"]) -> Any:
        config = getattr(self.config, key)
        if config is None:
            raise ConfigError([(key, f"this run has no {key}; add '{key}' to the config")])
        return config

    def _part(self, key: Literal["backbone", "encoder"]) -> Any:
        if key not in self._built:
            self._require(key)
            if self.config.init_from is None:
                self._built[key] = self._build(key)
            else:
                self._build_from_checkpoint(self.config.init_from)
        return self._built[key]

    def _build(self, key: Literal["backbone", "encoder"]) -> Any:
        if key == "encoder" and self.config.cache is not None and self.config.cache.prompts:
            from longalign.caching.precompute import cached_encoder

            data: Any = self.data  # never a stream: streams cannot be cached
            return cached_encoder(self.config, data, self.runtime)
        registry = {"backbone": backbones, "encoder": encoders}[key]
        return registry.construct(getattr(self.config, key), self.runtime)

    def _build_from_checkpoint(self, checkpoint: str) -> None:
        from longalign.checkpoints.checkpoint import load_into
        from longalign.files.paths import find_checkpoint

        path = find_checkpoint(checkpoint)  # fail before the weights of the parts are loaded
        backbone, encoder = self._build("backbone"), self._build("encoder")
        load_into(path, backbone, encoder)
        self._built.update(backbone=backbone, encoder=encoder)


def build_from_config(
    config: Mapping[str, Any] | str | Path | RunConfig, runtime: Runtime | None = None
) -> Composition:
    """Validates a config and returns the `Composition` of its parts. Weights are loaded when a part is first accessed.

    Args:
        config: a mapping, a YAML or JSON file, a checkpoint, or a `RunConfig`; see `longalign.load_config`. Only the
            config of a checkpoint is used, not its weights.
        runtime: device, dtype and processes. If None, the fastest device of this machine, the dtype of
            ``loop.precision``, and one process.

    Raises:
        ConfigError: if the config is invalid; lists all problems, each with its dotted path.
        FileNotFoundError: if ``config`` is a file that does not exist.
    """
    config = load_config(config)
    return Composition(config, runtime or Runtime.detect(config.loop.precision))
