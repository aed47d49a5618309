"""Draws the figure of the README: one prompt of the demo with the images of all models.

Run ``longalign demo``, then ``python recipes/demo_figure.py runs/demo``. It writes docs/demo.png.

The prompt is chosen by a rule, not by eye: the first held-out caption whose gain is closest to the median gain. The
gain is the fact accuracy of the last model's image minus that of the first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from longalign.config.run import load_config
from longalign.demo import ALIGN, BASE, SEGMENTS, default_config, held_out_captions, image_folder, reward_runs
from longalign.evaluation.sentences import truncated_sentences
from longalign.files.lines import read_jsonl
from longalign.image_folder import INDEX
from longalign.image_io import decode
from longalign.mini import Caption, fact_accuracy, verdicts

TARGET = Path(__file__).parent.parent / "docs" / "demo.png"
# In pixels of a figure that GitHub shows at half its size. The card has its own background, for the dark mode.
WIDTH, MARGIN, GAP, SIDE, TEXT = 1660, 32, 24, 192, 30
MARK, LINE = 24, 36
CARD, BORDER, BAND, INK, FAINT = "#ffffff", "#d0d7de", "#f3f5f8", "#1f2328", "#59636e"
GREEN, ORANGE, RED = "#116329", "#8a5a00", "#b3202a"


@dataclass(frozen=True)
class Column:
    """A model's image of the caption, whether it shows each fact, and the truncated end of the caption."""

    model: str
    image: Image.Image
    facts: Sequence[Sequence[bool]]
    truncated: str


def main() -> int:
    """Writes the figure of a demo's folder; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="output folder of longalign demo, run with its default configs")
    parser.add_argument("--output", type=Path, default=TARGET)
    args = parser.parse_args()
    configs = [load_config(default_config(stage)) for stage in ("align", "reward")]
    models = [BASE, SEGMENTS, ALIGN, *reward_runs(configs[1], args.demo)]
    rows = {
        model: [row for _, row in read_jsonl(args.demo / "images" / image_folder(model) / INDEX)] for model in models
    }
    captions = held_out_captions(configs, len(rows[BASE]))
    for model, found in rows.items():
        if [row["prompt"] for row in found] != [caption.text for caption in captions]:
            raise SystemExit(
                f"expected images of the demo's {len(captions)} held-out captions in {args.demo}, got other prompts of "
                f"'{model}'; run `longalign demo` with its default configs"
            )
    pixels = {model: read_pixels(args.demo, model, found) for model, found in rows.items()}
    index, gains = median_gain(captions, pixels[models[0]], pixels[models[-1]])
    columns = [
        Column(
            model,
            Image.fromarray((pixels[model][index].transpose(1, 2, 0) * 255).round().astype(np.uint8)),
            verdicts(pixels[model][index : index + 1], [captions[index]])[0],
            rows[model][index]["truncated"] or "",
        )
        for model in models
    ]
    draw_figure(captions[index], columns).save(args.output, optimize=True)
    print(f"{args.output}: caption {index} of {len(captions)}, gain {gains[index]:.3f}, median {np.median(gains):.3f}")
    return 0


def read_pixels(demo: Path, model: str, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """The images of a model, float32 ``(n, 3, h, w)`` in [0, 1]."""
    folder = demo / "images" / image_folder(model)
    images = [np.asarray(decode(folder / row["file_name"]), np.float32) / 255 for row in rows]
    return np.stack(images).transpose(0, 3, 1, 2)


def median_gain(captions: Sequence[Caption], before: np.ndarray, after: np.ndarray) -> tuple[int, np.ndarray]:
    """Index of the first caption whose gain in fact accuracy is the median (the nearest to it), and all gains."""
    gains = fact_accuracy(after, captions) - fact_accuracy(before, captions)
    return int(np.abs(gains - np.median(gains)).argmin()), gains


def draw_figure(caption: Caption, columns: Sequence[Column]) -> Image.Image:
    """The images above a table with a row for each sentence and a column for each model."""
    body, small = ImageFont.load_default(TEXT), ImageFont.load_default(TEXT - 3)
    lefts = [WIDTH - MARGIN - (len(columns) - i) * (SIDE + GAP) + GAP for i in range(len(columns))]
    text_width = lefts[0] - GAP - MARGIN
    sentences = [sentence.text for sentence in caption.sentences]
    rows = [wrap(sentence, body, text_width) for sentence in sentences]
    image_top = MARGIN + 3 * LINE + 8
    top = image_top + SIDE + GAP
    heights = [LINE * len(lines) + 16 for lines in rows]
    figure = Image.new("RGB", (WIDTH, top + sum(heights) + MARGIN), CARD)
    draw = ImageDraw.Draw(figure)
    draw.rectangle((0, 0, figure.width - 1, figure.height - 1), outline=BORDER, width=2)

    intro = (
        f"One prompt of {caption.num_words} words in {len(caption.sentences)} sentences. The same noise for all images."
    )
    legend = [(1.0, "the image shows it"), (0.5, "in part"), (0.0, "not at all")]
    for i, line in enumerate(wrap(intro, body, text_width)):
        draw.text((MARGIN, MARGIN + LINE * i), line, INK, body)
    y = top - GAP - LINE * len(legend)
    for i, (share, text) in enumerate(legend):
        draw_mark(draw, MARGIN, y + LINE * i + 6, share)
        draw.text((MARGIN + MARK + 14, y + LINE * i), text, INK, body)

    for left, column in zip(lefts, columns, strict=True):
        facts = [fact for sentence in column.facts for fact in sentence]
        for i, line in enumerate(wrap(column.model, small, SIDE)):
            draw.text((left, MARGIN + 4 + LINE * i), line, INK, small)
        draw.text((left, MARGIN + 2 * LINE), f"{sum(facts)} of {len(facts)} facts", FAINT, small)
        figure.paste(column.image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, image_top))

    truncated = [truncated_sentences(sentences, column.truncated) for column in columns]
    y = top
    for number, (lines, height) in enumerate(zip(rows, heights, strict=True)):
        if number % 2 == 0:
            draw.rectangle((2, y, WIDTH - 3, y + height - 1), fill=BAND)
        for i, line in enumerate(lines):
            draw.text((MARGIN, y + 8 + LINE * i), line, INK, body)
        for left, column, indices in zip(lefts, columns, truncated, strict=True):
            facts = column.facts[number]
            middle = y + height // 2
            if facts:
                draw_mark(draw, left, middle - MARK // 2, sum(facts) / len(facts))
            if number in indices:
                draw.text((left + MARK + 14, middle), "truncated", FAINT, small, anchor="lm")
        y += height
    return figure


def draw_mark(draw: ImageDraw.ImageDraw, x: int, y: int, share: float) -> None:
    """A tick for 1, a cross for 0, a half-filled circle between; lines instead of glyphs that a font may lack."""
    if share == 1:
        points = [(x + 1, y + 13), (x + 9, y + 21), (x + 23, y + 3)]
        draw.line(points, GREEN, 5, joint="curve")
    elif share == 0:
        draw.line([(x + 3, y + 3), (x + 21, y + 21)], RED, 5)
        draw.line([(x + 3, y + 21), (x + 21, y + 3)], RED, 5)
    else:
        draw.ellipse((x + 1, y + 1, x + 23, y + 23), outline=ORANGE, width=4)
        draw.pieslice((x + 1, y + 1, x + 23, y + 23), 90, 270, fill=ORANGE)


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of at most ``width`` pixels, broken at spaces."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


if __name__ == "__main__":
    sys.exit(main())
