"""Fact accuracy and reward against seconds of training, for each method of choosing gradient steps.

All runs start from the demo's align stage and run the demo's reward stage for the same seconds, with several seeds. At
the same seconds, outside the timed part, images are generated for the same held-out long captions from the same noise.
The oracle measures the facts. The preference model gives its score and the text-relevant part of it.

Each run writes a file in ``--folder`` and is skipped if the file exists, so an interrupted benchmark resumes.
Run ``python benchmarks/convergence.py [--budget 60] [--seeds 0 1 2] [loop.lr=1e-4 ...]``. It writes a table and a chart
next to itself and takes 35 minutes on two cores with 0.13 TFLOP/s.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reward_step import non_default_options, table

from longalign.checkpoints.checkpoint import load_for_sampling
from longalign.config.changes import override, parse_assignments
from longalign.config.run import RunConfig, load_config, to_dict
from longalign.demo import default_config, held_out_captions
from longalign.encoders.base import TruncationWarning
from longalign.evaluation.bootstrap import Interval
from longalign.evaluation.charts import ticks
from longalign.evaluation.measure import measure
from longalign.evaluation.record import machine_text
from longalign.files.fingerprint import fingerprint, fingerprints
from longalign.files.paths import checkpoint_file
from longalign.inference.sampling import sample
from longalign.loop.fit import fit
from longalign.loop.run import Run
from longalign.metrics import FactMetric, RewardMetric
from longalign.runtime import Runtime
from longalign.trainers.diffusion import evaluating

METHODS: dict[str, dict[str, int]] = {
    "grouped-random": {"groups": 2},
    "drtune": {"groups": 2, "early_stop": 3},
    "last": {"k": 2},
    "all": {},
    "draft-k": {"k": 2},
    "draft-lv": {"copies": 2},
    "align-prop": {},
    "refl": {"early_stop": 3},
}
"""Two gradient steps where the method has a free number; an early stop in the last quarter, as 10 of 40."""
METRICS = {"facts": "fact accuracy, %", "score": "held-out reward", "relevant": "its text-relevant part"}
DIGITS = {"facts": 1, "score": 4, "relevant": 4}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
ENDLESS = 1_000_000

Rows = list[dict[str, Any]]


class Evaluation:
    """Generates images for ``count`` held-out captions, always from the same noise, and measures them.

    The captions are sampled as in the align stage. The reward stage's reward is used without reweighting.
    """

    def __init__(self, align: RunConfig, reward: RunConfig, count: int, num_steps: int):
        captions = held_out_captions([align, reward], count)
        self.texts, self.num_steps = [caption.text for caption in captions], num_steps
        self.guidance = getattr(reward.trainer, "guidance", 7.5)
        inner: Any = getattr(reward.rewards[0], "inner", reward.rewards[0])
        self.metrics = [FactMetric(captions), RewardMetric("score", inner.build(Runtime.detect()))]

    def __call__(self, backbone: Any, encoder: Any) -> dict[str, list[float]]:
        """Returns each metric's values, one per caption."""
        with evaluating(backbone), evaluating(encoder), torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)
            settings = {"num_steps": self.num_steps, "guidance": self.guidance, "batch_size": 64}
            images = sample(backbone, encoder, self.texts, seeds=range(len(self.texts)), **settings)
        measured = measure(images, self.texts, self.metrics)
        metrics = {
            "facts": 100 * measured["facts"],
            "score": measured["score"],
            "relevant": measured["score.text_relevant"],
        }
        return {metric: np.round(values, 6).tolist() for metric, values in metrics.items()}


def train(config: RunConfig, marks: Sequence[float], in_steps: bool, evaluate: Evaluation) -> Rows:
    """Trains to the last mark, in seconds or steps, and evaluates the model at the step nearest to each mark."""
    shutil.rmtree(config.output, ignore_errors=True)
    run, rows, remaining = Run(config, Runtime.detect(config.loop.precision)), [], list(marks)
    seconds, start = 0.0, time.perf_counter()

    def after_step() -> bool:
        nonlocal seconds, start
        seconds += time.perf_counter() - start
        reached = run.step if in_steps else seconds + seconds / run.step / 2
        if reached >= remaining[0]:
            remaining[:] = [mark for mark in remaining if mark > reached]
            metrics = evaluate(run.composition.backbone, run.composition.encoder)
            rows.append({"step": run.step, "seconds": round(seconds, 3), **metrics})
        start = time.perf_counter()
        return not remaining

    try:
        run.train(after_step)
    finally:
        run.close()
    shutil.rmtree(config.output)
    return rows


def load_or_measure(path: Path, settings: Mapping[str, Any], make: Callable[[], Rows]) -> Rows:
    """Loads the rows of a file written with the same settings. If there is no file, calls ``make`` and writes it."""
    if path.exists():
        header, *rows = map(json.loads, path.read_text().splitlines())
        if header != json.loads(json.dumps(settings)):
            raise SystemExit(f"{path} was measured with different settings; remove it, or choose a different --folder")
        return rows
    rows = make()
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in (settings, *rows)))
    unfinished.replace(path)
    return rows


