"""The study's results as its page reads them, and their figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from harness import Row, read_rows
from pruned_trainer.report.figures import LIGHT, Drawing, Line, against_speed, draw, layers
from pruned_trainer.report.published import PAPER, PUBLISHED
from study.records import over_seeds
from study.rows import METHODS, TABLE

# Colour, marker and line of each way to choose: apart for the colour-blind, and in grey.
STYLES = {
    "l0": ("first", "o", "-"),
    "leave-one-out": ("second", "s", "--"),
    "gain": ("fourth", "^", "-."),
    "random": ("third", "D", ":"),
}
NAMES = {"l0": "L0 gates", "leave-one-out": "leave-one-out", "gain": "gain", "random": "random"}
PARTS = {"heads": "heads", "ffn": "FFN units", "hidden": "hidden dimensions"}
# The letters of the paper's rows.
LETTERS = ("a", *TABLE)
SCORES = {"f1": "F1", "f1_span": "span F1"}


def timed(rows: Sequence[Row], letter: str, workload: str) -> list[Row]:
    """The timings of one row of the table on one workload, of all seeds."""
    return [row for row in rows if row["row"] == letter and row["workload"] == workload]


class Results:
    """The rows of one study, and the timings of their models wherever they were made, newest first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read_rows(path)
        files = sorted(path.parent.glob("study-timings-*.csv"))
        timings = {file: rows for file in files if (rows := read_rows(file))[0]["study"] == path.name}
        newest_first = sorted(
            timings.items(),
            key=lambda item: (item[1][0]["date"], item[1][0]["machine_threads"]),
            reverse=True,
        )
        self.timings = dict(newest_first)

    @property
    def stem(self) -> str:
        return self.path.stem

    @property
    def seeds(self) -> dict[str, list[int]]:
        """The seeds of which any is finished, for each kind of row."""
        kinds: dict[str, set[int]] = {}
        for row in self.rows:
            if row["finished"] == "True" and "seed" in row:
                kinds.setdefault(row["kind"], set()).add(row["seed"])
        return {kind: sorted(seeds) for kind, seeds in kinds.items()}

    def curve(self, part: str, method: str) -> dict[float, list[Row]]:
        """Each fraction, rising, with the rows of all seeds at it."""
        points: dict[float, list[Row]] = {}
        for row in self.rows:
            if row.get("kind") == "curve" and row["on"] == part and row["method"] == method:
                points.setdefault(float(row["fraction"]), []).append(row)
        return dict(sorted(points.items()))

    def letters(self) -> list[str]:
        """The letters of the table's rows that have results."""
        return sorted({row["row"] for row in self.rows if row.get("kind") == "row"})

    def row(self, letter: str, retraining: str = "distilled") -> list[Row]:
        """The rows of a letter, or of a recipe (which has one way alone), of all seeds, that were trained on
        in this way, or not at all."""
        ways = (retraining, "none")
        rows = [row for row in self.rows if row.get("row") == letter]
        return [row for row in rows if row.get("retraining", retraining) in ways]

    def models(self, letter: str) -> list[Row]:
        """The rows of a letter, of all seeds, that were trained on in the first way that has any: all have
        the same sizes."""
        return self.row(letter) or self.row(letter, "cross-entropy")

    def timed(self, letter: str) -> list[Row]:
        """The newest timings of a letter on their first workload, of all seeds."""
        newest = next(iter(self.timings.values()), [])
        return timed(newest, letter, newest[0]["workload"]) if newest else []

    def missing(self) -> dict[str, dict[str, int]]:
        """The number of pieces of work that are not finished, by part and by seed."""
        counts: dict[str, dict[str, int]] = {}
        for row in self.rows:
            if row["finished"] == "False":
                of_part = counts.setdefault(row["part"], {})
                seed = row["unit"].rpartition("seed")[2]
                of_part[seed] = of_part.get(seed, 0) + 1
        return counts


def of_seeds(seeds: Sequence[int]) -> str:
    """The seeds, in words."""
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"


def labelled(results: Results, label: str, rows: Sequence[Row]) -> str:
    """The label of what these rows of one kind give, with their seeds where the kind has others, too. Times
    have no kind: they are those of rows."""
    seeds = sorted({row["seed"] for row in rows})
    every = results.seeds[rows[0].get("kind", "row")] if rows else seeds
    return label if seeds == every else f"{label} ({of_seeds(seeds)})"


