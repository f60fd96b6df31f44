"""report.html for a folder that `prune` or `sweep` wrote: the page of one model, and the page of a family.

The JSON files of the folder are all that a page needs, so it can be made at any later time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from pruned_ops.models.model_card import REPORT
from pruned_trainer.report import figures
from pruned_trainer.report.fields import Fields, change, change_text, scores_of, shapes, shown
from pruned_trainer.report.figures import Line
from pruned_trainer.report.html import Cell, Link, Page, Section, Table, write
from pruned_trainer.report.sections import (
    circumstances,
    filled,
    layers_section,
    own_lines,
    scores_and_sizes,
    speed_section,
    subtitle,
    training_section,
    workloads_section,
)


def write_pages(folder: Path) -> list[Path]:
    """Write report.html and its figures as PNG into a folder with report.json or sweep.json; their paths.

    With sweep.json the folders of the family's models get theirs, too. FileNotFoundError where the folder has
    neither file, ValueError where the file is no report.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; one that prune or sweep wrote is needed")
    if (folder / "sweep.json").is_file():
        sweep = Fields.read(folder / "sweep.json")
        reports = model_reports(sweep, folder)
        written = write(sweep_page(sweep, reports), folder)
        for name, report in reports.items():
            written += write(report_page(report), folder / name)
        return written
    if not (folder / REPORT).is_file():
        raise FileNotFoundError(
            f"{folder} holds no report.json and no sweep.json: prune and sweep write them"
        )
    return write(report_page(Fields.read(folder / REPORT)), folder)


def report_page(report: Fields) -> Page:
    """The page of one pruned model."""
    if not any(report.part(name) for name in ("dense", "pruned")):
        raise ValueError(f"{report.file} has no entry dense or pruned: it is no report of prune")
    sections = [
        scores_and_sizes(report),
        layers_section(report),
        training_section(report, [report]),
        speed_section(own_lines([report], scores_of(report)), report, joined=False),
        workloads_section(report),
        *circumstances(report),
    ]
    return Page("A pruned model", subtitle(report), _headline(report), filled(sections))


def _headline(report: Fields) -> list[tuple[str, str]]:
    """(number, what it is) of speed-up, changes of the scores, cost, and the targets beside the speed-up."""
    dense, pruned, speed = report.part("dense"), report.part("pruned"), report.part("speedup")
    headline = []
    reached, asked = speed.number("reached"), speed.number("asked")
    if reached is not None:
        workload = f", on {speed.text('workload')}" if speed.text("workload") else ""
        target_text = "" if asked is None else f" ({asked:g}x asked)"
        headline.append((f"{reached:.2f}x", f"as fast as dense{workload}{target_text}"))
    against = speed.number("against_hugging_face")
    if against is not None:
        dtype = speed.text("dtype") or "fp32"
        in_dtype = "" if dtype == "fp32" else f", in {dtype}"
        headline.append((f"{against:.2f}x", f"as fast as dense in Hugging Face{in_dtype}"))
    for score in scores_of(report):
        gained = change(report, score) if score.has_loss else None
        if gained:
            headline.append((f"{gained[0]:+z.2f}", f"{score.label} ({gained[1]:+z.2f} to {gained[2]:+z.2f})"))
    full, kept = dense.number("macs"), pruned.number("macs")
    if full and kept is not None:
        headline.append((f"{kept / full:.0%}", "of the encoder's MACs left"))
    target = report.part("target")
    for unit in target.part("asked"):
        value = target.part("asked").number(unit)
        if unit != "speedup" and value is not None:
            got = shown(target.part("reached").number(unit), "{:.4g}")
            headline.append((got, f"{unit} ({value:g} asked)"))
    return headline


def model_reports(sweep: Fields, folder: Path) -> dict[str, Fields]:
    """The reports of the family's models, by folder, without models whose folder is gone.

    ValueError for a folder that is not beside sweep.json.
    """
    reports = {}
    for point in sweep.parts("points"):
        name = point.text("folder") or ""
        if name != Path(name).name or name == "..":
            raise ValueError(f"{sweep.file}: {point.place}folder is {name!r}; a folder beside it is needed")
        if name and (folder / name / REPORT).is_file():
            reports[name] = Fields.read(folder / name / REPORT)
    return reports


