"""The study's part of the results page: tables and sentences from the CSVs that study_squad.py writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness import Row
from presentation import table
from study.figures import NAMES, PARTS, SCORES, Results, dense_score, timed
from study.records import over_seeds
from study.rows import METHODS

# BERT-large on SQuAD 2.0 dev in the paper, by row: % heads and % FFN removed, F1 before and after retraining,
# speed-up on a K80 at batch 1. None: not given, or its column not certain.
PAPERS: dict[str, tuple[Any, ...]] = {
    "a": (0.0, 0.0, None, 84.6, 1.0),
    "b": (44.3, 0.0, None, None, 1.19),
    "c": (0.0, 48.1, None, None, 1.29),
    "d": (44.0, 48.1, 82.6, 83.7, 1.63),
    "e": (53.1, 64.9, 80.9, 83.2, 1.95),
    "f": (57.6, 73.7, 76.8, 82.4, 2.24),
    "g": (60.1, 78.4, 67.8, 81.5, 2.40),
}


def mean(rows: Sequence[Row], value: str, form: str = "{:.2f}", scale: float = 1.0) -> str:
    """A number without its interval; - where none has it."""
    found = over_seeds(rows, value)
    return form.format(found[0] * scale) if found else "-"


def change(rows: Sequence[Row], loss: str) -> str:
    """What was won (+) or lost (-) of the dense model's score, with its interval."""
    found = over_seeds(rows, loss)
    if found is None:
        return "-"
    value, low, high = found
    if low == high == 0:  # the dense model itself
        return "-"
    return f"{-value:+.2f} ({-high:+.2f} to {-low:+.2f})"


def papers(letter: str) -> list[str]:
    """The paper's row: what it removed, its F1 before and after retraining."""
    heads, ffn, before, after, _ = PAPERS[letter]
    shown = ["-" if value is None else f"{value:.1f}" for value in (before, after)]
    return [f"{heads:.1f}%, {ffn:.1f}%", ", ".join(shown)]


def machine_of(row: Row) -> str:
    """The accelerator that a row names, else the processor with its threads."""
    if row.get("machine_accelerator"):
        return str(row["machine_accelerator"])
    threads = row["machine_threads"]
    return f"{row['machine_processor']}, {threads} thread{'' if threads == 1 else 's'}"


# What `_quality` and `_scores` give.
QUALITY_COLUMNS = (
    "heads removed", "FFN removed", "F1 before", "span F1 before", "F1", "span F1", "F1 against dense",
    "span F1 against dense",
)  # fmt: skip
SCORE_COLUMNS = ("F1", "against dense", "span F1", "against dense")


def section(results: Results) -> list[str]:
    """Everything that the page says of one study."""
    rows = [row for row in results.rows if row["finished"] == "True"]
    if not rows:
        return []
    first = rows[0]
    seeds = sorted({row["seed"] for row in rows if "seed" in row})
    text = [
        f"### Profile {first['profile']}: {machine_of(first)}",
        "",
        f"Teacher {first['model']}; {'seed' if len(seeds) == 1 else 'seeds'} "
        f"{', '.join(map(str, seeds))}. Intervals are 95%, bootstrapped over the questions"
        + ("." if len(seeds) == 1 else "; of several seeds: means, and the outermost ends of the intervals."),
        "",
    ]
    for part in (_curves_text, _rows_text, _layers_text, _hidden_text, _recipes_text, _origin_text):
        text += part(results)
    return text


def image(results: Results, name: str, alt: str) -> list[str]:
    """A figure, where it lies beside the CSV."""
    path = results.path.with_name(f"{results.stem}-{name}.png")
    return [f"![{alt}](results/{path.name})", ""] if path.is_file() else []


def _curves_text(results: Results) -> list[str]:
    parts = [part for part in ("heads", "ffn") if results.curve(part, "l0")]
    if not parts:
        return []
    some = next(iter(results.curve(parts[0], "l0").values()))[0]
    text = [
        "#### Four ways to choose, without retraining",
        "",
        f"The lowest-ranking heads, or FFN units, are taken away and nothing is trained after; "
        f"{some['questions']} questions. L0 takes the gates of that multiple of the paper's lambda whose own "
        "threshold removes the nearest share. Differences are between answers to the same questions. L0's "
        f"gates saw {some['windows_l0']:,} windows of the training file, gain {some['windows_gain']:,}, "
        f"leave-one-out {some['windows_leave-one-out']:,}, but again for each head and group of 64 units.",
        "",
        *image(results, "curves", "F1 and span F1 over the share removed, by four ways to choose"),
    ]
    for part in parts:
        text += _curve_table(results, part) + _ordering(results, part)
    return text