def dense_score(points: dict[float, list[Row]], score: str) -> float:
    """The dense model's score on the same questions: any row's score plus the points that it lost."""
    row = next(iter(points.values()))[0]
    return float(row[score] + row[f"{score}_loss"])


def figures(results: Results) -> list[Drawing]:
    """The figures that the results suffice for; their names begin with the CSV's."""
    drawn = []
    parts = [part for part in ("heads", "ffn") if results.curve(part, "l0")]
    if parts:
        drawn.append(curves_figure(results, parts))
    if results.row("e") and results.row("a"):
        kept, dense = (_layer_sizes(results.row(row)[0]["layers"]) for row in ("e", "a"))
        drawn.append(layers(f"{results.stem}-layers", kept, dense))
    if results.timings and len(results.letters()) > 1:
        drawn.append(speed_figure(results))
    return drawn


def curves_figure(results: Results, parts: Sequence[str]) -> Drawing:
    """Scores over the removed fraction, without retraining; a panel for each part and score."""

    def fill(figure: Figure) -> None:
        grid = figure.subplots(len(parts), 2, sharex=True, sharey="col", squeeze=False)
        for line, part in zip(grid, parts, strict=True):
            for axes, score in zip(line, SCORES, strict=True):
                _curves(axes, results, part, score)
                axes.set_title(f"{SCORES[score]}: {PARTS[part]}")
        for axes in grid[-1]:
            axes.set_xlabel("% removed")
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)

    alt = "; ".join(
        f"{PARTS[part]}, {NAMES[method]}: "
        + ", ".join(
            f"{100 * f:g}% {over_seeds(rows, 'f1_span')[0]:.1f}"
            for f, rows in results.curve(part, method).items()
        )
        for part in parts
        for method in METHODS
    )
    return draw(f"{results.stem}-curves", f"Span F1 without retraining. {alt}", 0.9 + 2.1 * len(parts), fill)


def _curves(axes: Any, results: Results, part: str, score: str) -> None:
    for side, method in enumerate(METHODS):
        points = results.curve(part, method)
        if not points:
            continue
        colour, marker, line = STYLES[method]
        start = dense_score(points, score)
        x, y, below, above = [0.0], [start], [0.0], [0.0]
        for fraction, rows in points.items():
            value, loss = over_seeds(rows, score), over_seeds(rows, f"{score}_loss")
            if value is None or loss is None:
                continue
            x.append(100 * fraction + 1.2 * (side - 1.5))  # beside each other: no bar hides another
            y.append(value[0])
            below.append(max(loss[2] - loss[0], 0.0))
            above.append(max(loss[0] - loss[1], 0.0))
        axes.errorbar(
            x, y, [below, above], fmt=marker, linestyle=line, capsize=2, markersize=4.5,
            color=LIGHT[colour], label=NAMES[method],
        )  # fmt: skip
    axes.grid(alpha=0.7)


def speed_figure(results: Results) -> Drawing:
    """The points that the rows lose over their speed, with the paper's rows beside them."""
    lines = []
    for score in SCORES:
        points, ends, shown = [], [], []
        for letter in results.letters():
            loss = over_seeds(results.row(letter), f"{score}_loss")
            speed = over_seeds(results.timed(letter), "speedup")
            if letter in LETTERS and loss and speed:
                points.append((speed[0], -loss[0]))
                ends.append((-loss[2], -loss[1]))
                shown.append(letter)
        order = sorted(range(len(points)), key=points.__getitem__)
        label = f"{SCORES[score]}, rows {', '.join(shown)} here"
        lines.append(Line(label, [points[i] for i in order], [ends[i] for i in order]))
    paper = next(published for published in PUBLISHED["squad"] if published.source == PAPER)
    label = f"F1 in the paper: {paper.model}, {paper.data},\n{paper.hardware}"
    lines.append(Line(label, [(1.0, 0.0), *paper.changes], own=False))
    return against_speed(f"{results.stem}-speed", "points against dense", lines, joined=False)


def _layer_sizes(text: str) -> list[tuple[int, int]]:
    """The (heads, FFN width) of each layer, out of "12/1536 8/640"."""
    sizes = (layer.split("/") for layer in text.split())
    return [(int(heads), int(width)) for heads, width in sizes]
