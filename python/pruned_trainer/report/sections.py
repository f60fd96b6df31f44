"""The sections of a report's page, in the page's order, each made of report.json alone.

A report that lacks a section's fields gives an empty section; `filled` leaves those out, and the page names
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from pruned_trainer.pruning.options import UNTRAINED
from pruned_trainer.report import figures
from pruned_trainer.report.fields import (
    Fields,
    change,
    change_text,
    dense_shapes,
    noun_of,
    scores_of,
    shapes,
    shown,
    task_of,
)
from pruned_trainer.report.figures import Drawing, Line
from pruned_trainer.report.html import Section, Table
from pruned_trainer.report.published import Published, beside
from pruned_trainer.tasks.natural_questions.task import SCORES as NQ_SCORES
from pruned_trainer.tasks.squad.metrics import SCORES as SQUAD_SCORES
from pruned_trainer.tasks.task import Score

MODELS = ("dense", "pruned")
# Units of a target, as the figure of the gate training names them.
_COSTS = {"macs": "multiply-accumulates", "params": "parameters"}


def subtitle(report: Fields) -> str:
    """Recipe, task, and the examples that the models were judged on."""
    judged = report.part("evaluated_on")
    parts = [f"recipe {report.text('recipe')}" if report.text("recipe") else "", task_of(report)]
    noun = noun_of(report)
    count, file = judged.number(noun), judged.text("file")
    if count is not None:
        parts.append(f"{count:,.0f} {noun}" + (f" of {file}" if file else ""))
    if judged.values.get("threshold_chosen_on_these") is True:
        parts.append(f"the score thresholds were chosen on these {noun}")
    return "; ".join(part for part in parts if part)


def filled(sections: Sequence[Section]) -> list[Section]:
    """The sections that hold something, and a last one that names the others."""
    full = [part for part in sections if part.notes or part.drawings or part.tables or part.code]
    absent = [part.title.lower() for part in sections if part not in full]
    if absent:
        note = f"The report, perhaps of an earlier version, holds nothing on: {'; '.join(absent)}."
        full.append(Section("absent", "Not in this report", [note]))
    return full


def scores_and_sizes(report: Fields) -> Section:
    """The result table: scores, sizes, and heads and widths of the dense and the pruned model."""
    dense, pruned = (report.part(name) for name in MODELS)
    rows = []
    for score in scores_of(report):
        values = [shown(model.number(score.key), "{:.2f}") for model in (dense, pruned)]
        rows.append([score.label, *values, change_text(report, score) if score.has_loss else ""])
    for label, key, form, scale in (
        ("encoder parameters", "params", "{:,.2f}\u00a0M", 1e6),
        ("encoder MACs a sequence", "macs", "{:,.0f}\u00a0M", 1e6),
        ("size on disk (fp32)", "bytes", "{:.1f}\u00a0MiB", 2**20),
    ):
        full, kept = dense.number(key), pruned.number(key)
        share = f"{kept / full:.3f} of dense" if full and kept is not None else ""
        rows.append([label, shown(full, form, scale), shown(kept, form, scale), share])
    for label, count, kept in _kept(report):
        rows.append([label, str(count), str(kept), f"{kept / count:.3f} of dense" if count else ""])
    rows = [row for row in rows if row[1:3] != ["-", "-"]]
    head = ("", *MODELS, "change (95% interval)")
    return Section("scores", "Scores and sizes", tables=[Table(head, rows)] if rows else [])


def _kept(report: Fields) -> list[tuple[str, int, int]]:
    """(name, dense, pruned) of the numbers of heads, the FFN widths and the hidden size."""
    dense, pruned = dense_shapes(report), shapes(report)
    counts = []
    for column, label in enumerate(("heads", "FFN widths, together") if dense and pruned else ()):
        full, kept = (sum(layer[column] for layer in layers) for layers in (dense, pruned))
        counts.append((label, full, kept))
    size, hidden = report.part("dense_shape").count("hidden_size"), report.count("hidden_size")
    if size is not None and hidden is not None:
        counts.append(("hidden size", size, hidden))
    return counts


def layers_section(report: Fields) -> Section:
    """The heads and the FFN width that each layer keeps, as bars."""
    section = Section("layers", "What is left of each layer")
    dense, pruned = dense_shapes(report), shapes(report)
    if pruned and len(dense) == len(pruned):
        heads, ffn = (max(layer[column] for layer in dense) for column in (0, 1))
        which = "A dense layer has" if len({*dense}) == 1 else "The widest dense layers have"
        section.notes.append(
            f"{which} {heads} heads and an FFN width of {ffn}; layer 0 follows the embedding."
        )
        section.drawings.append(figures.layers("report-layers", pruned, dense))
    return section


def training_section(report: Fields, models: Sequence[Fields]) -> Section:
    """How the gates closed, and the target beside what was reached.

    models: the reports of the models that were made of these gates.
    """
    section = Section("training", "The training of the gates")
    log = report.part("training").parts("gates")
    if not log:
        recipe, without = report.text("recipe"), "This report has no log of gates."
        section.notes.append(f"The recipe {recipe} trains no gates." if recipe in UNTRAINED else without)
        return section
    held_apart = report.text("recipe") == "paper" and any("wanted" in entry for entry in log)
    trainings = [log] if held_apart else _trainings(log)
    if len(trainings) > 1:  # in a gradual sweep
        models = models[:1]
        log = min(trainings, key=lambda training: _distance(training, models[0]))
        section.notes.append(
            f"The gates trained anew for each target; the training towards {_wanted(log)[-1]:.3f} of the "
            "dense cost is drawn."
        )
    openness = _openness(log, report)
    if openness:
        section.notes.append(
            "Expected number of open gates in each layer, counted as for the target (--penalty), as a share "
            "of the dense layer's."
        )
        section.drawings.append(openness)
    target = None if held_apart else _target(log, models)
    if target:
        section.drawings.append(target)
    elif held_apart:
        section.notes.append(
            "The gates of each part were held to its share of the target, one after another."
        )
    else:
        section.notes.append("No target was held during the training, so there is none to draw.")
    return section


def _openness(log: Sequence[Fields], report: Fields) -> Drawing | None:
    panels = []
    for part, title in (("heads", "heads"), ("ffn", "FFN units"), ("hidden", "hidden dimensions")):
        names = _first_names(log, f"open_{part}/")
        full, curves = _all_gates(report, part, len(names)), _over_steps(log, names)
        if any(full) and curves:
            steps, values = curves
            pairs = zip(values, full, strict=True)
            shares = [[min(value / max(count, 1), 1.0) for value in row] for row, count in pairs]
            panels.append((title, steps, shares))
    return figures.openness("report-gates", panels) if panels else None


def _all_gates(report: Fields, part: str, rows: int) -> list[int]:
    """How many gates each row of a part's figure has; empty where the report does not say."""
    keys = {"heads": "num_heads", "ffn": "ffn_width", "hidden": "hidden_size"}
    layers = dense_shapes(report)
    if part != "hidden" and len(layers) == rows:
        return [heads if part == "heads" else ffn for heads, ffn in layers]
    widest = report.part("dense_shape").count(keys[part])
    return [] if widest is None else [widest] * rows