def _curve_table(results: Results, part: str) -> list[str]:
    lines = []
    for score in SCORES:
        points = results.curve(part, "l0")
        dense = f"{dense_score(points, score):.2f}"
        lines.append([f"{SCORES[score]}, 0%", *[dense] * len(METHODS)])
        for fraction in points:
            cells = []
            for method in METHODS:
                rows = results.curve(part, method).get(fraction, [])
                cells.append(f"{mean(rows, score)}{_behind(rows, score) if method != 'l0' else ''}")
            lines.append([f"{SCORES[score]}, {100 * fraction:g}%", *cells])
    header = [f"{PARTS[part]} removed", "L0 gates", *(f"{NAMES[m]} (behind L0)" for m in METHODS[1:])]
    return table(header, lines)


def _behind(rows: Sequence[Row], score: str) -> str:
    found = over_seeds(rows, f"{score}_behind_l0")
    return f" ({found[0]:.1f}; {found[1]:.1f} to {found[2]:.1f})" if found else ""


def _ordering(results: Results, part: str) -> list[str]:
    """Where L0 is ahead or behind, and up to where it stays within the paper's 5 points."""
    text = []
    for method in METHODS[1:]:
        counts = {"ahead": [], "behind": [], "not to be told apart": []}
        for fraction, rows in results.curve(part, method).items():
            found = over_seeds(rows, "f1_span_behind_l0")
            if found:
                kind = "ahead" if found[1] > 0 else "behind" if found[2] < 0 else "not to be told apart"
                counts[kind].append(f"{100 * fraction:g}%")
        told = [f"{kind} at {', '.join(places)}" for kind, places in counts.items() if places]
        text.append(f"- L0 against {NAMES[method]} in span F1: {'; '.join(told)}.")
    own = [
        f"{100 * fraction:g}% from lambda x{rows[0]['multiple']:g}, "
        f"which closed {mean(rows, 'closed', '{:.0f}%', 100)}"
        for fraction, rows in results.curve(part, "l0").items()
    ]
    text.append(f"- L0's gates: {'; '.join(own)}. Where more is removed, the rank of log_alpha says what.")
    small = [
        fraction
        for fraction, rows in results.curve(part, "l0").items()
        if max(over_seeds(rows, f"{score}_loss")[0] for score in SCORES) < 5  # type: ignore[index]
    ]
    share = f"{100 * max(small):g}%" if small else "none of the shares tried"
    paper = {"heads": "48% of heads", "ffn": "70% of FFN units"}[part]
    text.append(
        f"- L0 removes {share} for less than 5 points of both scores (the paper, BERT-base: {paper})."
    )
    return [*text, ""]


def _rows_text(results: Results) -> list[str]:
    letters = results.letters()
    if not letters:
        return []
    some = results.row(letters[0])[0]
    text = [
        "#### The rows of the paper's table",
        "",
        "Gates of heads and of FFN units trained apart at multiples of the paper's lambda on frozen weights, "
        f"decided at log_alpha 0, compacted, trained on with distillation ({some['windows_retrained']:,} "
        f"windows); {some['questions']:,} questions. "
        "Row a is the dense model. The paper's model is BERT-large on SQuAD 2.0 dev, on a "
        "K80 at batch 1.",
        "",
    ]
    lines = []
    for letter in [x for x in letters if x != "h"]:
        rows = results.row(letter)
        lines.append([letter, _lambdas(rows[0]), *_quality(rows), *papers(letter)])
    papers_columns = ["paper: heads, FFN removed", "paper: F1 before, after"]
    text += table(["row", "lambda (heads, FFN)", *QUALITY_COLUMNS, *papers_columns], lines)
    for timings in list(results.timings.values()) or [[]]:
        text += _speed_table(results, timings, [x for x in letters if x != "h"])
    return text + image(results, "speed", "Points lost over measured speed-up, the paper's beside ours")


def _lambdas(row: Row) -> str:
    return ", ".join(f"{row.get(f'lambda_{part}', 0):g}" for part in ("heads", "ffn"))


def _quality(rows: Sequence[Row]) -> list[str]:
    return [
        mean(rows, "heads_removed", "{:.1f}%", 100),
        mean(rows, "ffn_removed", "{:.1f}%", 100),
        mean(rows, "f1_before"),
        mean(rows, "f1_span_before"),
        mean(rows, "f1"),
        mean(rows, "f1_span"),
        change(rows, "f1_loss"),
        change(rows, "f1_span_loss"),
    ]


def _scores(rows: Sequence[Row]) -> list[str]:
    cells = ((mean(rows, score), change(rows, f"{score}_loss")) for score in SCORES)
    return [cell for pair in cells for cell in pair]


