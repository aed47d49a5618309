"""Configs of the built-in rewards; importing this module does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from longalign.config.files import join_subfolder
from longalign.errors import ConfigProblem
from longalign.hub import availability_problem, missing_files_problem
from longalign.registry import Part, PartConfig, Section
from longalign.rewards.config import RewardConfig
from longalign.runtime import Runtime

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

Aspect = Literal["crop", "pad", "squash"]


class TowerRewardConfig(RewardConfig):
    """Settings of rewards with an image and a text tower; plugins may inherit from it.

    Attributes:
        text: how prompts are encoded. ``"auto"``: in one pass if the prompt fits the text tower's window, as published;
            otherwise as the mean of the unit embeddings of as few windows of whole sentences as possible. ``"whole"``:
            one window, truncated with a warning, as published scores do. ``"segments"``: as the mean of the unit
            embeddings of all segments.
        segmenter: how prompts are split with ``text: segments``; null splits into sentences.
        aspect: how non-square images are resized: ``"crop"`` keeps the centre, ``"pad"`` adds black borders,
            ``"squash"`` changes the aspect ratio.
        crop: side of a random crop before the resize in training mode: an int in pixels (504 of 512 in the paper), or a
            float as a fraction of each side; null for no crop.
        micro_batch: number of images per pass of the image tower; null for all at once.
    """

    embeds: ClassVar[bool] = True

    text: Literal["auto", "whole", "segments"] = "auto"
    segmenter: Part("segmenters") | None = None  # type: ignore[valid-type]
    aspect: Aspect = "crop"
    crop: int | float | None = None
    micro_batch: int | None = Field(None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _default_segmenter(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("segmenter") is None:
            text = values.get("text", cls.model_fields["text"].default)
            return {**values, "segmenter": "sentence" if text == "segments" else None}
        return values

    @model_validator(mode="after")
    def _check_segmenter(self) -> TowerRewardConfig:
        if self.text != "segments" and self.segmenter is not None:
            raise ValueError(f"a segmenter has no effect with `text: {self.text}`; set `text: segments` or remove it")
        return self

    @field_validator("crop")
    @classmethod
    def _check_crop(cls, crop: int | float | None) -> int | float | None:
        if isinstance(crop, float) and not 0 < crop < 1:
            raise ValueError(f"expected a crop fraction between 0 and 1, got {crop}; for pixels, use an int")
        if isinstance(crop, int) and crop < 1:
            raise ValueError(f"expected a crop of at least 1 pixel, got {crop}; for no crop, use null")
        return crop


class ClipLikeConfig(TowerRewardConfig):
    """A reward from a transformers ``CLIPModel``.

    Attributes:
        checkpoint: Hub id, or local folder in transformers layout.
        revision: branch, tag or commit of the Hub repository.
        subfolder: subfolder of the checkpoint.
        variant: file variant of the weights, e.g. ``"fp16"`` for ``model.fp16.safetensors``.
        processor: checkpoint with tokenizer and image statistics; null means ``checkpoint`` if it has a tokenizer, else
            CLIP-H, from which PickScore and Denscore were trained.
    """

    default_processor: ClassVar[str] = CLIP_H

    checkpoint: str
    revision: str | None = None
    subfolder: str | None = None
    variant: str | None = None
    processor: str | None = None

    def check_files(self) -> list[ConfigProblem]:
        config = [join_subfolder(self.subfolder, "config.json")]
        problem = availability_problem(self.checkpoint, self.revision) or missing_files_problem(
            self.checkpoint, config, self.revision
        )
        problems = [("checkpoint", problem)] if problem else []
        return problems + (
            [("processor", problem)] if self.processor and (problem := availability_problem(self.processor)) else []
        )

    def build(self, runtime: Runtime) -> Any:
        from longalign.rewards.clip import load_clip_reward

        return load_clip_reward(self, runtime)


class ClipConfig(ClipLikeConfig):
    """The cosine of CLIP's image and text embeddings; the default weights are CLIP-H."""

    name: Literal["clip"] = "clip"
    checkpoint: str = CLIP_H


class PickScoreConfig(ClipLikeConfig):
    """PickScore (Kirstain et al. 2023, arXiv 2305.01569): CLIP-H fine-tuned on the preferences of Pick-a-Pic."""

    name: Literal["pickscore"] = "pickscore"
    checkpoint: str = "yuvalkirstain/PickScore_v1"


