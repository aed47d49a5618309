"""Configs of the built-in rewards; importing this module does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from longalign.errors import ConfigProblem
from longalign.files import join_subfolder
from longalign.hub import absent, incomplete
from longalign.registry import Part, PartConfig, Section
from longalign.runtime import Runtime

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

Aspect = Literal["crop", "pad", "squash"]


class RewardConfig(PartConfig):
    """Base of rewards' configs.

    What a run may be checked for before anything is loaded: ``embeds`` says whether the reward is an
    `longalign.rewards.base.EmbeddingReward`, which alone can be reweighted; ``differentiable`` whether its scores have
    a gradient in the images.
    """

    embeds: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True


class TowerRewardConfig(RewardConfig):
    """What rewards with an image and a text tower have in common; plugins may build on it.

    Attributes:
        text: ``"auto"`` reads a prompt that fits the text tower's window in one pass, as published, and a longer one in
            as few windows of whole sentences as hold it, of whose unit embeddings it takes the mean; ``"whole"`` reads
            one window and truncates, with a warning, as published scores do; ``"segments"`` reads all of a prompt
            segment by segment and takes the mean of the segments' unit embeddings.
        segmenter: how the prompt is split, with ``text: segments``; whole sentences if it is left out.
        aspect: what becomes of images that are not square: ``"crop"`` keeps the centre, ``"pad"`` adds black borders,
            ``"squash"`` changes their proportions.
        crop: side of a random crop taken before the resize in training mode, in pixels (an int, 504 of 512 in the
            paper) or as a fraction of each side (a float); none if it is left out.
        micro_batch: images in one pass of the image tower; all at once if it is left out.
    """

    embeds: ClassVar[bool] = True

    text: Literal["auto", "whole", "segments"] = "auto"
    segmenter: Part("segmenters") | None = None  # type: ignore[valid-type]
    aspect: Aspect = "crop"
    crop: int | float | None = None
    micro_batch: int | None = Field(None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _fill_segmenter(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("segmenter") is None:
            text = values.get("text", cls.model_fields["text"].default)
            return {**values, "segmenter": "sentence" if text == "segments" else None}
        return values

    @model_validator(mode="after")
    def _check_segmenter(self) -> TowerRewardConfig:
        if self.text != "segments" and self.segmenter is not None:
            raise ValueError(f"a segmenter has no use with `text: {self.text}`; set `text: segments` or remove it")
        return self

    @field_validator("crop")
    @classmethod
    def _check_crop(cls, crop: int | float | None) -> int | float | None:
        if isinstance(crop, float) and not 0 < crop < 1:
            raise ValueError(f"a crop given as a fraction must be between 0 and 1, not {crop}; give pixels as an int")
        if isinstance(crop, int) and crop < 1:
            raise ValueError(f"a crop must be at least one pixel, not {crop}; leave it out for no crop")
        return crop


class ClipLikeConfig(TowerRewardConfig):
    """A reward from a transformers ``CLIPModel``.

    Attributes:
        checkpoint: hub id, or local folder in transformers layout.
        revision: of the hub repository.
        subfolder: of the checkpoint.
        variant: file variant of the weights, e.g. ``"fp16"`` for ``model.fp16.safetensors``.
        processor: where tokenizer and image statistics come from: the checkpoint if it holds a tokenizer, else CLIP-H,
            from which PickScore and Denscore were trained.
    """

    default_processor: ClassVar[str] = CLIP_H

    checkpoint: str
    revision: str | None = None
    subfolder: str | None = None
    variant: str | None = None
    processor: str | None = None

    def check_files(self) -> list[ConfigProblem]:
        config = [join_subfolder(self.subfolder, "config.json")]
        problem = absent(self.checkpoint, self.revision) or incomplete(self.checkpoint, config, self.revision)
        problems = [("checkpoint", problem)] if problem else []
        return problems + ([("processor", problem)] if self.processor and (problem := absent(self.processor)) else [])

    def build(self, runtime: Runtime) -> Any:
        from longalign.rewards.clip import load_clip_reward

        return load_clip_reward(self, runtime)


class ClipConfig(ClipLikeConfig):
    """The cosine of CLIP's image and text embeddings; the default weights are CLIP-H."""

    name: Literal["clip"] = "clip"
    checkpoint: str = CLIP_H


