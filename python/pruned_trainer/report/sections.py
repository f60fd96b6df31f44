"""The parts of a report's page, from report.json as it is. A part that the report says nothing of is left
out, and the page says which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pruned_trainer.pruning.importance import METHODS
from pruned_trainer.report import figures
from pruned_trainer.report.circumstances import MODELS, shown
from pruned_trainer.report.fields import Fields
from pruned_trainer.report.figures import Drawing, Line
from pruned_trainer.report.html import Section, Table
from pruned_trainer.tasks.task import SCORES, Score

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
