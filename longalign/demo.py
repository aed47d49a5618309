"""The demo: LongAlign's two stages on the small world, and what they change on held-out long captions."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longalign.checkpoint import load_for_sampling
from longalign.compose import build_from_config
from longalign.config import RunConfig, override
from longalign.data.configs import ScenesConfig
from longalign.encoders.base import Encoder, PromptReport, TruncationWarning
from longalign.evaluate import DecomposedMetric, FactMetric, evaluate
from longalign.mini.captions import Caption
from longalign.pipeline import sample
from longalign.report import Example, write_report
from longalign.runtime import Runtime, examples_folder
from longalign.table import MetricTable

MARKER = ".longalign-demo"
HELD_OUT = 1_000_000
"""Added to the largest seed of the training data to give the seed of the held-out captions."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        table: metrics of ``base``, ``align`` and ``align+reward``.
        report: the HTML page.
        seconds: stage -> seconds.
    """

    table: MetricTable
    report: Path
    seconds: dict[str, float] = field(default_factory=dict)


def default_config(name: str) -> Path:
    """The YAML of a demo stage, ``align`` or ``reward``: ``mini-<name>.yaml`` of the examples."""
    return examples_folder() / f"mini-{name}.yaml"


def run_demo(
    output: Path | str = "runs/demo",
    align: Mapping[str, Any] | Path | str | RunConfig | None = None,
    reward: Mapping[str, Any] | Path | str | RunConfig | None = None,
    prompts: int = 128,
    *,
    steps: int = 15,
    batch_size: int = 64,
    examples: int = 6,
) -> DemoResult:
    """Trains both stages, draws held-out captions with the model before, between and after, and writes the report.

    ``base`` is the backbone as it is bundled, its captions cut at CLIP's window as Stable Diffusion does; ``align`` has
    been fine-tuned on long captions, and ``align+reward`` on a preference model after that. All draw the same captions
    from the same noise.

    Args:
        output: folder for both runs, ``report.html``, ``table.json`` and ``table.md``; an earlier demo is replaced.
        align: config of the first stage, the bundled one if None; its data must be ``scenes``.
        reward: config of the second stage, the bundled one if None. Its first reward, without reweighting, is measured.
        prompts: number of held-out captions.
        steps: sampling steps; the guidance is the one that the reward stage samples with.
        batch_size: images drawn at a time.
        examples: how many captions are shown with their images, the first ones.

    Raises:
        ValueError: if the output holds something else, or the configs do not fit the demo.
    """
    if prompts < 2:
        raise ValueError(f"expected at least 2 prompts, which differences and their intervals need, got {prompts}")
    output = Path(output)
    first = override(align or default_config("align"), {"output": str(output / "align")})
    second = override(reward or default_config("reward"), {"output": str(output / "reward"), "init_from": None})
    captions = held_out_captions([first, second], prompts)
    claim_output(output, [Path(first.output), Path(second.output)])
    seconds: dict[str, float] = {}

    with _timed("align: training", seconds):
        trained = build_from_config(first).fit()
    if trained.interrupted:
        raise KeyboardInterrupt
    second = override(second, {"init_from": str(trained.checkpoint)})
    with _timed("reward: training", seconds):
        rewarded = build_from_config(second).fit()
    if rewarded.interrupted:
        raise KeyboardInterrupt

    runtime = Runtime.detect()
    texts, seeds = [c.text for c in captions], list(range(len(captions)))
    guidance = getattr(second.trainer, "guidance", 7.5)
    images: dict[str, Tensor] = {}
    unread: dict[str, list[frozenset[int]]] = {}
    for name, source in {"base": None, "align": trained.checkpoint, "align+reward": rewarded.checkpoint}.items():
        with _timed(f"{name}: drawing", seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)  # the report says which sentences were not read
            backbone, encoder = _base(first, runtime) if source is None else load_for_sampling(source, runtime)[1:]
            settings = {"seeds": seeds, "steps": steps, "guidance": guidance, "batch_size": batch_size}
            images[name] = sample(backbone, encoder, texts, **settings, progress=True)
            unread[name] = _unread(encoder, captions)

    with _timed("measuring", seconds):
        inner = getattr(second.rewards[0], "inner", second.rewards[0])
        facts, scores = FactMetric(captions), DecomposedMetric(inner.name, inner.build(runtime), texts)
        table = evaluate(images, texts, [facts, scores], seeds)
        shown = [_example(i, captions[i], images, unread, facts, scores) for i in range(min(examples, prompts))]

    seconds["total"] = sum(seconds.values())
    report = write_report(
        output / "report.html",
        title="LongAlign on the small world",
        lead=_lead(first, second, captions, guidance, steps),
        table=table,
        examples=shown,
        logs={"align": Path(first.output) / "log.jsonl", "reward": Path(second.output) / "log.jsonl"},
        configs={"align": first, "reward": second},
        seconds=seconds,
        score_name=scores.name,
    )
    (output / "table.json").write_text(table.json(), encoding="utf-8")
    (output / "table.md").write_text(table.markdown(), encoding="utf-8")
    print(f"\n{table.text()}\n" + "\n".join(f"{stage:24}{value:6.0f} s" for stage, value in seconds.items()))
    print(f"\nreport: {report}")
    return DemoResult(table, report, seconds)


def held_out_captions(configs: Sequence[RunConfig], count: int) -> list[Caption]:
    """Captions of the same kind as the first config's data, of scenes that none of the configs trains on.

    Raises:
        ValueError: if a config's data are not scenes of the small world.
    """
    data = [config.data for config in configs]
    for config in data:
        if not isinstance(config, ScenesConfig):
            found = None if config is None else config.name
            raise ValueError(f"the demo measures facts, which only the data 'scenes' has; got {found!r}")
    scenes: Any = data[0]
    seed = HELD_OUT + max(config.seed for config in data if isinstance(config, ScenesConfig))
    held_out = ScenesConfig.model_validate({**scenes.model_dump(), "size": count, "seed": seed}).build(Runtime())
    return [held_out.scene(i)[1] for i in range(count)]


def _base(align: RunConfig, runtime: Runtime) -> tuple[Any, Encoder]:
    """The backbone before training, with the text model that it was trained with, cut at its window."""
    checkpoint = getattr(align.backbone, "checkpoint", None)
    if checkpoint is None:
        raise ValueError(
            f"the demo needs a backbone with a checkpoint that holds its text encoder, not {align.backbone}"
        )
    encoder = {"name": "clip-truncate", "checkpoint": checkpoint}
    composition = build_from_config({"backbone": align.backbone, "encoder": encoder}, runtime)
    return composition.backbone, composition.encoder


def claim_output(output: Path, runs: Sequence[Path]) -> None:
    """Takes a folder for the demo, removing an earlier demo's runs but nothing else."""
    marker = output / MARKER
    if output.exists() and any(output.iterdir()) and not marker.exists():
        raise ValueError(f"{output} is not empty and not an earlier demo's; choose another output")
    for run in runs:
        if run.exists():
            shutil.rmtree(run)
    output.mkdir(parents=True, exist_ok=True)
    marker.touch()


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"== {stage}", flush=True)
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def _unread(encoder: Encoder, captions: Sequence[Caption]) -> list[frozenset[int]]:
    """For each caption, the sentences of which the encoder does not read the end."""
    reports = encoder.cut([c.text for c in captions])
    return [unread_sentences(caption, report) for caption, report in zip(captions, reports, strict=True)]