def _speed_table(results: Results, timings: Sequence[Row], letters: Sequence[str]) -> list[str]:
    """Sizes and speeds, as one machine measured them; sizes alone where none has."""
    workloads = list(dict.fromkeys(row["workload"] for row in timings))
    header = ["row", "MiB", "MACs cut"]
    for workload in workloads:
        header += [f"ms, {workload}", "speed-up", "of the cut arrives"]
    lines = []
    for letter in letters:
        rows = results.row(letter)
        cells = [letter, mean(rows, "mib", "{:.1f}"), mean(rows, "macs_cut", "{:.2f}x")]
        for workload in workloads:
            found = timed(timings, letter, workload)
            cells += [mean(found, "ms", "{:.1f}"), mean(found, "speedup", "{:.2f}x")]
            cells.append(mean(found, "arrives", "{:.0f}%", 100) if letter != "a" else "-")
        lines.append([*cells, f"{PAPERS[letter][4]:.2f}x"])
    if not timings:
        return [*table([*header, "paper's speed-up"], lines), "Not timed yet: `--only timings`.", ""]
    first = timings[0]
    said = f" Meanwhile: {first['note']}." if "note" in first else ""
    return [
        *table([*header, "paper's speed-up"], lines),
        f"{machine_of(first)}: all rows' models took turns with the dense one, batch by batch, on our "
        f"runtime; medians of {first['rounds']} rounds, {first['date']}.{said} In the paper 76% of row e's "
        "cut arrives as speed.",
        "",
    ]


def _layers_text(results: Results) -> list[str]:
    rows = results.row("e")
    if not rows:
        return []
    text = ["#### Which layers keep what", "", *image(results, "layers", "Heads and FFN width left in row e")]
    lines, shares = [], []
    for letter in [x for x in results.letters() if x not in ("a", "h")]:
        lines.append([letter, *results.row(letter)[0]["layers"].split()])
    number = len(lines[0]) - 1
    text += table(["row", *(f"layer {i}" for i in range(number))], lines)
    for place, what in enumerate(("heads", "FFN units")):
        kept = [[int(layer.split("/")[place]) for layer in row["layers"].split()] for row in rows]
        total = [sum(values) / len(rows) for values in zip(*kept, strict=True)]
        shares.append(f"{what} {', '.join(_thirds(total))}")
    return [
        *text,
        f"Heads/FFN width left. Of what row e keeps, the first, middle and last third of the layers have: "
        f"{'; '.join(shares)}. The paper: middle layers keep most, those near the embedding and "
        "near the answer are pruned harder.",
        "",
    ]


def _thirds(values: Sequence[float]) -> list[str]:
    """Percent of the sum in the first, middle and last third."""
    number, whole = len(values), sum(values)
    ends = [round(number * k / 3) for k in range(4)]
    parts = [sum(values[low:high]) for low, high in zip(ends, ends[1:], strict=False)]
    return [f"{100 * part / whole:.0f}%" if whole else "-" for part in parts]


def _hidden_text(results: Results) -> list[str]:
    points, rows = results.curve("hidden", "l0"), results.row("h")
    if not points and not rows:
        return []
    text = ["#### Gates on hidden dimensions, as in v1 of the paper", ""]
    if points:
        lines = [[f"{100 * fraction:g}%", *_scores(some)] for fraction, some in points.items()]
        header = ["hidden dimensions removed, L0, no retraining", *SCORE_COLUMNS]
        text += table(header, lines)
    if rows:
        cells = [mean(rows, "hidden_removed", "{:.1f}%", 100), *_quality(rows), mean(rows, "mib", "{:.1f}")]
        header = ["row h (lambda 1, 1, 1): hidden removed", *QUALITY_COLUMNS, "MiB", "speed-up"]
        text += table(header, [[*cells, mean(results.timed("h"), "speedup", "{:.2f}x")]])
    return text


def _recipes_text(results: Results) -> list[str]:
    joint, paper = results.row("joint"), results.row("e")
    if not joint or not paper:
        return []
    lines = []
    for name, rows in (("the paper's (row e)", paper), ("joint", joint)):
        seconds = [mean(rows, key, "{:.0f}") for key in ("gate_seconds", "retrain_seconds")]
        kept = mean(rows, "macs_kept", "{:.1f}%", 100)
        speed = mean(results.timed(rows[0]["row"]), "speedup", "{:.2f}x")
        lines.append([name, kept, speed, " + ".join(seconds), mean(rows, "f1_span_before"), *_scores(rows)])
    columns = ["MACs kept", "speed-up", "seconds (gates + retraining)", "span F1 before", *SCORE_COLUMNS]
    header = ["recipe", *columns]
    return [
        "#### The joint recipe beside the paper's, same size, same time",
        "",
        *table(header, lines),
        "Seconds are of the processor, or by the clock on a GPU. The joint recipe's steps were planned to "
        "take as long as row e's, from steps of both that were timed one after the other.",
        "",
    ]


def _origin_text(results: Results) -> list[str]:
    rows = [row for row in results.rows if row["finished"] == "True"]
    dates = sorted({row["date"] for row in rows})
    versions = ", ".join(f"{name} {rows[0][f'version_{name}']}" for name in ("torch", "transformers"))
    notes = sorted({row["note"] for row in rows if "note" in row})
    files = [results.path, *results.timings]
    text = [
        f"Made {' to '.join(dict.fromkeys((dates[0], dates[-1])))} with {versions} by "
        f"`{rows[0]['command']}`: {', '.join(f'[{one.name}](results/{one.name})' for one in files)}"
        + (f". Meanwhile: {'; '.join(notes)}." if notes else "."),
        "",
    ]
    missing = results.missing()
    if missing:
        text += [f"Not finished, and so missing above: {', '.join(missing)}.", ""]
    return text