def _first_names(log: Sequence[Fields], prefix: str) -> list[str]:
    """The names with this prefix in the first entry that has any, because parts may be trained one after
    another; in the order of the layers, because the log of a training that was resumed has layer_10 before
    layer_2."""
    for entry in log:
        names = [name for name in entry if name.startswith(prefix)]
        if names:
            return sorted(names, key=lambda name: (len(name), name))
    return []


def _over_steps(log: Iterable[Fields], names: Sequence[str]) -> tuple[list[float], list[list[float]]] | None:
    """(steps, for each name a value at each step); None where no entry has all of them.

    Entries that lack one of the names, or whose step does not rise, belong to another training.
    """
    steps: list[float] = []
    curves: list[list[float]] = [[] for _ in names]
    for entry in log:
        step, values = entry.number("step"), [v for name in names if (v := entry.number(name)) is not None]
        if step is None or not values or len(values) < len(names):
            continue
        if not steps or step > steps[-1]:
            steps.append(step)
            for curve, value in zip(curves, values, strict=True):
                curve.append(value)
    return (steps, curves) if steps else None


def _trainings(log: Sequence[Fields]) -> list[list[Fields]]:
    """The entries of each training of gates that were held to a target: one begins where the step does not
    rise."""
    trainings: list[list[Fields]] = [[]]
    before = -math.inf
    for entry in log:
        step = entry.number("step")
        if entry.number("wanted") is not None and step is not None:
            if step <= before:
                trainings.append([])
            before = step
        trainings[-1].append(entry)
    return trainings