def unread_sentences(caption: Caption, report: PromptReport) -> frozenset[int]:
    """Indices of the sentences that reach into what was cut; the cut is the end of the text."""
    if not report.cut.strip():
        return frozenset()
    # counted without blanks, which encoders keep or drop as they split
    total = len("".join(caption.text.split()))
    read = total - len("".join(report.cut.split()))
    found, end = set(), 0
    for i, sentence in enumerate(caption.sentences):
        end += len("".join(sentence.text.split()))
        if end > read:
            found.add(i)
    return frozenset(found)


@torch.no_grad()
def _example(
    index: int,
    caption: Caption,
    images: Mapping[str, Tensor],
    unread: Mapping[str, Sequence[frozenset[int]]],
    facts: FactMetric,
    scores: DecomposedMetric,
) -> Example:
    sentences = [sentence.text for sentence in caption.sentences]
    embed, texts = scores.reward.image_features, scores.reward.text_features(sentences)
    shown = {name: drawn[index] for name, drawn in images.items()}
    return Example(
        sentences=sentences,
        seed=index,
        images=shown,
        verdicts={name: facts.verdicts(image[None], [caption.text])[0] for name, image in shown.items()},
        scores={name: (embed(image[None]) * texts).sum(-1).tolist() for name, image in shown.items()},
        unread={name: rows[index] for name, rows in unread.items()},
    )


def _lead(first: RunConfig, second: RunConfig, captions: Sequence[Caption], guidance: float, steps: int) -> str:
    words = sorted(caption.num_words for caption in captions)
    return (
        f"The bundled model learned to draw from short captions. It was fine-tuned on long ones for {first.loop.steps} "
        f"steps (align), then on a preference model for {second.loop.steps} steps (align+reward). Here it draws "
        f"{len(captions)} held-out captions of {words[0]} to {words[-1]} words before, between and after, with {steps} "
        f"sampling steps and guidance {guidance:g}. The base reads a caption up to its text encoder's window, as "
        "Stable Diffusion does. Facts are read from the pixels without any learned model. The images shown are those "
        "of the first captions, not chosen."
    )
