"""The study's part of the results page: sections of tables and sentences from study_squad.py's CSVs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from harness import Row
from presentation import counted, table
from pruned_trainer.pruning.options import MAX_PACE
from study.claims import claims, kept_by_layer, thirds
from study.figures import NAMES, PARTS, SCORES, Results, dense_score, labelled, of_seeds, timed
from study.records import over_seeds
from study.rows import METHODS, OTHERS, RETRAININGS

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
    """The mean of a number over the rows' seeds, without its interval; - where no row has it."""
    interval = over_seeds(rows, value)
    return form.format(interval[0] * scale) if interval else "-"


def change(rows: Sequence[Row], loss: str) -> str:
    """The points won (+) or lost (-) against the dense model's score, with their interval."""
    interval = over_seeds(rows, loss)
    if interval is None:
        return "-"
    value, low, high = interval
    if low == high == 0:  # the dense model itself
        return "-"
    return f"{-value:+z.2f} ({-high:+z.2f} to {-low:+z.2f})"


def papers(letter: str) -> list[str]:
    """The paper's row: the shares that it removed, and its F1 before and after retraining."""
    heads, ffn, before, after, _ = PAPERS[letter]
    shown = ["-" if value is None else f"{value:.1f}" for value in (before, after)]
    return [f"{heads:.1f}%, {ffn:.1f}%", ", ".join(shown)]


def machine_of(row: Row) -> str:
    """The accelerator that a row names, else the processor with its threads."""
    if row.get("machine_accelerator"):
        return str(row["machine_accelerator"])
    return f"{row['machine_processor']}, {counted(row['machine_threads'], 'thread')}"


# The columns that `_quality` and `_scores` fill.
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
    text = [
        f"### Profile {first['profile']}: {'; '.join(dict.fromkeys(map(machine_of, rows)))}",
        "",
        f"Teacher {first['model']}; {seeds_text(results)}",
        "",
    ]
    for part in (claims, _curves_text, _rows_text, _layers_text, _hidden_text, _recipes_text, _origin_text):
        text += part(results)
    return text


def seeds_text(results: Results) -> str:
    """Which seeds each kind of row has, and what that means for its intervals."""
    kinds: dict[str, list[str]] = {}
    for kind, seeds in results.seeds.items():
        kinds.setdefault(of_seeds(seeds), []).append(f"{kind}s")
    text = "; ".join(f"{', '.join(names)}: {which}" for which, names in kinds.items()) + "."
    if len(kinds) == 1:
        text = f"{next(iter(kinds))}."
    text += " Intervals are 95%, bootstrapped over the questions."
    several = [len(seeds) > 1 for seeds in results.seeds.values()]
    if any(several):
        text += " Of several seeds, numbers are means, and ends the outermost of any seed."
        text += " What has other seeds than these names them."
    if not all(several):
        text += " Where there is one seed, what another would change is in no interval."
    return text


def image(results: Results, name: str, alt: str) -> list[str]:
    """A figure's Markdown, if the figure lies beside the CSV."""
    path = results.path.with_name(f"{results.stem}-{name}.png")
    return [f"![{alt}](results/{path.name})", ""] if path.is_file() else []


def _curves_text(results: Results) -> list[str]:
    parts = [part for part in ("heads", "ffn") if results.curve(part, "l0")]
    if not parts:
        return []
    first = next(iter(results.curve(parts[0], "l0").values()))[0]
    text = [
        "#### Four ways to choose, without retraining",
        "",
        "The lowest-ranking heads, or FFN units, are removed and nothing is trained after that; "
        f"{first['questions']} questions. L0 gates were held to closing a share of the part, and at each "
        "share those rank that were held nearest to it. Differences are between answers to the same "
        f"questions. L0's gates saw {first['windows_l0']:,} windows of the training file, gain saw "
        f"{first['windows_gain']:,}, and leave-one-out saw {first['windows_leave-one-out']:,}, once for "
        f"each head and once for each group of 64 FFN units. {_gates_text(first)}",
        "",
        *image(results, "curves", "F1 and span F1 over the share removed, by four ways to choose"),
    ]
    for part in parts:
        text += _curve_table(results, part) + _ordering(results, part) + _compensated(results, part)
    return text