class DenscoreConfig(ClipLikeConfig):
    """Denscore (LongAlign, paper 3.2): a preference model for long prompts, encoded segment by segment."""

    name: Literal["denscore"] = "denscore"
    checkpoint: str = "luping-liu/Denscore"
    text: Literal["auto", "whole", "segments"] = "segments"


class Hpsv2Config(TowerRewardConfig):
    """HPSv2 and v2.1 (Wu et al. 2023, arXiv 2306.09341), through open_clip.

    Attributes:
        checkpoint: Hub id, a ``.pt`` file, or a folder with one. An ``open_clip_config.json`` or
            ``bpe_simple_vocab.txt.gz`` in the folder of the weights replaces the architecture ViT-H-14 or CLIP's
            vocabulary.
        revision: branch, tag or commit of the Hub repository.
        version: file of the Hub repository or folder; null means ``"v2.1"``. Not allowed with a ``.pt`` file.
    """

    name: Literal["hpsv2"] = "hpsv2"
    checkpoint: str = "xswu/HPSv2"
    revision: str | None = None
    version: Literal["v2", "v2.1"] | None = None
    aspect: Aspect = "pad"

    def check_files(self) -> list[ConfigProblem]:
        problem = availability_problem(self.checkpoint, self.revision)
        return [("checkpoint", problem)] if problem else []

    def build(self, runtime: Runtime) -> Any:
        from longalign.rewards.hpsv2 import load_hpsv2

        return load_hpsv2(self, runtime)


class ReweightedConfig(RewardConfig):
    """An embedding reward with its text-irrelevant part scaled (LongAlign, paper section 4).

    Attributes:
        inner: the reward to decompose; its score must be a dot product of embeddings.
        omega: weight of the text-irrelevant part: 1 is the plain score, 0 alignment only, 0.3 the paper's choice.
        direction: source of the common direction V of text embeddings: ``"batch"`` (this batch over all processes, as
            in the paper), ``"running"`` (all training batches so far, including this one), or a file written by
            ``longalign compute-direction``.
    """

    name: Literal["reweighted"] = "reweighted"
    inner: Part("rewards")  # type: ignore[valid-type]
    omega: float = Field(0.3, ge=0, allow_inf_nan=False)
    direction: str = "batch"

    @field_validator("inner")
    @classmethod
    def _check_inner(cls, inner: PartConfig) -> PartConfig:
        if not getattr(inner, "embeds", True):  # a plugin without `embeds` is checked when it is built
            raise ValueError(
                f"'{inner.name}' is not a product of embeddings, so it has no text-irrelevant part; "
                "to reweight a sum, wrap each of its terms in `reweighted`"
            )
        return inner

    def check_files(self) -> list[ConfigProblem]:
        if self.direction in ("batch", "running") or Path(self.direction).is_file():
            return []
        message = (
            f"no file {self.direction}; expected batch, running, or a file written by `longalign compute-direction`"
        )
        return [("direction", message)]

    @property
    def differentiable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return getattr(self.inner, "differentiable", True)

    def build(self, runtime: Runtime) -> Any:
        from longalign.rewards.reweighted import load_reweighted

        return load_reweighted(self, runtime)


class TermConfig(Section):
    """One term of a sum.

    Attributes:
        reward: the reward.
        weight: its factor; a negative one turns a reward into a penalty.
        label: name of its curves; null means the reward's name, with a number if it is already used.
    """

    reward: Part("rewards")  # type: ignore[valid-type]
    weight: float = Field(1.0, allow_inf_nan=False)
    label: str | None = Field(None, min_length=1)


class SumConfig(RewardConfig):
    """A weighted sum of rewards.

    Attributes:
        terms: the rewards and their weights.
    """

    name: Literal["sum"] = "sum"
    terms: tuple[TermConfig, ...]

    @property
    def differentiable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(getattr(term.reward, "differentiable", True) for term in self.terms)

    @field_validator("terms")
    @classmethod
    def _check_terms(cls, terms: tuple[TermConfig, ...]) -> tuple[TermConfig, ...]:
        if not terms:
            raise ValueError("a sum needs at least one term, such as {reward: clip, weight: 1.0}")
        labels = [t.label for t in terms if t.label is not None]
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if repeated:
            raise ValueError(f"labels must be unique, got {', '.join(map(repr, repeated))} more than once")
        return terms

    def build(self, runtime: Runtime) -> Any:
        from longalign.rewards.sum import load_sum

        return load_sum(self, runtime)
