"""The paper's claims beside what a study found of each: shown, not shown, or the opposite, and by which
numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harness import Row
from presentation import table
from pruned_trainer.tasks.squad.metrics import FloatArray, bootstrap_interval
from study.figures import NAMES, PARTS, SCORES, Results, labelled, timed
from study.records import over_seeds
from study.rows import row_name

Interval = tuple[float, float, float]  # a mean over seeds, and the outermost ends of their intervals

SHOWN, NOT_SHOWN, OPPOSITE = "shown", "not shown", "the opposite"
# Points of F1 that BERT-large loses on SQuAD 2.0 dev by the paper's table, retrained with cross-entropy.
PAPERS_LOSSES = {"d": 0.9, "e": 1.4, "f": 2.2, "g": 3.1}
# The share of each part that BERT-base lacks in the paper for fewer than so many points, without retraining.
PAPERS_SHARES, PAPERS_POINTS = {"heads": 0.48, "ffn": 0.70}, 5.0
# A share this near stands for one of those; an unfinished study may have others alone.
NEAR = 0.05
# The part of the cut in multiplications that arrives as speed in row e of the paper.
PAPERS_ARRIVING = 0.76


@dataclass(frozen=True)
class Finding:
    """One claim of the paper, what the study says of it, and the numbers that it says so by."""

    claim: str
    verdict: str
    numbers: str


def claims(results: Results) -> list[str]:
    """The section of the page: a line for each claim that the study's finished pieces can judge."""
    findings = [
        *_choosing(results),
        *_free(results),
        *_retrained(results),
        *_shape(results),
        *_speed(results),
    ]
    if not findings:
        return []
    lines = [[finding.claim, finding.verdict, finding.numbers] for finding in findings]
    return [
        "#### The paper's claims",
        "",
        "A claim is shown, or the opposite is, where the 95% interval of the difference leaves no doubt; "
        "brackets hold the interval. Points are of span F1, because F1 hides damage on this data, unless a "
        "line says otherwise.",
        "",
        *table(["the paper", "here", "numbers"], lines),
    ]


def judged(difference: Interval) -> str:
    """The verdict on a claim that this difference is above 0."""
    _, low, high = difference
    return SHOWN if low > 0 else OPPOSITE if high < 0 else NOT_SHOWN


def together(verdicts: Mapping[str, str]) -> str:
    """The verdicts at several places as one text; one word where all are the same."""
    if len(set(verdicts.values())) == 1:
        return next(iter(verdicts.values()))
    places = {
        verdict: ", ".join(place for place, its_verdict in verdicts.items() if its_verdict == verdict)
        for verdict in (SHOWN, NOT_SHOWN, OPPOSITE)
    }
    return "; ".join(f"{verdict} at {where}" for verdict, where in places.items() if where)


def points(difference: Interval) -> str:
    return f"{difference[0]:+z.1f} ({difference[1]:+z.1f} to {difference[2]:+z.1f})"


def _finding(claim: str, differences: Mapping[str, Interval]) -> Iterator[Finding]:
    """The finding on a claim that all of these differences are above 0; none without any."""
    if differences:
        verdicts = {place: judged(difference) for place, difference in differences.items()}
        numbers = "; ".join(f"{place} {points(difference)}" for place, difference in differences.items())
        yield Finding(claim, together(verdicts), numbers)


def _choosing(results: Results) -> Iterator[Finding]:
    """On frozen weights: L0 gates against gain and random."""
    for part in ("heads", "ffn"):
        for method in ("gain", "random"):
            ahead = {}
            for fraction, rows in results.curve(part, method).items():
                interval = over_seeds(rows, "f1_span_behind_l0")
                if interval is not None:
                    ahead[labelled(results, f"{100 * fraction:g}%", rows)] = interval
            claim = f"without retraining, L0 gates choose {PARTS[part]} better than {NAMES[method]}"
            yield from _finding(claim, ahead)


def _free(results: Results) -> Iterator[Finding]:
    """How much goes for fewer than five points without retraining, at the share that is nearest."""
    for part, share in PAPERS_SHARES.items():
        curve = results.curve(part, "l0")
        fraction = min(curve, key=lambda tried: abs(tried - share), default=None)
        if fraction is None or abs(fraction - share) > NEAR:
            continue
        losses = {score: over_seeds(curve[fraction], f"{score}_loss") for score in SCORES}
        lost = {SCORES[score]: loss for score, loss in losses.items() if loss is not None}
        claim = (
            f"BERT-base loses less than {PAPERS_POINTS:g} F1 without {share:.0%} of its {PARTS[part]}, not "
            "retrained"
        )
        verdicts = {score: judged(_below(loss, PAPERS_POINTS)) for score, loss in lost.items()}
        numbers = "; ".join(f"{score} lost {points(loss)}" for score, loss in lost.items())
        removed = labelled(results, f"without {fraction:.0%}", curve[fraction])
        yield Finding(claim, together(verdicts), f"{removed}: {numbers}")


def _below(loss: Interval, bound: float) -> Interval:
    """By how much a loss stays below a bound."""
    value, low, high = loss
    return bound - value, bound - high, bound - low