def start_checkpoint(path: Path | None, folder: Path) -> Path:
    """The checkpoint to start from: ``path``, the demo's, or one that is trained here like the demo's."""
    paths = [path] if path else [p for p in (Path("runs/demo/align"), folder / "align") if p.is_dir()]
    if not paths:
        config = override(default_config("align"), {"output": str(folder / "align")})
        paths = [fit(config).checkpoint]
    return checkpoint_file(paths[0])


def interval(values: np.ndarray, resamples: int = 4000) -> Interval:
    """Mean of ``(seeds, prompts)`` and its 95% bootstrap interval; both seeds and prompts are resampled."""
    rng = np.random.default_rng(0)
    seeds, prompts = (rng.multinomial(n, np.full(n, 1 / n), resamples) / n for n in values.shape)
    means = np.einsum("ds,sp,dp->d", seeds, values, prompts)
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high), values.size)


def verdict(metric: str, ends: Mapping[str, np.ndarray]) -> str:
    """The best method by a metric, and the methods without a significant paired difference to it."""
    best = max(ends, key=lambda name: ends[name].mean())
    lower = {name: interval(ends[best] - ends[name]).low > 0 for name in ends if name != best}
    same, below = ([f"`{name}`" for name, is_lower in lower.items() if is_lower == side] for side in (False, True))
    summary = f"not significantly different: {', '.join(same) or 'none'}; lower: {', '.join(below) or 'none'}."
    return f"- {METRICS[metric].split(',')[0]}: highest with `{best}`; {summary}"