def _gates_text(row: Row) -> str:
    """How the gates were trained, with the paper's numbers beside."""
    return (
        f"L0's gates were trained with {row['gate_batch']} windows a step (the paper: 24) at a rate of "
        f"{row['gate_learning_rate']:g} (the paper: 0.1), from a log_alpha of {row['gate_start']:g} (the "
        "paper does not say), and an open gate was charged by P(gate = 1), as in the paper. The L0 columns "
        "speak for this training of gates alone."
    )


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
            label = labelled(results, f"{SCORES[score]}, {100 * fraction:g}%", points[fraction])
            lines.append([label, *cells])
    header = [f"{PARTS[part]} removed", "L0 gates", *(f"{NAMES[m]} (behind L0)" for m in METHODS[1:])]
    return table(header, lines)


def _compensated(results: Results, part: str) -> list[str]:
    """Span F1 of the same choices once the narrow models were compensated."""
    value, lines = "f1_span_compensated", []
    for fraction, rows in results.curve(part, "l0").items():
        cells = [mean(results.curve(part, method).get(fraction, []), value) for method in METHODS]
        lines.append([labelled(results, f"{100 * fraction:g}%", rows), *cells])
    header = [f"{PARTS[part]} removed, compensated: span F1", *(NAMES[method] for method in METHODS)]
    return table(header, lines)


def _behind(rows: Sequence[Row], score: str) -> str:
    """How many points the rows are behind L0, with the interval."""
    interval = over_seeds(rows, f"{score}_behind_l0")
    return f" ({interval[0]:.1f}; {interval[1]:.1f} to {interval[2]:.1f})" if interval else ""


def _ordering(results: Results, part: str) -> list[str]:
    """The shares at which L0 is ahead or behind, and the largest at which it loses less than the paper's 5
    points."""
    text = []
    for method in METHODS[1:]:
        orders = [f"in {name} {_order(results, part, method, score)}" for score, name in SCORES.items()]
        text.append(f"- L0 against {NAMES[method]}: {'. '.join(reversed(orders)).replace('. in', '. In')}.")
    gates = [
        f"{100 * fraction:g}% from those held at {100 * rows[0]['held']:g}%"
        for fraction, rows in results.curve(part, "l0").items()
    ]
    text.append(
        f"- L0's gates: {'; '.join(gates)}. Where another share is removed, it is the lowest by log_alpha."
    )
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


def _order(results: Results, part: str, method: str, score: str) -> str:
    """At which shares L0 is ahead of a method in a score, behind it, or not to be told apart from it."""
    shares: dict[str, list[str]] = {"ahead": [], "behind": [], "not to be told apart": []}
    for fraction, rows in results.curve(part, method).items():
        interval = over_seeds(rows, f"{score}_behind_l0")
        if interval:
            _, low, high = interval
            kind = "ahead" if low > 0 else "behind" if high < 0 else "not to be told apart"
            shares[kind].append(f"{100 * fraction:g}%")
    return "; ".join(f"{kind} at {', '.join(places)}" for kind, places in shares.items() if places)


def _rows_text(results: Results) -> list[str]:
    letters = [letter for letter in results.letters() if letter in PAPERS]
    if not letters:
        return []
    text = _both_retrainings(results, letters)
    for timings in list(results.timings.values()) or [[]]:
        text += _speed_table(results, timings, [*letters, *(x for x in OTHERS if results.row(x))])
    return text + image(results, "speed", "Points lost over measured speed-up, the paper's beside ours")


PAPERS_COLUMNS = ("paper: heads, FFN removed", "paper: F1 before, after")