def _retrained(results: Results) -> Iterator[Finding]:
    """What retraining wins, what is lost for good, distillation, and a smaller dense model beside."""
    letters, scores = [x for x in PAPERS_LOSSES if results.row(x)], _scores(results)
    after = _differences(scores, results, letters, ("cross-entropy", ""), ("cross-entropy", "-before"))
    yield from _finding("retraining with cross-entropy wins back what pruning lost", after)
    kept = {}
    for letter in letters:
        rows = results.row(letter, "cross-entropy")
        loss = over_seeds(rows, "f1_loss_control")
        if loss is not None:
            kept[letter] = (labelled(results, f"row {letter}", rows), loss)
    if kept:
        losses_there = ", ".join(f"row {letter} loses {PAPERS_LOSSES[letter]:g}" for letter in kept)
        windows = results.row(next(iter(kept)), "cross-entropy")[0]["windows_retrained"]
        margins = {label: _below(loss, PAPERS_LOSSES[letter]) for letter, (label, loss) in kept.items()}
        yield Finding(
            f"after retraining with cross-entropy for an epoch, {losses_there} F1",
            together({label: judged(margin) for label, margin in margins.items()}),
            f"here after {windows:,} windows, F1 lost against the control: "
            + "; ".join(f"{label} {points(loss)}" for label, loss in kept.values()),
        )
    better = _differences(scores, results, letters, ("distilled", ""), ("cross-entropy", ""))
    yield from _finding("distillation is better than cross-entropy to retrain with", better)
    larger = _differences(scores, results, letters, ("distilled", ""), ("distilled", ""), other_letter="half")
    claim = (
        "a pruned model is better than a smaller dense one, distilled as long (in the paper as fast, on "
        "Natural Questions: better by 0.3 long F1, worse by 0.5 short F1)"
    )
    for finding in _finding(claim, larger):
        cuts = [_cut(results, letter) for letter in ("half", *letters)]
        sizes = f"MACs cut {cuts[0]} by half the layers, {', '.join(cuts[1:])} by the rows"
        yield Finding(finding.claim, finding.verdict, f"{finding.numbers}; {sizes}")


def _cut(results: Results, letter: str) -> str:
    cut = over_seeds(results.row(letter), "macs_cut")
    return "-" if cut is None else f"{cut[0]:.2f}x"


def _scores(results: Results) -> Mapping[str, FloatArray]:
    """The scores of every question, by model; none where their file is not there."""
    path = results.path.with_suffix(".npz")
    return np.load(path) if path.is_file() else {}


def _differences(
    scores: Mapping[str, FloatArray], results: Results, letters: Sequence[str], first: tuple[str, str],
    second: tuple[str, str], other_letter: str | None = None,
) -> dict[str, Interval]:  # fmt: skip
    """By how many points of span F1 each row is better, retrained and ended as `first` says, than itself (or
    than the row `other_letter`) as `second` says: question by question, over seeds."""
    intervals = {}
    for letter in letters:
        pairs: list[Row] = []
        for row in results.row(letter, first[0]):
            names = [
                f"{row_name(which, retraining, row['seed'])}{end}/f1_span"
                for which, (retraining, end) in ((letter, first), (other_letter or letter, second))
            ]
            if all(name in scores for name in names):
                own_f1, other_f1 = (scores[name].astype(float) for name in names)
                low, high = bootstrap_interval(own_f1, other_f1)
                won = {"won": own_f1.mean() - other_f1.mean(), "won_low": low, "won_high": high}
                pairs.append({"kind": row["kind"], "seed": row["seed"], **won})
        interval = over_seeds(pairs, "won")
        if interval is not None:
            intervals[labelled(results, f"row {letter}", pairs)] = interval
    return intervals


def _shape(results: Results) -> Iterator[Finding]:
    """Where in the model row e keeps what it keeps."""
    rows = results.row("e")
    if not rows:
        return
    shares, harder = [], []
    for column, part in enumerate(("heads", "FFN units")):
        first, middle, last = thirds(kept_by_layer(rows, column))
        shares.append(f"{part} {first:.0%}, {middle:.0%}, {last:.0%}")
        harder += [first < middle, last < middle]
    verdict = SHOWN if all(harder) else NOT_SHOWN if any(harder) else OPPOSITE
    claim = "the middle layers keep most, and both ends are pruned harder"
    row_e = labelled(results, "row e", rows)
    yield Finding(claim, verdict, f"{row_e} keeps, by thirds of the layers: {'; '.join(shares)}")


def kept_by_layer(rows: Sequence[Row], column: int) -> list[float]:
    """The heads (column 0) or FFN units (1) that each layer keeps, as the mean over the rows' seeds."""
    kept = [[int(layer.split("/")[column]) for layer in row["layers"].split()] for row in rows]
    return [sum(values) / len(rows) for values in zip(*kept, strict=True)]


def thirds(values: Sequence[float]) -> list[float]:
    """The shares of the sum that lie in the first, middle and last third of the values."""
    number, whole = len(values), sum(values)
    ends = [round(number * k / 3) for k in range(4)]
    return [sum(values[low:high]) / (whole or 1) for low, high in zip(ends, ends[1:], strict=False)]


def _speed(results: Results) -> Iterator[Finding]:
    """How much of row e's cut arrives as speed, in the newest timings."""
    newest = next(iter(results.timings.values()), [])
    arriving = {}
    for workload in dict.fromkeys(row["workload"] for row in newest):
        rows = timed(newest, "e", workload)
        share = over_seeds(rows, "arrives")
        if share is not None:
            arriving[labelled(results, workload, rows)] = share[0]
    if arriving:
        verdicts = {name: SHOWN if x >= PAPERS_ARRIVING else OPPOSITE for name, x in arriving.items()}
        yield Finding(
            f"{PAPERS_ARRIVING:.0%} of row e's cut in multiplications arrives as speed",
            together(verdicts),
            "; ".join(f"{name} {share:.0%}" for name, share in arriving.items()),
        )