def panel(metric: str, left: int, lines: Mapping[str, Sequence[tuple[float, np.ndarray]]]) -> list[str]:
    """A chart of means over seeds, with bars from the lowest seed to the highest."""
    plotted = np.concatenate([values for line in lines.values() for _, values in line])
    pad = (plotted.max() - plotted.min()) * 0.08 or 1.0
    low, high, longest = plotted.min() - pad, plotted.max() + pad, max(x for line in lines.values() for x, _ in line)
    x_of, y_of = (lambda x: left + 55 + x / longest * 330), (lambda y: 260 - (y - low) / (high - low) * 230)
    parts = [f'<text x="{left + 220}" y="18" text-anchor="middle" font-weight="bold">{METRICS[metric]}</text>']
    for y in ticks(low, high, 5):
        parts.append(f'<path d="M{left + 55} {y_of(y):.1f}h345" stroke="#ddd"/>')
        parts.append(f'<text x="{left + 50}" y="{y_of(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    parts += [f'<text x="{x_of(x):.1f}" y="278" text-anchor="middle">{x:g} s</text>' for x in ticks(0, longest, 6)]
    for i, (name, line) in enumerate(lines.items()):
        # offset bars that would overlap
        at = [(x_of(x) + (2.5 * (i - (len(lines) - 1) / 2) if x else 0), values) for x, values in line]
        points = " ".join(f"{x:.1f},{y_of(values.mean()):.1f}" for x, values in at)
        parts.append(f'<g stroke="{COLOURS[i]}" fill="none"><title>{name}</title>')
        parts.append(f'<polyline points="{points}" stroke-width="1.8"/>')
        parts += [f'<path d="M{x:.1f} {y_of(values.min()):.1f}V{y_of(values.max()):.1f}"/>' for x, values in at]
        parts += [f'<circle cx="{x:.1f}" cy="{y_of(values.mean()):.1f}" r="2.5" fill="white"/>' for x, values in at]
        parts.append("</g>")
    return parts


def chart(start: Mapping[str, Any], runs: Mapping[str, Sequence[Rows]]) -> str:
    """Fact accuracy and reward against seconds in two panels, and a legend, as one SVG file."""
    parts = ['<rect width="880" height="345" fill="white"/>']
    for i, metric in enumerate(("facts", "score")):
        marks = {name: [(start,), *zip(*each, strict=False)] for name, each in runs.items()}  # rows of all seeds
        parts += panel(metric, 440 * i, {name: [_point(rows, metric) for rows in at] for name, at in marks.items()})
    for i, name in enumerate(runs):
        x, y = 60 + 205 * (i % 4), 308 + 20 * (i // 4)
        parts.append(f'<path d="M{x} {y - 4}h24" stroke="{COLOURS[i]}" stroke-width="2.5"/>')
        parts.append(f'<text x="{x + 30}" y="{y}">{name}</text>')
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 880 345" font-family="sans-serif" font-size="12">'
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def _point(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[float, np.ndarray]:
    """Mean seconds, and each seed's mean over the prompts."""
    return float(np.mean([row["seconds"] for row in rows])), np.array([np.mean(row[metric]) for row in rows])


def report(
    command: str, options: argparse.Namespace, start: Mapping[str, Any], runs: Mapping[str, Sequence[Rows]]
) -> str:
    """Returns the table and the best methods as text; writes the chart next to the table."""
    picture = options.output.with_suffix(".svg")
    picture.write_text(chart(start, runs))
    ends = {m: {name: np.array([rows[-1][m] for rows in each]) for name, each in runs.items()} for m in METRICS}
    body = []
    for name, each in runs.items():
        steps, seconds = (np.mean([rows[-1][key] for rows in each]) for key in ("step", "seconds"))
        summary = ", ".join(f"{key}: {value}" for key, value in {"name": name, **METHODS[name]}.items())
        cells = []
        for m, digits in DIGITS.items():
            change = interval(ends[m][name] - np.array(start[m]))
            mean, low, high = (f"{value:+.{digits}f}" for value in (change.mean, change.low, change.high))
            cells.append(f"{mean} [{low}, {high}]")
        body.append([f"`{{{summary}}}`", f"{seconds:.0f}", f"{steps:.1f}", f"{seconds / steps:.2f}", *cells])
    start_values = ", ".join(f"{METRICS[m]} {np.mean(start[m]):.{digits}f}" for m, digits in DIGITS.items())
    length = f"{options.steps} steps" if options.steps else f"{options.budget:g} seconds of training"
    lines = [
        "# Convergence per cost on the synthetic scenes", "",
        f"`python benchmarks/convergence.py{command}`", "",
        f"The demo's reward stage from one checkpoint of its align stage, {length}, {len(options.seeds)} seed(s). "
        f"{options.prompts} held-out captions from the same noise, {options.sampling} sampling steps. At the start: "
        f"{start_values}. Differences to the start are paired, with 95% bootstrap intervals over prompts and "
        "seeds.", "",
        *table(["gradient_steps", "seconds", "steps", "seconds per step", *METRICS.values()], body),
        "Paired differences between the methods at the end:", "", *(verdict(m, ends[m]) for m in METRICS), "",
        f"![Means over seeds; bars from the lowest to the highest seed]({picture.name})", "",
        f"Machine: {machine_text()}.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="path=value", help="changes to the demo's reward stage")
    parser.add_argument("--start", type=Path, help="checkpoint to start from (the demo's align stage)")
    parser.add_argument("--folder", type=Path, default=Path("runs/convergence"), help="folder of the measurements")
    parser.add_argument("--gradient-steps", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of training per run (60)")
    parser.add_argument("--steps", type=int, help="steps per run, instead of seconds")
    parser.add_argument("--every", type=float, help="seconds, or steps, between evaluations (half of a run)")
    parser.add_argument("--prompts", type=int, default=64, help="held-out captions (64)")
    parser.add_argument("--sampling", type=int, default=10, help="sampling steps of an evaluation (10)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"), help="file for the table")
    options = parser.parse_args()
    logging.getLogger("longalign").setLevel(logging.ERROR)  # runs are stopped before their last step on purpose
    options.folder.mkdir(parents=True, exist_ok=True)
    start, end = start_checkpoint(options.start, options.folder), options.steps or options.budget
    every = options.every or end / 2
    marks = [every * i for i in range(1, math.ceil(end / every - 1e-9))] + [end]

    demo = override(default_config("reward"), {**parse_assignments(options.changes), "init_from": None})
    common = {
        "start": fingerprint(str(start), None, None, ()), "prompts": options.prompts, "sampling": options.sampling,
        "weights": fingerprints(to_dict(demo), ("unet", "vae", "text_encoder", "tokenizer")),
    }  # fmt: skip
    evaluate = Evaluation(load_config(start), demo, options.prompts, options.sampling)
    (start_metrics,) = load_or_measure(
        options.folder / "start.jsonl", common, lambda: [evaluate(*load_for_sampling(start)[1:])]
    )
    runs: dict[str, list[Rows]] = {name: [] for name in options.gradient_steps}
    for seed in options.seeds:
        for name in options.gradient_steps:
            print(f"== {name}, seed {seed}", flush=True)
            gradient_steps = {"name": name, **METHODS[name]}
            config = override(demo, {"trainer.gradient_steps": gradient_steps, "trainer.replay_batch": 1, "seed": seed})
            trainer: Any = config.trainer
            if trainer.gradient_steps.detaches():
                config = override(config, {"trainer.replay_batch": getattr(demo.trainer, "replay_batch", 1)})
            settings = {**common, "config": to_dict(config), "marks": marks, "in steps": options.steps is not None}
            changes = {"init_from": str(start), "output": str(options.folder / "run"), "loop.steps": ENDLESS}
            make = partial(train, override(config, changes), marks, options.steps is not None, evaluate)
            runs[name].append(load_or_measure(options.folder / f"{name}-{seed}.jsonl", settings, make))
    command = "".join(f" {change}" for change in options.changes)
    command += non_default_options(options, parser, ("changes", "start", "folder"))
    text = report(command, options, {"seconds": 0.0, **start_metrics}, runs)
    options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
