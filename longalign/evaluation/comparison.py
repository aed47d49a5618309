"""Summarizes a metric table in English sentences."""

from __future__ import annotations

from longalign.evaluation.bootstrap import MIN_PROMPTS
from longalign.evaluation.formatting import interval_text, number
from longalign.evaluation.table import MetricTable


def findings(table: MetricTable) -> list[str]:
    """Returns a summary of a metric table as plain-text sentences, one per model.

    The sentence of the first model states its mean of the first metric. Each other model is compared with the previous
    or the first one, see `MetricTable.steps`: its sentence states its mean of the first metric and the paired
    difference, then the significant differences of this metric in groups of prompts (`MetricTable.breakdowns`), and
    those of the other metrics. A last sentence notes if there are too few prompts for significance.
    """
    metric = table.metrics[0]
    value = table.value(metric)
    title, unit = table.label(metric).removesuffix(", %"), "%" if value.unit == "%" else ""
    too_few = table.num_prompts < MIN_PROMPTS
    breakdowns = table.breakdowns(metric, paired=True)
    sentences = [f"{table.base}: {title} {interval_text(table.interval(table.base, metric), value, unit=unit)}."]
    for model, other in table.steps:
        name = f"{model} - {other}"
        gain = table.difference(model, metric, other)
        lines = [
            f"{model} against {other}: {title} {number(table.interval(model, metric).mean, value)}{unit}, "
            + interval_text(gain, value, sign=True)
            + (" points" if unit else "")
            + ("" if gain.significant or too_few else ", no significant difference")
        ]
        changes = {
            (f"{heading.partition(' by ')[2]} {group}" if group[0].isdigit() else group): row[name]
            for heading, groups in breakdowns.items()
            for group, row in groups.items()
            if row[name].significant
        }
        if changes:
            is_gain = {group: table.is_gain(metric, v) for group, v in changes.items()}
            texts = {group: f"{group} {interval_text(v, value, sign=True)}" for group, v in changes.items()}
            worse = [texts[group] for group, gain in is_gain.items() if gain is False]
            better = [group for group, gain in is_gain.items() if gain]
            lines.append("worse: " + (", ".join(worse) or "none"))
            lines.append("better: " + (", ".join(better) or "none"))
        others = {m: v for m in table.metrics[1:] if (v := table.difference(model, m, other)).significant}
        lines += [f"{table.label(m)} {interval_text(v, table.value(m), sign=True)}" for m, v in others.items()]
        for m, relevant in others.items():
            irrelevant = others.get(m.replace("text_relevant", "text_irrelevant"))
            if m.endswith("text_relevant") and irrelevant and irrelevant.mean > relevant.mean > 0:
                ratio = irrelevant.mean / relevant.mean
                lines.append(f"the text-irrelevant part rises {ratio:.1f} times as much as the text-relevant part")
        sentences.append("; ".join(lines) + ".")
    if too_few:
        sentences.append(f"note: fewer than {MIN_PROMPTS} prompts, no difference is significant.")
    return sentences
