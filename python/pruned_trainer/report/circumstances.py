"""The parts of a report's page on how it came about: speeds by workload, backends, machine, versions, steps,
command."""

from __future__ import annotations

from pruned_trainer.report.fields import Fields
from pruned_trainer.report.html import Section, Table

MODELS = ("dense", "pruned")


def shown(value: float | None, form: str, scale: float = 1.0) -> str:
    """A number for a table; "-" where there is none."""
    return "-" if value is None else form.format(value / scale)


def workloads_section(report: Fields) -> Section:
    """Milliseconds and sequences a second of both models on each workload, and how good the table was."""
    section = Section("speeds", "Speeds by workload")
    for name in _workloads(report):
        rows = []
        for model in MODELS:
            timed = report.part(model).part("workloads").part(name)
            ms = timed.part("ms")
            speeds = [shown(ms.number(f"p{p}"), "{:,.1f}") for p in (50, 20, 80)]
            if timed:
                rows.append([model, *speeds, shown(timed.number("sequences_per_s"), "{:,.1f}")])
        if rows:
            section.tables.append(Table(("", "ms a batch", "p20", "p80", "sequences/s"), rows, name))
    speed = report.part("speedup")
    if speed.number("reached") is not None:
        of = f" on {speed.text('workload')}" if speed.text("workload") else ""
        section.notes.append(
            f"Pruned against dense, both on our runtime, timed in turn: {speed.number('reached'):.2f}x{of} "
            "(the median of the rounds)."
        )
    table = report.part("latency_table")
    errors = [(name, error) for name in MODELS if (error := table.part(name).number("error")) is not None]
    if errors:
        off = ", ".join(f"{name} {100 * error:+.1f}%" for name, error in errors)
        predicted = shown(table.number("predicted_speedup"), "{:.2f}x")
        section.notes.append(f"The latency table predicted {predicted}; its times are off by {off}.")
    return section


def _workloads(report: Fields) -> list[str]:
    """Of both models, in the order of the report."""
    return list(dict.fromkeys(name for model in MODELS for name in report.part(model).part("workloads")))


def circumstances(report: Fields) -> list[Section]:
    """Backends, machine, versions, plan and command, a section each."""
    backends = Section("backends", "Backends used for each op")
    for workload in _workloads(report):
        used = [report.part(model).part("workloads").part(workload).part("backends") for model in MODELS]
        ops = dict.fromkeys(op for one in used for op in one)
        rows = [[op, *(one.text(op) or "-" for one in used)] for op in ops]
        if rows:
            backends.tables.append(Table(("op", *MODELS), rows, workload, texts=True))
    machine = Section("machine", "Machine", tables=_pairs(report.part("machine")))
    versions = Section("versions", "Versions", tables=_pairs(report.part("versions")))
    command = Section("command", "Command", code=report.text("command") or "")
    return [backends, machine, versions, _plan(report), command]


def _pairs(found: Fields) -> list[Table]:
    """Names and values as they are; null as "none"."""
    rows = [(name.replace("_", " "), "none" if v is None else str(v)) for name, v in found.values.items()]
    return [Table((), rows, texts=True)] if rows else []


def _plan(report: Fields) -> Section:
    plan, minutes = report.part("plan"), report.part("training").number("minutes")
    rows = []
    for label, steps, seconds in (
        ("steps that train or score gates", "gate_steps", "gate_step_seconds"),
        ("retrain steps", "retrain_steps", "retrain_step_seconds"),
    ):
        if plan.number(steps) is not None:
            each = plan.number(seconds)
            rows.append((label, f"{plan.number(steps):,.0f}", "" if each is None else f"{each:.2f} s each"))
    if minutes is not None:
        rows.append(("minutes until the model was trained", f"{minutes:.1f}", ""))
    return Section("plan", "Steps and time", tables=[Table((), rows)] if rows else [])