def _wanted(log: Sequence[Fields]) -> list[float]:
    """The costs that were wanted of the gates, in the order of the log."""
    return [cost for entry in log if (cost := entry.number("wanted")) is not None]


def _distance(training: Sequence[Fields], model: Fields) -> float:
    """How far the cost that a training wanted at its end is from the model's."""
    cost = _share(model, _unit([model]))
    return 0.0 if cost is None else abs(_wanted(training)[-1] - cost)


def _unit(models: Sequence[Fields]) -> str | None:
    """The unit among _COSTS that the models' targets are in; None for a time."""
    units = [unit for model in models for unit in model.part("target").part("reached")]
    return next((unit for unit in units if unit in _COSTS), None)


def _target(log: Sequence[Fields], models: Sequence[Fields]) -> Drawing | None:
    curves = _over_steps(log, ["wanted", "expected"])
    if not curves:
        return None
    steps, (wanted, expected) = curves
    unit = _unit(models)
    decided = [_share(model, unit) for model in models]
    return figures.target(
        "report-target",
        _COSTS[unit] if unit else "time, by the latency table",
        Line("wanted: the target, approached step by step", list(zip(steps, wanted, strict=True))),
        Line("expected: the cost of the gates as they stand", list(zip(steps, expected, strict=True))),
        [share for share in decided if share is not None],
    )


def _share(model: Fields, unit: str | None) -> float | None:
    """A model's cost in this unit as a share of its dense model's; without a unit, its measured time."""
    if unit:
        return model.part("target").part("reached").number(unit)
    speed = model.part("speedup").number("reached")
    return 1 / speed if speed else None


def speed_section(lines: Sequence[Line], report: Fields, joined: bool) -> Section:
    """Changes of the scores over speed-up, ours and those that others published on the same data set.

    lines: `own_lines`. report: names the task and the data. joined: each of our lines is one family's curve.
    """
    series = beside(task_of(report), report.part("evaluated_on").text("data_set"))
    title = "F1 against speed, beside what others published" if series else "Scores against speed"
    section = Section("speed", title)
    theirs = [
        Line(_label(published), published.changes, own=False) for published in series if published.changes
    ]
    if not lines:
        section.notes.append("This report lacks its speed-up or its losses.")
    if lines or theirs:
        label = "points of F1 gained" if series else "points gained"
        section.drawings.append(figures.against_speed("report-speed", label, [*lines, *theirs], joined))
    if not series:
        section.notes.append(
            "No published results stand beside these: as far as the report knows, they are not on a data set "
            "that others published speeds for."
        )
        return section
    section.notes.append(
        "Hollow points are others' results on the same data set, but with other models and hardware, each "
        "against its dense model; they show what has been reached, not what these models would reach there."
    )
    if any(published.dense is None for published in series):
        section.notes.append("The table also lists a series whose dense model's F1 we do not know.")
    head = ("source", "model", "data", "hardware", "score", "dense", "pruned")
    rows = [_row(published) for published in series]
    section.tables.append(Table(head, rows, "Published by others", texts=True))
    return section


def own_lines(models: Sequence[Fields], scores: Sequence[Score]) -> list[Line]:
    """A line for each score that has a loss: (speed-up, points gained) of every model that has both."""
    lines = []
    for score in scores:
        points = []
        for model in models if score.has_loss else ():
            speed, gained = model.part("speedup").number("reached"), change(model, score)
            if speed is not None and gained is not None:
                points.append((speed, gained))
        if points:
            points.sort()
            ends = [(low, high) for _, (_, low, high) in points]
            label = f"ours: {score.label} (bars: 95% interval)"
            lines.append(Line(label, [(speed, value) for speed, (value, _, _) in points], ends))
    return lines


def _row(published: Published) -> list[str]:
    points = ", ".join(f"{speed:.2f}x\u00a0{value:g}" for speed, value in published.points)
    score = next(score.label for score in (*SQUAD_SCORES, *NQ_SCORES) if score.key == published.score)
    dense = shown(published.dense, "{:g}")
    return [
        published.source, published.model, published.data, published.hardware, score, dense, points
    ]  # fmt: skip


