"""Writes the table and the plot of a study into its page, ``docs/studies/<name>.md``, from finished ablations.

The page keeps its text; the table goes between the lines ``<!-- table -->`` and ``<!-- end of table -->``. It lists
the metrics of each cell with 95% intervals, and below them the paired difference to the first cell. The plot
shows two metrics' differences to the first cell, a point per cell.

Run: ``python recipes/studies/page.py NAME ABLATION [ABLATION ...] --metrics facts,gauges.warmth [--by length]
[--during ABLATION:METRICS] [--plot Y:X]``.
"""

from __future__ import annotations

import argparse
import json
from html import escape
from pathlib import Path

from longalign.evaluation.charts import ticks
from longalign.evaluation.formatting import label, show, show_difference
from longalign.evaluation.table import MetricTable

PAGES = Path(__file__).parents[2] / "docs" / "studies"
START, END = "<!-- table -->\n", "<!-- end of table -->\n"
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 880, 420, 70, 24, 50
COLOURS = ("#1b6ca8", "#c0392b", "#2e8b57", "#8e44ad", "#d68910", "#16a085", "#7f8c8d", "#2c3e50")


def describe(table: MetricTable) -> str:
    """Numbers of prompts, images and training seeds."""
    seeds = len(set(table.training_seeds))
    images = len(table.prompts) // table.num_prompts // max(seeds, 1)
    trained = f", {seeds} training seeds" if seeds else ""
    return f"{table.num_prompts} prompts, {images} {'images each' if images > 1 else 'image each'}{trained}"


def header(table: MetricTable, metrics: list[str]) -> list[str]:
    """Markdown header of the table."""
    names = " | ".join(label(metric, table.value(metric)) for metric in metrics)
    return [f"| cell | {names} |", "|---" * (len(metrics) + 1) + "|"]


def table_rows(table: MetricTable, metrics: list[str]) -> list[str]:
    """Markdown rows of the cells."""
    rows = []
    for model in table.models:
        cells = []
        for metric in metrics:
            if metric not in table.values[model] and metric not in table.sets.get(model, {}):
                cells.append("-")
                continue
            cell = show(table.interval(model, metric), table.value(metric))
            if model != table.base:
                cell += "<br>" + show_difference(table.difference(model, metric), table.value(metric)).replace(
                    " *", "*"
                )
            cells.append(cell)
        rows.append(f"| {model} | " + " | ".join(cells) + " |")
    return rows


def breakdown_rows(table: MetricTable, metric: str, by: str) -> list[str]:
    """Markdown rows of the breakdown whose title contains ``by``: a column per cell. Empty if the table has none."""
    found = {title: rows for title, rows in table.breakdowns(metric).items() if f"by {by}" in title}
    if not found:
        return []
    ((title, groups),) = found.items()
    rows = ["", f"{title}:", "", f"| | {' | '.join(table.models)} |", "|---" * (len(table.models) + 1) + "|"]
    for name, intervals in groups.items():
        cells = [show(intervals[m], table.value(metric)) if m in intervals else "-" for m in table.models]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows


def training_rows(folder: Path, metrics: list[str]) -> list[str]:
    """Markdown table of the monitor's metrics over the training steps, as means over each cell's training seeds."""
    cells = json.loads((folder / "ablation.json").read_text())["cells"]
    points: dict[str, dict[int, list[dict[str, float]]]] = {}
    for cell in cells:
        for run in cell["runs"] if cell["trained"] else []:
            for line in (folder / run["folder"] / "train" / "log.jsonl").read_text().splitlines():
                values = json.loads(line)
                if f"monitor/{metrics[0]}" in values:
                    points.setdefault(cell["name"], {}).setdefault(values["step"], []).append(values)
    if not points:
        raise SystemExit(f"no run in {folder} has measured {metrics[0]} during training")
    steps = sorted({step for cell in points.values() for step in cell})
    rows = ["", "During training, means over the training seeds:", ""]
    rows += [f"| metric | cell | {' | '.join(f'step {step}' for step in steps)} |", "|---" * (len(steps) + 2) + "|"]
    for metric in metrics:
        for name, cell in points.items():
            means = [sum(p[f"monitor/{metric}"] for p in cell[step]) / len(cell[step]) for step in steps]
            rows.append(f"| {metric} | {name} | " + " | ".join(f"{mean:.4f}" for mean in means) + " |")
    return rows


