"""The parts of a report's page, from report.json as it is. A part that the report says nothing of is left
out, and the page says which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pruned_trainer.pruning.importance import METHODS
from pruned_trainer.report import figures
from pruned_trainer.report.fields import Fields
from pruned_trainer.report.figures import Drawing, Line
from pruned_trainer.report.html import Section, Table
from pruned_trainer.report.published import PUBLISHED, Published
from pruned_trainer.tasks.task import SCORES, Score

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


_COSTS = {"macs": "multiply-accumulates", "params": "parameters"}


def task_of(report: Fields) -> str:
    """Reports from before there were several tasks do not name it."""
    task = report.text("task") or "squad"
    if task not in SCORES:
        raise ValueError(f"{report.file}: task is {task!r}; one of {', '.join(SCORES)} is needed")
    return task


def said(sections: Sequence[Section]) -> list[Section]:
    """Those that hold something; the others are named at the end."""
    full = [s for s in sections if s.notes or s.drawings or s.tables or s.code]
    absent = [section.title.lower() for section in sections if section not in full]
    if absent:
        note = f"The report, perhaps of an earlier version, holds nothing on: {'; '.join(absent)}."
        full.append(Section("absent", "Not in this report", [note]))
    return full


def subtitle(report: Fields) -> str:
    judged = report.part("evaluated_on")
    parts = [f"recipe {report.text('recipe')}" if report.text("recipe") else "", task_of(report)]
    questions, file = judged.number("questions"), judged.text("file")
    if questions is not None:
        parts.append(f"{questions:,.0f} questions" + (f" of {file}" if file else ""))
    if judged.values.get("threshold_chosen_on_these") is True:
        parts.append("the score thresholds were chosen on these questions")
    return "; ".join(part for part in parts if part)


def shapes(report: Fields) -> list[tuple[int, int]]:
    """(heads, FFN width) of each layer that is left; none where a number is missing."""
    found = [(layer.count("num_heads"), layer.count("ffn_width")) for layer in report.parts("shape")]
    return [(heads, ffn) for heads, ffn in found if heads is not None and ffn is not None]


def change(report: Fields, score: Score) -> tuple[float, float, float] | None:
    """Points gained, with the 95% interval's ends; None where the report lacks one of them."""
    loss, ends = report.number(f"{score.key}_loss"), report.interval(f"{score.key}_loss_interval")
    return None if loss is None or ends is None else (-loss, -ends[1], -ends[0])


def change_text(report: Fields, score: Score) -> str:
    found = change(report, score)
    return "-" if found is None else "{:+.2f} ({:+.2f} to {:+.2f})".format(*found)


def scores_and_sizes(report: Fields) -> Section:
    """The result table."""
    dense, pruned = (report.part(name) for name in MODELS)
    rows = []
    for score in SCORES[task_of(report)]:
        values = [shown(model.number(score.key), "{:.2f}") for model in (dense, pruned)]
        rows.append([score.label, *values, change_text(report, score) if score.has_loss else ""])
    for label, key, form, scale in (
        ("encoder parameters", "params", "{:,.2f}\u00a0M", 1e6),
        ("encoder MACs a sequence", "macs", "{:,.0f}\u00a0M", 1e6),
        ("size on disk (fp32)", "bytes", "{:.1f}\u00a0MiB", 2**20),
    ):
        a, b = dense.number(key), pruned.number(key)
        share = f"{b / a:.3f} of dense" if a and b is not None else ""
        rows.append([label, shown(a, form, scale), shown(b, form, scale), share])
    for label, full, left in _kept(report):
        rows.append([label, str(full), str(left), f"{left / full:.3f} of dense" if full else ""])
    rows = [row for row in rows if row[1:3] != ["-", "-"]]
    head = ("", *MODELS, "change (95% interval)")
    return Section("scores", "Scores and sizes", tables=[Table(head, rows)] if rows else [])