def _both_retrainings(results: Results, letters: Sequence[str]) -> list[str]:
    """The table of rows at the paper's own shares, retrained in both ways."""
    first = results.row(letters[0])[0]
    rows = results.row("a")
    label = labelled(results, "a", rows)
    lines = [[label, "-", *_quality(rows), "-", "-", *papers("a")]] if rows else []
    for retraining in RETRAININGS:
        for letter in [*OTHERS, *(x for x in letters if x != "a")]:
            rows = results.row(letter, retraining)
            against = [change(rows, f"{score}_loss_control") for score in SCORES]
            cells = [*_quality(rows), *against, *(papers(letter) if letter in PAPERS else ["-", "-"])]
            lines += [[labelled(results, letter, rows), retraining, *cells]] if rows else []
    columns = [*QUALITY_COLUMNS, "F1 against control", "span F1 against control", *PAPERS_COLUMNS]
    return [
        "#### The rows of the paper's table",
        "",
        "Gates of heads and of FFN units trained apart on frozen weights, held to the paper's own shares, "
        f"compacted, and trained on ({first['windows_retrained']:,} windows; the paper: an epoch) with "
        f"cross-entropy, as in the paper, or with distillation; {first['questions']:,} questions. Row a is "
        "the dense model as it came. The control is that model, half every second layer of it, trained on "
        "for as many steps. The paper's model is BERT-large on SQuAD 2.0 dev, on a K80 at batch 1.",
        "",
        *table(["row", "trained on with", *columns], lines),
    ]


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
    """The rows' sizes, and their speeds as one machine measured them; sizes alone where none has yet."""
    workloads = list(dict.fromkeys(row["workload"] for row in timings))
    header = ["row", "MiB", "MACs cut"]
    for workload in workloads:
        header += [f"ms, {workload}", "speed-up", "of the cut arrives"]
    lines = []
    for letter in letters:
        rows = results.models(letter)
        label = labelled(results, letter, rows)
        cells = [label, mean(rows, "mib", "{:.1f}"), mean(rows, "macs_cut", "{:.2f}x")]
        for workload in workloads:
            timing = timed(timings, letter, workload)
            cells += [mean(timing, "ms", "{:.1f}"), mean(timing, "speedup", "{:.2f}x")]
            cells.append(mean(timing, "arrives", "{:.0f}%", 100) + " (control)" * (letter == "a"))
        lines.append([*cells, f"{PAPERS[letter][4]:.2f}x" if letter in PAPERS else "-"])
    if not timings:
        return [*table([*header, "paper's speed-up"], lines), "Not timed yet: `--only timings`.", ""]
    first = timings[0]
    note = f" Meanwhile: {first['note']}." if "note" in first else ""
    return [
        *table([*header, "paper's speed-up"], lines),
        f"{machine_of(first)}: all rows' models took turns with the dense one, batch by batch, on our "
        f"runtime; medians of {first['rounds']} rounds, {first['date']}.{note} Row a is the dense model "
        "against itself, the control: the shares are no surer than its distance from 100%. In the paper 76% "
        "of row e's cut arrives as speed.",
        "",
    ]


def _layers_text(results: Results) -> list[str]:
    rows = results.row("e")
    if not rows:
        return []
    alt = f"Heads and FFN width left in {labelled(results, 'row e', rows[:1])}"
    text = ["#### Which layers keep what", "", *image(results, "layers", alt)]
    lines, shares, totals = [], [], {}
    for letter in [x for x in results.letters() if x in PAPERS and x != "a"]:
        model = results.models(letter)[0]
        lines.append([labelled(results, letter, [model]), *model["layers"].split()])
    number = len(lines[0]) - 1
    text += table(["row", *(f"layer {i}" for i in range(number))], lines)
    for column, part in enumerate(("heads", "FFN units")):
        totals[part] = kept_by_layer(rows, column)
        shares.append(f"{part} {', '.join(f'{share:.0%}' for share in thirds(totals[part]))}")
    return [
        *text,
        "Each cell shows the heads and the FFN width that are left. The first, middle and last third of the "
        f"layers have these shares of what {labelled(results, 'row e', rows)} keeps: {'; '.join(shares)}. In "
        "the paper the middle layers keep most, and those near the embedding and near the answer are pruned "
        "harder. " + _ends_text(totals),
        "",
    ]