def plot(tables: list[MetricTable], y_metric: str, x_metric: str) -> str:
    """SVG of the differences to the first cell in two metrics, with their intervals. One colour per group of cells.

    The group is the cell's name up to the first comma or ``omega``.
    """
    points = []
    for table in tables:
        for model in table.models[1:]:
            x, y = (table.difference(model, m) for m in (x_metric, y_metric))
            points.append((model, x, y, [100.0 if table.value(m).unit == "%" else 1.0 for m in (x_metric, y_metric)]))
    values = [
        [scale[i] * v for _, x, y, scale in points for v in ((x, y)[i].low, (x, y)[i].high)] + [0.0] for i in (0, 1)
    ]
    (x_low, x_high), (y_low, y_high) = ((min(v), max(v)) for v in values)
    right = WIDTH - 190

    def px(value: float) -> float:
        return LEFT + (value - x_low) / (x_high - x_low) * (right - LEFT)

    def py(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - BOTTOM - TOP)

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for value in ticks(x_low, x_high, 6):
        parts.append(f'<path d="M{px(value):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#ddd"/>')
        parts.append(f'<text x="{px(value):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    for value in ticks(y_low, y_high, 6):
        parts.append(f'<path d="M{LEFT} {py(value):.1f}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{py(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    names = [label(m, tables[0].value(m)) for m in (x_metric, y_metric)]
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(names[0])}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">{escape(names[1])}</text>'
    )
    groups = list(dict.fromkeys(group(model) for model, *_ in points))
    for model, x, y, (a, b) in points:
        colour = COLOURS[groups.index(group(model)) % len(COLOURS)]
        parts.append(
            f'<path d="M{px(a * x.low):.1f} {py(b * y.mean):.1f}H{px(a * x.high):.1f}'
            f'M{px(a * x.mean):.1f} {py(b * y.low):.1f}V{py(b * y.high):.1f}" stroke="{colour}" opacity="0.35"/>'
        )
        parts.append(f'<circle cx="{px(a * x.mean):.1f}" cy="{py(b * y.mean):.1f}" r="4" fill="{colour}"/>')
        rest = model.removeprefix(group(model)).strip(" ,")
        parts.append(
            f'<text x="{px(a * x.mean) + 6:.1f}" y="{py(b * y.mean) - 5:.1f}" fill="{colour}">{escape(rest)}</text>'
        )
    for i, name in enumerate(groups):
        y_place = TOP + 14 + 20 * i
        parts.append(f'<circle cx="{right + 18}" cy="{y_place - 4}" r="5" fill="{COLOURS[i % len(COLOURS)]}"/>')
        parts.append(f'<text x="{right + 30}" y="{y_place}">{escape(name)}</text>')
    style = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {style}>', *parts, "</svg>"]) + "\n"


def group(model: str) -> str:
    """The part of a cell's name that determines its colour."""
    ends = [i for i in (model.find(","), model.find(" omega")) if i > 0]
    return model[: min(ends, default=len(model))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("ablations", nargs="+", help="output folders of `longalign ablate`, or TITLE=FOLDER")
    parser.add_argument("--metrics", required=True)
    parser.add_argument("--by", help="also a breakdown of the first metric, e.g. 'length'")
    parser.add_argument("--during", help="an ablation, and METRIC,METRIC of its monitor after a colon: FOLDER:METRICS")
    parser.add_argument("--plot", help="the metrics of the axes as Y:X")
    options = parser.parse_args()
    sources = [source.rpartition("=") for source in options.ablations]
    files = [json.loads((Path(folder) / "table.json").read_text()) for *_, folder in sources]
    tables, metrics = [MetricTable.from_dict(data) for data in files], options.metrics.split(",")
    rows = header(tables[0], metrics)
    for (title, *_), table in zip(sources, tables, strict=True):
        rows += [f"| *{title}* |" + " |" * len(metrics)] if title else []
        rows += table_rows(table, metrics)
    if options.by:
        breakdown = [row for table in tables for row in breakdown_rows(table, metrics[0], options.by)]
        if not breakdown:
            raise SystemExit(
                f"no table has a breakdown by '{options.by}'; got {list(tables[0].breakdowns(metrics[0]))}"
            )
        rows += breakdown
    if options.during:
        folder, _, names = options.during.rpartition(":")
        rows += training_rows(Path(folder), names.split(","))
    notes = {title: describe(table) for (title, *_), table in zip(sources, tables, strict=True)}
    if len(set(notes.values())) == 1:
        note = notes.popitem()[1]
    else:
        note = "; ".join(f"{title}: {text}" for title, text in notes.items())
    page = PAGES / f"{options.name}.md"
    text = page.read_text()
    before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
    page.write_text(before + "\n".join([note[0].upper() + note[1:] + ".", "", *rows]) + "\n" + after)
    if options.plot:
        page.with_suffix(".svg").write_text(plot(tables, *options.plot.split(":")))
    print(f"wrote {page.name}")


if __name__ == "__main__":
    main()