def _kept(report: Fields) -> list[tuple[str, int, int]]:
    """(what, dense, left) of heads, FFN and hidden size."""
    dense, left = report.part("dense_shape"), shapes(report)
    found = []
    columns = (("heads", "num_heads"), ("FFN widths, together", "ffn_width")) if left else ()
    for column, (label, key) in enumerate(columns):
        full = dense.count(key)
        if full is not None:
            found.append((label, full * len(left), sum(layer[column] for layer in left)))
    full, hidden = dense.count("hidden_size"), report.count("hidden_size")
    if full is not None and hidden is not None:
        found.append(("hidden size", full, hidden))
    return found


def layers_section(report: Fields) -> Section:
    """Bars of heads and FFN width."""
    section = Section("layers", "What is left of each layer")
    dense, left = report.part("dense_shape"), shapes(report)
    heads, ffn = dense.count("num_heads"), dense.count("ffn_width")
    if left and heads is not None and ffn is not None:
        section.notes.append(
            f"Of {heads} heads and an FFN width of {ffn} a dense layer; layer 0 follows the embedding."
        )
        section.drawings.append(figures.layers("report-layers", left, heads, ffn))
    return section


def training_section(report: Fields, models: Sequence[Fields]) -> Section:
    """How the gates closed, and the target against what was reached. models: what was made of them."""
    section = Section("training", "The training of the gates")
    log = report.part("training").parts("gates")
    if not log:
        recipe, without = report.text("recipe"), "This report has no log of gates."
        section.notes.append(f"The recipe {recipe} trains no gates." if recipe in METHODS else without)
        return section
    found = _openness(log, report)
    if found:
        section.notes.append("Expected number of open gates in each layer, as a share of the dense layer's.")
        section.drawings.append(found)
    held = _target(log, models)
    if held:
        section.drawings.append(held)
    else:
        section.notes.append("No target was held during the training, so there is none to draw.")
    return section


def _openness(log: Sequence[Fields], report: Fields) -> Drawing | None:
    dense = report.part("dense_shape")
    panels = []
    for part, key, title in (
        ("heads", "num_heads", "heads"),
        ("ffn", "ffn_width", "FFN units"),
        ("hidden", "hidden_size", "hidden dimensions"),
    ):
        full, prefix = dense.count(key), f"open_{part}/"
        rows = _over_steps(log, _first(log, prefix))
        if full and rows:
            steps, values = rows
            shares = [[min(value / full, 1.0) for value in row] for row in values]
            panels.append((title, steps, shares))
    return figures.openness("report-gates", panels) if panels else None


def _first(log: Sequence[Fields], prefix: str) -> list[str]:
    """The names with this prefix in the first entry that has some: parts may be trained one after another."""
    return next((names for one in log if (names := [n for n in one if n.startswith(prefix)])), [])


def _over_steps(log: Iterable[Fields], names: Sequence[str]) -> tuple[list[float], list[list[float]]] | None:
    """Steps, and for each name a value at each; entries without all of them, or of an earlier step, are not
    of this training."""
    steps: list[float] = []
    values: list[list[float]] = [[] for _ in names]
    for one in log:
        step, found = one.number("step"), [v for name in names if (v := one.number(name)) is not None]
        if step is None or not found or len(found) < len(names):
            continue
        if not steps or step > steps[-1]:
            steps.append(step)
            for row, value in zip(values, found, strict=True):
                row.append(value)
    return (steps, values) if steps else None


def _target(log: Sequence[Fields], models: Sequence[Fields]) -> Drawing | None:
    found = _over_steps(log, ["wanted", "expected"])
    if not found:
        return None
    steps, (wanted, expected) = found
    units = [unit for model in models for unit in model.part("target").part("reached")]
    unit = next((unit for unit in units if unit in _COSTS), None)
    decided = [_share(model, unit) for model in models]
    return figures.target(
        "report-target",
        _COSTS[unit] if unit else "time, by the latency table",
        Line("wanted: the target, approached step by step", list(zip(steps, wanted, strict=True))),
        Line("expected of the gates as they stand", list(zip(steps, expected, strict=True))),
        [share for share in decided if share is not None],
    )


def _share(model: Fields, unit: str | None) -> float | None:
    """What a model costs of its dense one; a time as it was measured."""
    if unit:
        return model.part("target").part("reached").number(unit)
    speed = model.part("speedup").number("reached")
    return 1 / speed if speed else None


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
