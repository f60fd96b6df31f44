"""report.html of a folder that `prune` or `sweep` wrote: made of its JSON files alone, at any later time."""

from __future__ import annotations

from pathlib import Path

from pruned_trainer.report.circumstances import circumstances, shown, workloads_section
from pruned_trainer.report.fields import Fields
from pruned_trainer.report.html import Page, write
from pruned_trainer.report.sections import (
    change,
    layers_section,
    said,
    scores_and_sizes,
    subtitle,
    task_of,
    training_section,
)
from pruned_trainer.report.speed import own_lines, speed_section
from pruned_trainer.report.sweep import model_reports, sweep_page
from pruned_trainer.tasks.task import SCORES


def write_pages(folder: Path) -> list[Path]:
    """Write report.html and its figures as PNG into a folder with report.json or sweep.json (then also into
    its models' folders); their paths.

    Errors: FileNotFoundError where there is neither, ValueError for one that is no report.
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
    if not (folder / "report.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no report.json and no sweep.json: prune and sweep write them"
        )
    return write(report_page(Fields.read(folder / "report.json")), folder)


def report_page(report: Fields) -> Page:
    """The page of one pruned model."""
    if not any(report.part(name) for name in ("dense", "pruned")):
        raise ValueError(f"{report.file} has no entry dense or pruned: it is no report of prune")
    task = task_of(report)
    sections = [
        scores_and_sizes(report),
        layers_section(report),
        training_section(report, [report]),
        speed_section(own_lines([report], task), task, joined=False),
        workloads_section(report),
        *circumstances(report),
    ]
    return Page("A pruned model", subtitle(report), _headline(report), said(sections))


def _headline(report: Fields) -> list[tuple[str, str]]:
    dense, pruned, speed = report.part("dense"), report.part("pruned"), report.part("speedup")
    found = []
    reached, asked = speed.number("reached"), speed.number("asked")
    if reached is not None:
        workload = f", on {speed.text('workload')}" if speed.text("workload") else ""
        told = "" if asked is None else f" ({asked:g}x asked)"
        found.append((f"{reached:.2f}x", f"as fast as dense{workload}{told}"))
    for score in SCORES[task_of(report)]:
        moved = change(report, score) if score.has_loss else None
        if moved:
            found.append((f"{moved[0]:+.2f}", f"{score.label} ({moved[1]:+.2f} to {moved[2]:+.2f})"))
    a, b = dense.number("macs"), pruned.number("macs")
    if a and b is not None:
        found.append((f"{b / a:.0%}", "of the encoder's MACs left"))
    target = report.part("target")
    for unit in target.part("asked"):
        wanted = target.part("asked").number(unit)
        if unit != "speedup" and wanted is not None:
            found.append((shown(target.part("reached").number(unit), "{:.4g}"), f"{unit} ({wanted:g} asked)"))
    return found