def sweep_page(sweep: Fields, reports: Mapping[str, Fields]) -> Page:
    """The page of a family of models. reports: `model_reports`."""
    points = sorted(sweep.parts("points"), key=_speed)
    if not points:
        raise ValueError(f"{sweep.file} has no points: it is no record of a sweep")
    # The models share one training and one machine: the first model's report describes them for all.
    common = next(iter(reports.values()), Fields(sweep.file, {}))
    sections = [
        _curve(sweep, points),
        _models(sweep, points, reports),
        training_section(common, points),
        speed_section(own_lines(points, scores_of(sweep)), _on_data_of(common, sweep), joined=True),
        *_common(sweep, reports),
    ]
    headline = [(str(len(points)), "models, one for each target")]
    if _speed(points[-1]):
        headline.append((f"{_speed(points[-1]):.2f}x", "as fast as dense: the fastest of them"))
    return Page("A family of pruned models", subtitle(common), headline, filled(sections))


def _on_data_of(report: Fields, sweep: Fields) -> Fields:
    """The sweep's task, with the data set of one of its models' reports."""
    return Fields(sweep.file, {**sweep.values, "evaluated_on": report.values.get("evaluated_on")})


def _common(sweep: Fields, reports: Mapping[str, Fields]) -> list[Section]:
    """The circumstances in the first model's report, but with the sweep's command."""
    name, report = next(iter(reports.items()), ("", Fields(sweep.file, {})))
    sections = circumstances(Fields(report.file, {**report.values, "command": sweep.text("command")}))
    for section in sections:
        if section.key in ("backends", "plan") and section.tables:
            section.notes.append(f"This is from the model {name}; each model's own page shows its own.")
    return sections


def _speed(point: Fields) -> float:
    """The speed-up that a model of the sweep reached; 0 where sweep.json does not have it."""
    return point.part("speedup").number("reached") or 0.0


def _curve(sweep: Fields, points: Sequence[Fields]) -> Section:
    """Each score over measured speed-up; the curves begin at the dense model."""
    section = Section("curve", "Scores against measured speed-up")
    lines = []
    for score in scores_of(sweep):
        dense = sweep.part("dense").number(score.key)
        if not score.has_loss or dense is None:
            continue
        corners, ends = [(1.0, dense)], [(dense, dense)]
        for point in points:
            gained = change(point, score)
            if gained is not None and _speed(point):
                corners.append((_speed(point), dense + gained[0]))
                ends.append((dense + gained[1], dense + gained[2]))
        lines.append(Line(f"{score.label} (bars: 95% interval of the change)", corners, ends))
    if lines:
        section.drawings.append(figures.against_speed("sweep", "percent", lines, joined=True))
    return section


def _models(sweep: Fields, points: Sequence[Fields], reports: Mapping[str, Fields]) -> Section:
    """The table with a row for each model; the models with a report are links to their pages."""
    scores = [score for score in scores_of(sweep) if score.has_loss]
    labels = [text for score in scores for text in (score.label, "change (95% interval)")]
    head = ("model", "asked", "reached", "speed-up", *labels, "heads", "FFN width", "MACs", "MiB")
    dense = sweep.part("dense")
    cells = [text for score in scores for text in (shown(dense.number(score.key), "{:.2f}"), "")]
    rows: list[list[Cell]] = [["dense", "", "", "1.00x", *cells, "", "", *_sizes(dense)]]
    for point in points:
        name = point.text("folder") or "-"
        cells = [
            text
            for score in scores
            for text in (shown(point.number(score.key), "{:.2f}"), change_text(point, score))
        ]
        first = Link(name, f"./{quote(name)}/report.html") if name in reports else name
        layers = shapes(point)
        counts = [f"{sum(layer[column] for layer in layers):,}" if layers else "-" for column in (0, 1)]
        speed = shown(point.part("speedup").number("reached"), "{:.2f}x")
        rows.append([first, *_targets(point), speed, *cells, *counts, *_sizes(point)])
    workloads = {point.part("speedup").text("workload") for point in points} - {None}
    notes = [f"Speed-ups on {', '.join(sorted(map(str, workloads)))}."] if workloads else []
    return Section("models", "The models", notes, tables=[Table(head, rows)])


def _sizes(model: Fields) -> list[str]:
    """MACs and size on disk, as cells."""
    return [shown(model.number("macs"), "{:,.0f}\u00a0M", 1e6), shown(model.number("bytes"), "{:.1f}", 2**20)]


def _targets(point: Fields) -> list[str]:
    """The target as it was asked and as it was reached, each with its unit, as cells."""
    target = point.part("target")
    return [
        ", ".join(f"{unit} {value:.4g}" for unit in units if (value := units.number(unit)) is not None) or "-"
        for units in (target.part("asked"), target.part("reached"))
    ]