def _ends_text(totals: Mapping[str, Sequence[float]]) -> str:
    """Which ends of the model are pruned harder than its middle by 3% of what is left or more, by part."""
    sentences = []
    for part, total in totals.items():
        first, middle, last = thirds(total)
        harder = [name for name, share in (("first", first), ("last", last)) if middle - share >= 0.03]
        ends = " and ".join(f"the {name}" for name in harder) or "neither"
        sentences.append(f"of {part}, {ends}")
    return f"Here these ends are pruned harder than the middle: {'; '.join(sentences)}."


def _hidden_text(results: Results) -> list[str]:
    points, rows = results.curve("hidden", "l0"), results.row("h")
    if not points and not rows:
        return []
    text = ["#### Gates on hidden dimensions, as in v1 of the paper", ""]
    if points:
        lines = [
            [labelled(results, f"{100 * fraction:g}%", at), *_scores(at)] for fraction, at in points.items()
        ]
        header = ["hidden dimensions removed, L0, no retraining", *SCORE_COLUMNS]
        text += table(header, lines)
    if rows:
        cells = [mean(rows, "hidden_removed", "{:.1f}%", 100), *_quality(rows), mean(rows, "mib", "{:.1f}")]
        header = ["row h: hidden removed", *QUALITY_COLUMNS, "MiB", "speed-up"]
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
        label = labelled(results, name, rows)
        lines.append([label, kept, speed, " + ".join(seconds), mean(rows, "f1_span_before"), *_scores(rows)])
    columns = ["MACs kept", "speed-up", "seconds (gates + retraining)", "span F1 before", *SCORE_COLUMNS]
    header = ["recipe", *columns]
    return [
        "#### The joint recipe beside the paper's, same size, similar time",
        "",
        *table(header, lines),
        "Seconds are the processor's, or the clock's on a GPU. The joint recipe's number of steps was "
        "planned so that it takes as long as row e; steps of both were timed one after the other for it."
        + _joint_text(joint),
        "",
    ]


def _joint_text(rows: Sequence[Row]) -> str:
    """What the joint recipe's steps were in each seed, and how well its plan was kept."""
    text = ""
    if all(row.get("gate_seconds") and row.get("retrain_seconds") for row in rows):
        planned = _each(f"{row['planned_seconds']:.0f} s" for row in rows)
        needed = _each(f"{row['gate_seconds'] + row['retrain_seconds']:.0f} s" for row in rows)
        text += f" It was planned for {planned}, and took {needed}."
    steps, paces = (_each(f"{row[name]:g}" for row in rows) for name in ("gate_steps", "joint_pace"))
    rates = _each(f"{row['joint_pace'] * row['joint_learning_rate']:.2f}" for row in rows)
    return text + (
        f" It had {steps} gate steps, so its gates moved {paces} times as fast, at a rate of {rates}; the "
        f"most is {MAX_PACE:g} times."
    )


def _each(values: Iterable[str]) -> str:
    """The values of all seeds, in their order; a single one where they are the same."""
    listed = list(values)
    return ", ".join(listed[:1] if len({*listed}) == 1 else listed)


def _origin_text(results: Results) -> list[str]:
    rows = [row for row in results.rows if row["finished"] == "True"]
    dates = sorted({row["date"] for row in rows})
    versions = ", ".join(
        f"{name} {' and '.join(dict.fromkeys(str(row[f'version_{name}']) for row in rows))}"
        for name in ("torch", "transformers")
    )
    notes = sorted({row["note"] for row in rows if "note" in row})
    scores = results.path.with_suffix(".npz")  # of every question
    files = [results.path, *([scores] if scores.is_file() else []), *results.timings]
    text = [
        f"Made {' to '.join(dict.fromkeys((dates[0], dates[-1])))} with {versions} by "
        f"`{rows[0]['command']}`: {', '.join(f'[{file.name}](results/{file.name})' for file in files)}"
        + (f". Meanwhile: {'; '.join(notes)}." if notes else "."),
        "",
    ]
    missing = results.missing()
    if missing:
        parts = [
            f"{part}, {', '.join(f'{number} of seed {seed}' for seed, number in seeds.items())}"
            for part, seeds in missing.items()
        ]
        text += [f"Not finished, and so missing above, are pieces of these parts: {'; '.join(parts)}.", ""]
    return text
