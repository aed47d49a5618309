"""Checks that the published checkpoints load and give plausible results. Run by ``examples/acceptance.sh``.

Results are compared with published values where there are any. Otherwise shapes and ranges are checked, states are
computed by two methods and compared, and a matching prompt must score higher than others.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longalign.checkpoints.markdown import table_cell
from longalign.checkpoints.redaction import redact_report
from longalign.diagnostics.checks import Row, Unavailable, compare, failed, run_step
from longalign.diagnostics.environment import environment
from longalign.diagnostics.published import LAVI_BRIDGE, PUBLISHED
from longalign.diagnostics.references import COLORS, ETA, HPS_EXAMPLES, LONG, SHORT
from longalign.hub import availability_problem, offline
from longalign.runtime import Runtime

REWARDS: dict[str, dict[str, Any]] = {
    "denscore": {"name": "denscore"},
    "pickscore": {"name": "pickscore"},
    "clip-h": {"name": "clip"},
    "hpsv2": {"name": "hpsv2", "version": "v2"},
    "hpsv2.1": {"name": "hpsv2", "version": "v2.1"},
}


@dataclass
class Acceptance:
    """The checks of the published checkpoints, and their settings.

    A step is a method that yields a `Row` for each check, with status ``"failed"`` if the check fails. A step raises
    `Unavailable` if one of its checkpoints cannot be found.

    Args:
        checkpoints: `longalign.diagnostics.published.Published.key` -> Hub id or folder to use instead of the published
            repository.
        output: folder for the converted checkpoint (``longsd/``) and the generated images (``images/``).
        device: a torch device, e.g. ``"cuda"``.
        num_steps: number of sampling steps per image.
        hps_images: folder with the images of `longalign.diagnostics.references.HPS_EXAMPLES`; None skips the comparison
            with their published scores.
    """

    checkpoints: dict[str, str]
    output: Path
    device: str
    num_steps: int = 25
    hps_images: Path | None = None

    def steps(self) -> dict[str, Callable[[], Iterator[Row]]]:
        """Returns the steps in the order in which they run: name -> function that loads checkpoints and yields rows."""
        rewards = {name: lambda name=name: self.reward(name) for name in REWARDS}
        return {
            "longsd": self.longsd,
            "sd15": self.segments,
            "t5": self.t5,
            "longclip": self.longclip,
            "generate": self.generate,
            **rewards,
        }

    def find(self, name: str) -> str:
        """Returns the Hub id or folder of a checkpoint: the one in ``checkpoints``, else the published repository.

        Downloads nothing and does not query the Hub.

        Args:
            name: name of an entry of `PUBLISHED`.

        Raises:
            Unavailable: if a local folder does not exist or lacks files. With ``HF_HUB_OFFLINE``, also if files of a
                Hub repository are not on this machine; without it, the files of a Hub repository are not checked.
        """
        (entry,) = (entry for entry in PUBLISHED if entry.name == name)
        entry = replace(entry, checkpoint=self.checkpoints.get(entry.key, entry.checkpoint))
        if problem := availability_problem(entry.checkpoint):
            raise Unavailable(problem)
        if (Path(entry.checkpoint).exists() or offline()) and (files := entry.missing()):
            raise Unavailable(f"'{entry.checkpoint}' does not contain {', '.join(files)}; download these files")
        return entry.checkpoint

    def build(self, kind: str, config: dict[str, Any]) -> Any:
        """Builds an encoder or reward in float32 from its config. ``kind`` is ``"encoders"`` or ``"rewards"``."""
        from longalign.registry import REGISTRIES

        return REGISTRIES[kind].build(config, Runtime(self.device))

    def longsd(self) -> Iterator[Row]:
        """Converts longSD (LongAlign's published weights) to a checkpoint in ``output``.

        Yields rows: for each LoRA file, whether it has 448 tensors, and its number of values; then whether the
        checkpoint was written.
        """
        from longalign.checkpoints.convert import LORAS, convert_longsd, read_tensors

        source = Path(self.find("longsd"))
        if not source.is_dir():
            from huggingface_hub import snapshot_download

            source = Path(snapshot_download(str(source)))
        for file, _ in LORAS.values():
            tensors = read_tensors(source / file)
            yield compare(f"{file}, tensors", len(tensors) == 448, str(len(tensors)), "448")
            values = f"{sum(t.numel() for t in tensors):,} values, {', '.join(sorted({str(t.dtype) for t in tensors}))}"
            yield Row(file, "info", values, "28,291,072 values, torch.float16")
        folder = self.output / "longsd"
        shutil.rmtree(folder, ignore_errors=True)
        convert_longsd(source, folder, self.find("sd15"), self.find("t5"))
        yield compare(
            "conversion", (folder / "longalign.safetensors").is_file(), "longalign.safetensors", "a checkpoint"
        )

    def segments(self) -> Iterator[Row]:
        """Yields three rows about prompts encoded in segments with the CLIP of Stable Diffusion 1.5.

        Checks that a short prompt has the same states as when encoded as a whole, that the state used as padding is the
        mean of the last 60 states of the empty prompt encoded as a whole, and that no part of a long prompt is dropped.
        """
        checkpoint = self.find("sd15")
        config = {"checkpoint": checkpoint, "segmenter": "longalign"}
        encoder = self.build("encoders", {"name": "clip-segment", **config})
        plain = self.build("encoders", {"name": "clip-truncate", "checkpoint": checkpoint})
        states, (report,) = encoder.encode([SHORT]).states[0], encoder.report([SHORT])
        length = 1 + report.tokens[0]
        yield _close("short prompt, segments and plain", states[:length], plain.encode([SHORT]).states[0, :length])
        yield _close("padding, mean of the last 60 states", states[-1], plain.encode([""]).states[0, -60:].mean(0))
        conditioning = encoder.encode([LONG[0]])
        dropped = conditioning.reports[0].truncated
        result = f"{sum(conditioning.reports[0].tokens)} tokens in {len(conditioning.reports[0].tokens)} segments"
        yield compare(
            "long prompt", not dropped, result + (f", dropped {dropped!r}" if dropped else ""), "nothing dropped"
        )

    def t5(self) -> Iterator[Row]:
        """Yields a row: whether T5 with LaVi-Bridge's adapter gives finite states ``(2, 240, dim)`` for two prompts."""
        adapter = {"checkpoint": self.find("lavi-bridge"), "subfolder": LAVI_BRIDGE[1]}
        encoder = self.build("encoders", {"name": "t5", "checkpoint": self.find("t5"), "adapter": adapter})
        states = encoder.encode([SHORT, ""]).states
        expected = (2, 240, encoder.dim)
        yield compare(
            "states", tuple(states.shape) == expected and _finite(states), _about(states), f"finite {expected}"
        )

    def longclip(self) -> Iterator[Row]:
        """Yields two rows: whether LongCLIP gives 248 finite states, and whether they depend on the word at token 121.

        The window of the original CLIP ends at token 77.
        """
        encoder = self.build("encoders", {"name": "longclip", "checkpoint": self.find("longclip"), **self.tokenizer()})
        first, second = encoder.encode(["fox " * 120 + word for word in ("red", "wall")]).states
        yield compare("states", first.shape[0] == 248 and _finite(first), _about(first), "248 finite states")
        differs = ((first - second).abs().amax(-1) > 1e-3).nonzero().flatten().tolist()
        result = f"from {differs[0]} on" if differs else "none"
        yield compare("states that depend on word 121", bool(differs) and differs[0] == 121, result, "from 121 on")

    def generate(self) -> Iterator[Row]:
        """Generates an image of each prompt in `LONG` with the checkpoint that `longsd` wrote.

        Yields a row per image: whether it is not constant, i.e. the standard deviation of its pixels is above 0.02.
        """
        shutil.rmtree(self.images, ignore_errors=True)
        folder = self.output / "longsd"
        if not (folder / "longalign.safetensors").is_file():
            raise Unavailable(
                f"no converted longSD in {folder}; run the step 'longsd' first, or fix the problem that it reports"
            )
        self.find("sd15")
        self.find("t5")
        from longalign.image_io import load_image
        from longalign.inference.sampling import generate

        dtype = "bfloat16" if self.device.startswith("cuda") else "float32"
        settings = {"num_steps": self.num_steps, "guidance": 7.5}
        rows = generate(folder, LONG, self.images, dtype=dtype, device=self.device, overwrite=True, **settings)
        for row in rows:
            image = load_image(self.images / row["file_name"])
            spread = float(image.std())
            size = f"{image.shape[-1]}x{image.shape[-2]}, standard deviation {spread:.3f}"
            yield compare(f"image {row['file_name']}", _finite(image) and spread > 0.02, size, "not a constant image")

    @property
    def images(self) -> Path:
        """Folder in which `generate` writes its images."""
        return self.output / "images"

    def reward(self, name: str) -> Iterator[Row]:
        """Yields the rows of one reward: those of `ranking`, and for HPS v2, those of `published_score`.

        `ranking` is called with images of one colour, and with the images that `generate` wrote, if there are any.
        Published scores are compared if ``hps_images`` is set. ``name`` is a key of `REWARDS`.
        """
        config = {**REWARDS[name], "checkpoint": self.find(name)}
        reward = self.build("rewards", config if name.startswith("hpsv2") else {**config, **self.processor()}).eval()
        yield from self.ranking(reward, "plain colours", *_colour_images())
        index = self.images / "metadata.jsonl"
        if index.is_file():
            from longalign.image_folder import read_images
            from longalign.image_io import load_image

            rows = read_images(self.images)
            yield from self.ranking(
                reward, "generated", [load_image(path) for path, _, _ in rows], [p for _, p, _ in rows]
            )
        if name in ETA:
            yield Row("mean eta of three prompts", "info", f"{_mean_eta(reward):.3f}", f"mode {ETA[name]} in the paper")
        for file, prompt, score in HPS_EXAMPLES if name == "hpsv2" else ():
            if self.hps_images is not None and (self.hps_images / file).is_file():
                yield self.published_score(reward, self.hps_images / file, prompt, score)

    def published_score(self, reward: Any, path: Path, prompt: str, expected: float) -> Row:
        """Returns a row: whether a reward scores the image in ``path`` with ``prompt`` within 0.002 of ``expected``."""
        from longalign.image_io import load_image

        score = float(reward.score(load_image(path)[None].to(self.device), [prompt]))
        return compare(
            f"published score of {path.name}", abs(score - expected) < 2e-3, f"{score:.4f}", f"{expected:.4f}"
        )

    def ranking(self, reward: Any, what: str, images: Sequence[Any], prompts: Sequence[str]) -> Iterator[Row]:
        """Scores every image with every prompt, and yields two rows.

        The first: whether all scores are cosines. The second: whether the scores of matching prompts are higher on
        average than the other scores.

        Args:
            reward: a reward with the methods ``image_features`` and ``text_features``.
            what: description of the images, for the names of the checks.
            images: n images ``(3, h, w)`` in [0, 1].
            prompts: n prompts; the i-th one matches the i-th image.
        """
        import torch

        with torch.no_grad():
            features = torch.cat([reward.image_features(image[None].to(self.device)) for image in images])
            scores = features @ reward.text_features(list(prompts)).T
        ok = _finite(scores) and bool(scores.abs().max() <= 1.001)
        values = f"{float(scores.min()):.4f} to {float(scores.max()):.4f}"
        yield compare(f"scores, {what}", ok, values, "cosines")
        best = int((scores.argmax(1).cpu() == torch.arange(len(images))).sum())
        mean = float(scores.diagonal().mean())
        others = float((scores.sum() - scores.diagonal().sum()) / (scores.numel() - len(images)))
        result = f"{best} of {len(images)} images, mean {mean:.4f} and {others:.4f}"
        yield compare(f"matching prompt scores highest, {what}", mean > others, result, "matching mean above others")

    def processor(self) -> dict[str, str]:
        """Returns ``{"processor": checkpoint}``, a key for the config of a reward, with ``checkpoints["clip-h"]``.

        Returns an empty mapping if ``checkpoints`` has no such entry.
        """
        return {"processor": self.checkpoints["clip-h"]} if "clip-h" in self.checkpoints else {}

    def tokenizer(self) -> dict[str, str]:
        """Returns ``{"tokenizer": folder}``, a key for the config of LongCLIP.

        ``folder`` is the subfolder ``tokenizer`` of the folder ``checkpoints["sd15"]``; if there is none, the result is
        empty.
        """
        folder = Path(self.checkpoints.get("sd15", "")) / "tokenizer"
        return {"tokenizer": str(folder)} if folder.is_dir() else {}


def _colour_images() -> tuple[list[Any], list[str]]:
    import torch

    images = [torch.tensor(rgb)[:, None, None].expand(3, 224, 224).contiguous() for rgb in COLORS.values()]
    return images, [f"A plain {name} background." for name in COLORS]


def _mean_eta(reward: Any) -> float:
    from longalign.functional.preference import common_direction, eta

    text = reward.text_features(list(LONG))
    return float(eta(text, common_direction(text)).mean())


def _close(check: str, a: Any, b: Any) -> Row:
    difference = float((a - b).abs().max())
    return compare(check, difference < 1e-3, f"largest difference {difference:.2g}", "below 1e-3")


def _finite(tensor: Any) -> bool:
    return bool(tensor.isfinite().all())


def _about(states: Any) -> str:
    return f"{tuple(states.shape)}, standard deviation {states.float().std():.3g}"


def run(acceptance: Acceptance, only: Sequence[str] = ()) -> list[tuple[str, Row]]:
    """Runs the steps of the checks and returns ``(name of the step, row)`` for each result.

    An exception, also that of a missing checkpoint, becomes a row, and the next step runs. On CUDA, the last row of
    each step shows its peak GPU memory.

    Args:
        acceptance: the checks.
        only: names of the steps to run; empty for all.
    """
    import torch

    out: list[tuple[str, Row]] = []
    cuda = acceptance.device.startswith("cuda")
    for name, step in acceptance.steps().items():
        if only and name not in only:
            continue
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        out += [(name, row) for row in run_step(name, lambda step=step: _unavailable(step))]
        if cuda:
            out.append((name, Row("peak GPU memory", "info", f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")))
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    return out


def _unavailable(step: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """Yields the rows of a step; errors of the Hub's client, e.g. a failed download, are raised as `Unavailable`."""
    try:
        yield from step()
    except Unavailable:
        raise
    except Exception as error:
        current: BaseException | None = error
        while current is not None:
            if type(current).__module__.split(".")[0] in ("huggingface_hub", "httpx", "requests"):
                raise Unavailable(str(error).partition("\n")[0]) from error
            current = current.__cause__ or current.__context__
        raise


def table(rows: Sequence[tuple[str, Row]]) -> str:
    """Returns a Markdown table of ``(name of the step, row)`` pairs, without credentials and user names."""
    lines = ["| step | check | status | result | expected | seconds |", "|---|---|---|---|---|---|"]
    for step, row in rows:
        cells = [step, row.check, row.status, row.result, row.expected, f"{row.seconds:.1f}" if row.seconds else ""]
        lines.append(f"| {' | '.join(table_cell(redact_report(cell)) for cell in cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the checks from the command line; writes ``acceptance.md`` and ``acceptance.json`` to ``--output``.

    Args:
        argv: the command-line arguments; those of the process if None.

    Returns:
        The exit status: 1 if a check failed, else 0.
    """
    names = list(dict.fromkeys(entry.key for entry in PUBLISHED))
    parser = argparse.ArgumentParser(prog="acceptance", description="Checks the published checkpoints.")
    parser.add_argument("checkpoints", nargs="*", metavar="NAME=CHECKPOINT", help=f"Hub id or folder of {names}")
    parser.add_argument("--output", type=Path, default=Path("runs/acceptance"))
    parser.add_argument("--device", help="the fastest available one by default")
    parser.add_argument("--num-steps", type=int, default=25, help="sampling steps")
    parser.add_argument("--hps-images", type=Path, help="folder of the published examples of HPS v2")
    parser.add_argument("--only", nargs="+", default=[], help="only these steps")
    args = parser.parse_args(argv)
    given = dict(text.split("=", 1) for text in args.checkpoints if "=" in text)
    if len(given) < len(args.checkpoints) or not set(given) <= set(names):
        parser.error(f"expected NAME=CHECKPOINT with a name in {', '.join(names)}, got {args.checkpoints}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.output.mkdir(parents=True, exist_ok=True)
    device = Runtime.detect(device=args.device).device
    acceptance = Acceptance(given, args.output, device, args.num_steps, args.hps_images)
    unknown = set(args.only) - set(acceptance.steps())
    if unknown:
        parser.error(f"expected steps among {', '.join(acceptance.steps())}, got {', '.join(sorted(unknown))}")
    rows = run(acceptance, args.only)
    facts = {key: redact_report(value) for key, value in environment().items()}
    shown = (
        "longalign",
        "torch",
        "diffusers",
        "transformers",
        "open_clip_torch",
        "peft",
        "python",
        "processor",
        "cuda:0",
    )
    versions = ", ".join(f"{key} {facts[key]}" for key in shown if key in facts)
    text = f"{versions}; on {device}\n\n{table(rows)}\n"
    (args.output / "acceptance.md").write_text(text, encoding="utf-8")
    report = {"environment": facts, "rows": [{"step": step, **row.as_dict()} for step, row in rows]}
    (args.output / "acceptance.json").write_text(redact_report(json.dumps(report, indent=1)) + "\n", encoding="utf-8")
    print(text)
    return 1 if failed(row for _, row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