def _label(published: Published) -> str:
    """The source, and what a reader must know beside its points: model, score or data, hardware."""
    source = published.source.split(",")[0]
    what = published.data if published.score == "f1" else f"{published.score.split('_')[0]} F1"
    return f"{source}: {published.model}, {what}\n({published.hardware})"


def workloads_section(report: Fields) -> Section:
    """Both models' times on each workload, and how far the latency table was off."""
    section = Section("speeds", "Speeds by workload")
    for name in _workloads(report):
        rows = []
        for model in MODELS:
            timed = report.part(model).part("workloads").part(name)
            ms = timed.part("ms")
            times = [shown(ms.number(f"p{percentile}"), "{:,.1f}") for percentile in (50, 20, 80)]
            if timed:
                rows.append([model, *times, shown(timed.number("sequences_per_s"), "{:,.1f}")])
        if rows:
            section.tables.append(Table(("", "ms a batch", "p20", "p80", "sequences/s"), rows, name))
    speed = report.part("speedup")
    if speed.number("reached") is not None:
        workload = f" on {speed.text('workload')}" if speed.text("workload") else ""
        dtype = f" in {speed.text('dtype')}" if speed.text("dtype") else ""
        section.notes.append(
            f"The pruned model against the dense one, both on our runtime{dtype}, timed in turn: "
            f"{speed.number('reached'):.2f}x{workload} (the median of the rounds)."
        )
    if speed.number("against_hugging_face") is not None:
        section.notes.append(
            "Against the dense model as Hugging Face runs it, in fp32 and with its padding: "
            f"{speed.number('against_hugging_face'):.2f}x."
        )
    table = report.part("latency_table")
    errors = [(name, error) for name in MODELS if (error := table.part(name).number("error")) is not None]
    if errors:
        listed = ", ".join(f"{name} {100 * error:+z.1f}%" for name, error in errors)
        predicted = shown(table.number("predicted_speedup"), "{:.2f}x")
        section.notes.append(f"The latency table predicted {predicted}; its times are off by {listed}.")
    return section


def _workloads(report: Fields) -> list[str]:
    """The names of both models' workloads, in the report's order."""
    return list(dict.fromkeys(name for model in MODELS for name in report.part(model).part("workloads")))


def circumstances(report: Fields) -> list[Section]:
    """How the report came about: backends, machine, versions, steps and time, command, a section each."""
    backends = Section("backends", "Backends used for each op")
    for workload in _workloads(report):
        used = [report.part(model).part("workloads").part(workload).part("backends") for model in MODELS]
        ops = dict.fromkeys(op for backend_of in used for op in backend_of)
        rows = [[op, *(backend_of.text(op) or "-" for backend_of in used)] for op in ops]
        if rows:
            backends.tables.append(Table(("op", *MODELS), rows, workload, texts=True))
    machine = Section("machine", "Machine", tables=_pairs(report.part("machine")))
    versions = Section("versions", "Versions", tables=_pairs(report.part("versions")))
    command = Section("command", "Command", code=report.text("command") or "")
    return [backends, machine, versions, _plan(report), command]


def _pairs(fields: Fields) -> list[Table]:
    """A table of names and values as they are in the report, with null as "none"."""
    rows = [
        (name.replace("_", " "), "none" if value is None else str(value))
        for name, value in fields.values.items()
    ]
    return [Table((), rows, texts=True)] if rows else []


def _plan(report: Fields) -> Section:
    plan, minutes = report.part("plan"), report.part("training").number("minutes")
    rows = []
    for label, steps, seconds in (
        ("steps that train or score gates", "gate_steps", "gate_step_seconds"),
        ("retrain steps", "retrain_steps", "retrain_step_seconds"),
    ):
        if plan.number(steps) is not None:
            step_seconds = plan.number(seconds)
            time = "" if step_seconds is None else f"{step_seconds:.2f} s each"
            rows.append((label, f"{plan.number(steps):,.0f}", time))
    if minutes is not None:
        rows.append(("minutes until the model was trained", f"{minutes:.1f}", ""))
    return Section("plan", "Steps and time", tables=[Table((), rows)] if rows else [])
