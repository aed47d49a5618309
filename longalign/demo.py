"""The demo: trains the two stages of LongAlign on synthetic scenes and evaluates them on held-out long captions.

The stage ``align`` fine-tunes a diffusion model on images with long captions. The stage ``reward`` then fine-tunes the
result on the score of a preference model.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from longalign import registry
from longalign.checkpoints.checkpoint import load_for_sampling
from longalign.compose import build_from_config
from longalign.config.changes import override
from longalign.config.run import RunConfig
from longalign.data.scenes.config import HELD_OUT, ScenesConfig
from longalign.encoders.base import Encoder, PromptReport, TruncationWarning
from longalign.evaluation.comparison import findings
from longalign.evaluation.measure import observe, tabulate
from longalign.evaluation.report import write_report
from longalign.evaluation.sentences import image_features, measure_sentences
from longalign.evaluation.sources import TABLE, read_sources, table_data
from longalign.evaluation.table import MetricTable
from longalign.image_folder import append_images, image_row
from longalign.inference.sampling import sample
from longalign.loop.fit import fit
from longalign.metrics import FactMetric, Gauges, RewardMetric
from longalign.mini.captions import Caption
from longalign.runtime import Runtime, examples_folder

BASE, SEGMENTS, ALIGN, REWARD = "truncated", "segments", "align", "align+reward"
MARKER = ".longalign-demo"


@dataclass(frozen=True)
class DemoResult:
    """Results of `run_demo`.

    Attributes:
        table: metrics of each model that `run_demo` lists.
        report: path of the HTML report.
        seconds: name of a step, such as ``"align: training"``, or ``"total"`` -> duration in seconds.
    """

    table: MetricTable
    report: Path
    seconds: dict[str, float] = field(default_factory=dict)


def default_config(name: str) -> Path:
    """Returns the bundled config file ``mini-<name>.yaml`` of a demo stage, ``"align"`` or ``"reward"``."""
    return examples_folder() / f"mini-{name}.yaml"


def run_demo(
    output: Path | str = "runs/demo",
    align: Mapping[str, Any] | Path | str | RunConfig | None = None,
    reward: Mapping[str, Any] | Path | str | RunConfig | None = None,
    prompts: int = 128,
    *,
    num_steps: int = 10,
    batch_size: int = 64,
    examples: int | None = None,
    device: str | None = None,
) -> DemoResult:
    """Trains the stages ``align`` and ``reward``, samples held-out captions with each model, and writes a report.

    The models are compared on the same captions and noise:

    - ``truncated``: the bundled diffusion model, with captions truncated at CLIP's window, as in Stable Diffusion;
    - ``segments``: the same weights, with the encoder of the stage ``align``, which encodes captions in segments;
    - ``align``: the model ``segments``, fine-tuned on long captions;
    - ``align+reward, omega 1``: the model ``align``, fine-tuned further on the original score of a preference model;
    - ``align+reward, omega <w>``: the model ``align``, fine-tuned further on the score whose text-irrelevant part has
      weight ``w`` instead of 1 (LongAlign, arXiv 2410.11817, section 4).

    Args:
        output: folder for the runs, ``report.html``, ``table.json``, ``table.md``, and the images in
            ``images/<model>``; an earlier demo is replaced.
        align: config of the stage ``align``; the bundled config if None. The data must be ``scenes``.
        reward: config of the stage ``reward``; the bundled config if None. The first reward is also a metric, with
            its original score. If its ``omega`` is missing or 1, a single model ``align+reward`` replaces the last two.
        prompts: number of held-out captions, at least 2.
        num_steps: number of sampling steps. The guidance scale is that of the trainer of the stage ``reward``, or 7.5.
        batch_size: number of images sampled at a time.
        examples: number of captions that the report shows with images, starting with the first; all if None.
        device: a torch device, e.g. ``"cuda:1"``; the fastest available one if None.

    Raises:
        ValueError: if ``output`` is neither empty nor the output of an earlier demo, ``prompts`` is below 2, or a
            config is invalid or has other data than ``scenes``.
        KeyboardInterrupt: if training was interrupted.
    """
    if prompts < 2:
        raise ValueError(f"expected at least 2 prompts, to compute confidence intervals of differences, got {prompts}")
    output = Path(output)
    align_config = override(align or default_config("align"), {"output": str(output / ALIGN)})
    reward_config = override(reward or default_config("reward"), {"init_from": None})
    configs = {ALIGN: align_config, **reward_runs(reward_config, output)}
    captions = held_out_captions([align_config, reward_config], prompts)
    images_dir = output / "images"
    prepare_output_dir(output, [*(Path(config.output) for config in configs.values()), images_dir])
    seconds: dict[str, float] = {}

    checkpoints: dict[str, Path] = {}
    for name, config in configs.items():
        start = {"init_from": str(checkpoints[ALIGN])} if checkpoints else {}
        configs[name] = override(config, start)
        with _timed(f"{name}: training", seconds):
            run = fit(configs[name], device=device)
        if run.interrupted:
            raise KeyboardInterrupt
        checkpoints[name] = run.checkpoint

    runtime = Runtime.detect(device=device)
    texts, seeds = [c.text for c in captions], list(range(len(captions)))
    guidance = getattr(reward_config.trainer, "guidance", 7.5)
    settings = {"num_steps": num_steps, "guidance": guidance, "batch_size": batch_size}
    images: dict[str, Tensor] = {}
    for name in (BASE, SEGMENTS, *configs):
        # the report shows which sentences were truncated
        with _timed(f"{name}: sampling", seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)
            if name in (BASE, SEGMENTS):
                backbone, encoder = _untrained(align_config, runtime, truncated=name == BASE)
            else:
                backbone, encoder = load_for_sampling(checkpoints[name], runtime)[1:]
            images[name] = sample(backbone, encoder, texts, seeds=seeds, **settings, progress=True)
            reports = encoder.report(texts)
            _save_images(images_dir / image_folder(name), images[name], texts, reports, {"model": name, **settings})

    with _timed("measuring", seconds):
        inner = getattr(reward_config.rewards[0], "inner", reward_config.rewards[0])
        facts, scores = FactMetric(captions), RewardMetric(inner.name, inner.build(runtime))
        metrics = [facts, scores, _held_out(inner.name, runtime), Gauges("look")]
        observed = {name: observe(rows, texts, metrics) for name, rows in images.items()}
        table = _columns(tabulate(observed, texts, metrics, seeds))
        features = image_features(scores, metrics, observed)
        sentences = measure_sentences(images, texts, facts, scores, batch_size, features)

    seconds["total"] = sum(seconds.values())
    data = table_data(
        table,
        {name: images_dir / image_folder(name) for name in images},
        output / TABLE,
        sentences,
        title="LongAlign on the synthetic scenes",
        lead=_lead(configs, captions, guidance, num_steps),
        seconds=seconds,
    )
    (output / TABLE).write_text(json.dumps(data, indent=1), encoding="utf-8")
    report = write_report(output / "report.html", **read_sources([str(output)], examples))
    (output / "table.md").write_text(table.markdown(), encoding="utf-8")
    print("\n" + table.text() + "\n" + "\n".join(findings(table)) + "\n")
    print("\n".join(f"{stage:32}{value:6.0f} s" for stage, value in seconds.items()))
    print(f"\nreport: {report}\nimages: {images_dir}")
    return DemoResult(table, report, seconds)


def reward_runs(reward: RunConfig, output: Path) -> dict[str, RunConfig]:
    """Returns the configs of the runs of the stage ``reward``: name of the trained model -> config.

    There are two runs, ``align+reward, omega 1`` (the original score of the first reward) and ``align+reward, omega
    <w>``, where w is the omega in the config. If the first reward has no ``omega``, or omega 1, there is only one run,
    ``align+reward``.

    Args:
        reward: config of the stage.
        output: folder of the demo, in which each run gets a subfolder.
    """
    omega = getattr(reward.rewards[0], "omega", 1)
    if omega == 1:
        return {REWARD: override(reward, {"output": str(output / "reward")})}
    return {
        f"{REWARD}, omega {weight:g}": override(reward, {"rewards.0.omega": weight, "output": str(output / folder)})
        for weight, folder in ((1.0, "reward-omega-1"), (omega, "reward"))
    }


def held_out_captions(configs: Sequence[RunConfig], count: int) -> list[Caption]:
    """Returns ``count`` captions of synthetic scenes that none of the configs trains on.

    The scenes have the settings of the data of the first config, with a different seed.

    Raises:
        ValueError: if the data of a config is not ``scenes``.
    """
    data = [config.data for config in configs]
    for config in data:
        if not isinstance(config, ScenesConfig):
            name = None if config is None else config.name
            raise ValueError(
                f"the demo measures facts, which only the data 'scenes' provides, got {name!r}; set data to 'scenes'"
            )
    scenes: Any = data[0]
    seed = HELD_OUT + max(config.seed for config in data if isinstance(config, ScenesConfig))
    held_out = ScenesConfig.model_validate({**scenes.model_dump(), "size": count, "seed": seed}).build(Runtime())
    return [held_out.scene(i)[1] for i in range(count)]


def _untrained(align: RunConfig, runtime: Runtime, truncated: bool) -> tuple[Any, Encoder]:
    """Returns the backbone of the config ``align`` before training, and an encoder.

    The encoder is that of the config, or with ``truncated`` one that truncates prompts at the window of the text model.
    """
    checkpoint = getattr(align.backbone, "checkpoint", None)
    if checkpoint is None:
        raise ValueError(
            f"expected a backbone with a 'checkpoint' that contains a text encoder, got {align.backbone}; change the "
            "backbone of the align stage"
        )
    encoder = {"name": "clip-truncate", "checkpoint": checkpoint} if truncated else align.encoder
    composition = build_from_config({"backbone": align.backbone, "encoder": encoder}, runtime)
    return composition.backbone, composition.encoder


def image_folder(model: str) -> str:
    """Returns the name of the subfolder of ``images/`` with the images of a model, e.g. ``align-reward-omega-0-3``."""
    return re.sub(r"\W+", "-", model)


def _save_images(
    folder: Path, images: Tensor, texts: Sequence[str], reports: Sequence[PromptReport], settings: Mapping[str, Any]
) -> None:
    """Writes images and ``metadata.jsonl`` in the format of `longalign.inference.sampling.generate`.

    Args:
        folder: a folder that does not exist.
        images: ``(n, 3, h, w)`` in [0, 1].
        texts: the n captions. The seed recorded for an image is the index of its caption.
        reports: what the encoder truncated, for each caption.
        settings: sampling settings, for the metadata.
    """
    folder.mkdir(parents=True)
    rows = [
        image_row(i, text, seed=i, truncated=report.truncated)
        for i, (text, report) in enumerate(zip(texts, reports, strict=True))
    ]
    append_images(folder, rows, images, {"settings": json.dumps(settings)})


def prepare_output_dir(output: Path, runs: Sequence[Path]) -> None:
    """Creates the output folder of the demo, or clears that of an earlier demo.

    Args:
        output: the output folder.
        runs: folders of runs and images, which are deleted if they exist. No other files are deleted.

    Raises:
        ValueError: if ``output`` is neither empty nor the output of an earlier demo.
    """
    marker = output / MARKER
    if output.exists() and any(output.iterdir()) and not marker.exists():
        raise ValueError(f"{output} is not empty and not the output of an earlier demo; choose a different output")
    for run in runs:
        if run.exists():
            shutil.rmtree(run)
    output.mkdir(parents=True, exist_ok=True)
    marker.touch()


def _held_out(trained: str, runtime: Runtime) -> RewardMetric:
    """Returns the metric of a reward that is not trained on: HPSv2 if ``trained`` is "pickscore", else PickScore."""
    name = "hpsv2" if trained == "pickscore" else "pickscore"
    return RewardMetric(
        f"held-out {name}", registry.rewards.build({"name": name, "checkpoint": f"mini/{name}"}, runtime)
    )


def _columns(table: MetricTable) -> MetricTable:
    """Returns the table with only the metrics that the demo shows.

    These are the statements of the captions that hold in the images (``facts``), the text-relevant and text-irrelevant
    parts of both rewards, and two image statistics: ``warmth`` and ``dark``.
    """
    shown = ("text_relevant", "text_irrelevant", "warmth", "dark")
    kept = {
        model: {name: row for name, row in rows.items() if name.startswith("facts") or name.endswith(shown)}
        for model, rows in table.values.items()
    }
    return replace(table, values=kept)


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"== {stage}", flush=True)
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def _lead(configs: Mapping[str, RunConfig], captions: Sequence[Caption], guidance: float, num_steps: int) -> str:
    words = sorted(caption.num_words for caption in captions)
    rewards = [name for name in configs if name != ALIGN]
    return (
        f"The bundled model was trained on short captions. {len(configs) + 2} models sample {len(captions)} held-out "
        f"captions of {words[0]} to {words[-1]} words from the same noise, with {num_steps} sampling steps and "
        f"guidance {guidance:g}. {BASE}: captions are truncated at the text encoder's window, as in Stable Diffusion. "
        f"{SEGMENTS}: the same weights, with captions encoded in segments. {ALIGN}: fine-tuned on long captions for "
        f"{configs[ALIGN].loop.steps} steps. {'; '.join(rewards)}: then fine-tuned on a preference model for "
        f"{configs[rewards[0]].loop.steps} steps. Omega is the weight of the part of its score that does not depend on "
        "the text; 1 is the original score. The held-out reward is not trained on. Dark is the share of dark pixels, "
        "warmth the mean of red minus blue. Facts are read from the pixels without a learned model. The images are not "
        "selected; the files are in the folder 'images' beside this page."
    )
