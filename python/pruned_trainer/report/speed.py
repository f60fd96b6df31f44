"""The part of a report's page that sets F1 against speed, beside what others published."""

from __future__ import annotations

from collections.abc import Sequence

from pruned_trainer.report import figures
from pruned_trainer.report.circumstances import shown
from pruned_trainer.report.fields import Fields
from pruned_trainer.report.figures import Line
from pruned_trainer.report.html import Section, Table
from pruned_trainer.report.published import PUBLISHED, Published
from pruned_trainer.report.sections import change
from pruned_trainer.tasks.task import SCORES


def speed_section(lines: Sequence[Line], task: str, joined: bool) -> Section:
    """lines: ours, as changes against our dense model. joined: they are curves."""
    section = Section("speed", "F1 against speed, beside what others published")
    series = PUBLISHED[task]
    theirs = [Line(_label(one), one.changes, own=False) for one in series if one.changes]
    if not lines:
        section.notes.append("This report lacks its speed-up or its losses: the points are all others'.")
    section.notes.append(
        "Hollow points are others', on other models, data and hardware, each against its own dense model; "
        "they show what has been reached, not what these models would reach there."
    )
    if any(one.dense is None for one in series):
        section.notes.append("A series whose dense model's F1 is not known to us is in the table only.")
    label = "points of F1 gained"
    section.drawings.append(figures.against_speed("report-speed", label, [*lines, *theirs], joined))
    head = ("source", "model", "data", "hardware", "score", "dense", "pruned")
    rows = [_row(one, task) for one in series]
    section.tables.append(Table(head, rows, "Published by others", texts=True))
    return section


def own_lines(models: Sequence[Fields], task: str) -> list[Line]:
    """A line for each score that has a loss, with a point for each model that has it and a speed-up."""
    lines = []
    for score in SCORES[task]:
        points = []
        for model in models if score.has_loss else ():
            speed, found = model.part("speedup").number("reached"), change(model, score)
            if speed is not None and found is not None:
                points.append((speed, found))
        if points:
            points.sort()
            ends = [(low, high) for _, (_, low, high) in points]
            label = f"ours: {score.label} (bars: 95% interval)"
            lines.append(Line(label, [(speed, value) for speed, (value, _, _) in points], ends))
    return lines


def _row(one: Published, task: str) -> list[str]:
    points = ", ".join(f"{speed:.2f}x\u00a0{value:g}" for speed, value in one.points)
    score = next(score.label for score in SCORES[task] if score.key == one.score)
    return [one.source, one.model, one.data, one.hardware, score, shown(one.dense, "{:g}"), points]


def _label(one: Published) -> str:
    """The source, and what a reader must know beside its points: model, score or data, hardware."""
    who = one.source.split(",")[0]
    what = one.data if one.score == "f1" else f"{one.score.removesuffix('_f1')} F1"
    return f"{who}: {one.model}, {what}\n({one.hardware})"