class PickScoreConfig(ClipLikeConfig):
    """PickScore (Kirstain et al. 2023, arXiv 2305.01569): CLIP-H trained on Pick-a-Pic's preferences."""

    name: Literal["pickscore"] = "pickscore"
    checkpoint: str = "yuvalkirstain/PickScore_v1"


class DenscoreConfig(ClipLikeConfig):
    """Denscore (LongAlign, paper 3.2): a preference model for long prompts, read segment by segment."""

    name: Literal["denscore"] = "denscore"
    checkpoint: str = "luping-liu/Denscore"
    text: Literal["auto", "whole", "segments"] = "segments"


class Hpsv2Config(TowerRewardConfig):
    """HPSv2 and v2.1 (Wu et al. 2023, arXiv 2306.09341), through open_clip.

    Attributes:
        checkpoint: hub id, a ``.pt`` file, or a folder that holds one. An ``open_clip_config.json`` and a
            ``bpe_simple_vocab.txt.gz`` beside the weights replace the architecture ViT-H-14 and CLIP's vocabulary.
        revision: of the hub repository.
        version: which file of the hub repository or folder is read; ``"v2.1"`` if it is left out. A ``.pt`` file is
            the version that it is, so it takes none.
    """

    name: Literal["hpsv2"] = "hpsv2"
    checkpoint: str = "xswu/HPSv2"
    revision: str | None = None
    version: Literal["v2", "v2.1"] | None = None
    aspect: Aspect = "pad"

    def check_files(self) -> list[ConfigProblem]:
        problem = absent(self.checkpoint, self.revision)
        return [("checkpoint", problem)] if problem else []

    def build(self, runtime: Runtime) -> Any:
        from longalign.rewards.hpsv2 import load_hpsv2

        return load_hpsv2(self, runtime)


class ReweightedConfig(RewardConfig):
    """An embedding reward with its text-irrelevant part scaled (LongAlign, paper section 4).

    Attributes:
        inner: the reward; any whose score is a product of embeddings.
        omega: weight of the text-irrelevant part: 1 is the plain score, 0 alignment only, 0.3 the paper's choice.
        direction: where the common direction V of text embeddings comes from: ``"batch"`` (this batch over all
            processes, as in the paper), ``"running"`` (all batches seen in training, this one included), or a file
            that ``longalign direction`` wrote.
    """

    name: Literal["reweighted"] = "reweighted"
    inner: Part("rewards")  # type: ignore[valid-type]
    omega: float = Field(0.3, ge=0, allow_inf_nan=False)
    direction: str = "batch"

    @field_validator("inner")
    @classmethod
    def _check_inner(cls, inner: PartConfig) -> PartConfig:
        if not getattr(inner, "embeds", True):  # a plugin's that does not say is looked at when it is built
            raise ValueError(
                f"'{inner.name}' is no product of embeddings, so it has no text-irrelevant part; "
                "around a sum, put `reweighted` inside it, around each term"
            )
        return inner

    def check_files(self) -> list[ConfigProblem]:
        if self.direction in ("batch", "running") or Path(self.direction).is_file():
            return []
        message = f"no file {self.direction}; expected batch, running, or a file written by `longalign direction`"
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
        label: names its curves; the reward's name if it is left out, numbered where that is taken.
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
        given = [t.label for t in terms if t.label is not None]
        twice = sorted({label for label in given if given.count(label) > 1})
        if twice:
            raise ValueError(f"labels must differ, but {', '.join(map(repr, twice))} is given more than once")
        return terms

    def build(self, runtime: Runtime) -> Any:
        from longalign.rewards.sum import load_sum

        return load_sum(self, runtime)
