"""The README's first result: a model before and after pruning, beside Hugging Face's runtime.

The picture and the sentences come from three kinds of files in benchmarks/results/: the speeds that
bench_natural_questions.py measured on the same documents for every runner, the scores of the two models, and
what int8 costs, which bench_int8.py measured on SQuAD 2.0 data.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import Row, read_rows
from presentation import save_figure

PICTURE = "docs/first-result.png"
PICTURE_BYTES = 120_000
# Where the README sends those who want all of it.
DETAILS = "docs/natural_questions.md#what-was-measured"
BASELINE = "hf-sdpa dense"
# What torch calls the vectors of a processor, the widest last: new servers have those.
WIDTHS = ("DEFAULT", "AVX2", "AVX512")
# The runners of the picture, as a reader who has never seen this project would name them.
LABELS = {
    "hf-eager dense": "Hugging Face, eager",
    BASELINE: "Hugging Face, SDPA (its default)",
    "ours dense": "pruned_ops",
    "ours-int8 dense": "pruned_ops, int8",
    "ours pruned": "pruned_ops, pruned model",
    "ours-int8 pruned": "pruned_ops, pruned model, int8",
}
# The picture: places of the bars from the top, in pairs, and colours that keep apart in grey, too.
PLACES = (0.0, 1.0, 2.35, 3.35, 4.7, 5.7)
COLOURS = {"hf": "#a3abb5", "dense": "#74b3dd", "pruned": "#005f99"}
INK, MUTED = "#1c1e21", "#5b6169"


@dataclass(frozen=True)
class FirstResult:
    """The rows behind the picture. speeds: by runner. dense, pruned: the scores of the two models that were
    timed. int8_loss: F1 points that int8 takes from the dense model in fp32, on SQuAD 2.0 data. newer: what
    was measured later with another pair, on a processor that the picture is not of."""

    speeds: Mapping[str, Row]
    dense: Row
    pruned: Row
    int8_loss: float
    newer: FirstResult | None = None

    @classmethod
    def read(cls, results: Path) -> FirstResult:
        """The newest that was timed with the widest vectors, which is the picture; and the newest of all."""
        int8 = _newest(results.glob("int8-*.csv"))  # the dense model comes first, then a pruned one
        full, quantised = (
            next(row["f1"] for row in int8 if row["runner"] == runner)
            for runner in ("ours fp32", "ours int8")
        )
        timed = [read_rows(path) for path in sorted(results.glob("natural-questions-speed-*.csv"))]
        pairs = [cls._of(rows, results, full - quantised) for rows in sorted(timed, key=_date)]
        widest = max(pairs, key=lambda pair: WIDTHS.index(pair.capability))
        pictured = [pair for pair in pairs if pair.capability == widest.capability][-1]
        return pictured if pictured is pairs[-1] else replace(pictured, newer=pairs[-1])

    @classmethod
    def _of(cls, timed: list[Row], results: Path, int8_loss: float) -> FirstResult:
        """The speeds of one file, and the newest scores that were measured on the same processor: those of
        the models that were timed."""
        speeds = {row["runner"]: row for row in timed}
        processor = speeds[BASELINE]["machine_processor"]
        files = (path for path in results.glob("natural-questions-*.csv") if "-speed-" not in path.name)
        scored = (path for path in files if read_rows(path)[0]["machine_processor"] == processor)
        models = {row["model"]: row for row in _newest(scored)}
        return cls(speeds, models["dense"], models["pruned, distilled"], int8_loss)

    @property
    def capability(self) -> str:
        """The vectors that the processor has, as torch calls them."""
        return str(self.speeds[BASELINE]["machine_cpu_capability"])

    def times_as_fast(self, runner: str) -> float:
        """The median over the rounds of the baseline's seconds over this runner's."""
        return float(self.speeds[runner]["speedup_vs_hf_sdpa_dense"])

    def scores(self, runner: str) -> str:
        """F1 of long and short answers of the runner's model, which was scored in fp32 alone."""
        model = self.pruned if runner.endswith(" pruned") else self.dense
        return f"{model['long_f1']:.1f} / {model['short_f1']:.1f}"

    def change(self, answers: str) -> str:
        """What pruning changed in the F1 of long or short answers, with its 95% interval."""
        loss, low, high = (self.pruned[f"{answers}_f1_loss{end}"] for end in ("", "_low", "_high"))
        return f"{-loss:+z.2f} (95% interval {-high:+z.2f} to {-low:+z.2f})"


def _newest(paths: Iterable[Path]) -> list[Row]:
    """The rows of the file that was measured last."""
    return max((read_rows(path) for path in sorted(paths)), key=_date)


def _date(rows: list[Row]) -> str:
    return str(rows[0]["date"])


def lines(result: FirstResult) -> list[str]:
    """The README's lines: the picture, and sentences with one number and one baseline each."""
    first, ours = result.speeds[BASELINE], result.speeds["ours dense"]
    times = {runner: f"{result.times_as_fast(runner):.1f} times as fast" for runner in LABELS}
    text = (
        f"MiniLM-L6 finds answers in documents, on {first['machine_threads']} cores of an "
        f"{first['machine_processor']}. It runs {times['ours dense']} as in Hugging Face with its default "
        f"attention, and its logits differ by at most {ours['max_error']:.0e}. In int8 it runs "
        f"{times['ours-int8 dense']}; another MiniLM-L6, on SQuAD 2.0 data, lost {result.int8_loss:.1f} F1 "
        f"by int8. The pruned model runs {times['ours pruned']}. In int8 the pruned model runs "
        f"{times['ours-int8 pruned']}. "
        f"Pruning changed the F1 of short answers by {result.change('short')}. It changed the F1 of long "
        f"answers by {result.change('long')}. "
    )
    if result.newer is not None:
        text += _newer(result.newer)
    dates = dict.fromkeys(pair.speeds[BASELINE]["date"] for pair in (result, result.newer) if pair)
    text += f"[What was measured]({DETAILS}), {' and '.join(dates)}."
    return [
        f"![{description(result)}]({PICTURE})",
        "",
        *textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False),
    ]


def _newer(newer: FirstResult) -> str:
    """The sentences about a pair that the picture does not show: another dense model, pruned otherwise."""
    first = newer.speeds[BASELINE]
    return (
        f"In another pair of models, whose pruned one was trained on for "
        f"{newer.pruned['training_minutes']:.0f} minutes, pruning changed the F1 of short answers by "
        f"{newer.change('short')}. On an "
        f"{first['machine_processor']}, which has {newer.capability} alone, its pruned model runs "
        f"{newer.times_as_fast('ours pruned'):.1f} times as fast, and its dense model "
        f"{newer.times_as_fast('ours dense'):.1f} times. "
    )


def _times(result: FirstResult, runner: str) -> str:
    return f"{result.times_as_fast(runner):.1f}x"


def description(result: FirstResult) -> str:
    """The picture in words: it is the alternative text, and the picture's own record of its numbers."""
    speeds = (f"{label}: {_times(result, runner)}" for runner, label in LABELS.items())
    return f"Times as fast as Hugging Face with SDPA attention. {'; '.join(speeds)}"


def draw(result: FirstResult, path: Path) -> None:
    """Write the picture: a bar for each runner. ValueError where it cannot be drawn, or is too large."""
    path.parent.mkdir(parents=True, exist_ok=True)
    reason = save_figure(path, (9.4, 4.6), lambda figure: _fill(figure, result), 160, description(result))
    if reason is not None:
        raise ValueError(reason)
    if path.stat().st_size > PICTURE_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; {PICTURE_BYTES} are the limit")


def _fill(figure: Any, result: FirstResult) -> None:
    figure.set_layout_engine("none")
    first = result.speeds[BASELINE]
    figure.text(0.035, 0.905, "How many times as fast as Hugging Face", fontsize=19, color=INK, weight="bold")
    setting = (
        f"MiniLM-L6 finds answers in documents of several windows, on {first['machine_threads']} CPU cores"
    )
    scores = (
        f"F1 of long / short answers in fp32: {result.scores('ours dense')}; "
        f"pruned model: {result.scores('ours pruned')}"
    )
    figure.text(0.035, 0.835, setting, fontsize=14, color=MUTED)
    figure.text(0.035, 0.045, scores, fontsize=14, color=MUTED)
    axes = figure.add_axes((0.035, 0.115, 0.93, 0.68))
    speeds = [result.times_as_fast(runner) for runner in LABELS]
    label_room = 0.75 * max(speeds)  # the room for the labels, in units of a bar
    axes.barh(PLACES, speeds, height=0.8, color=[COLOURS[_kind(runner)] for runner in LABELS])
    for place, speed, runner in zip(PLACES, speeds, LABELS, strict=True):
        axes.text(-label_room, place, LABELS[runner], va="center_baseline", fontsize=15, color=INK)
        number = _times(result, runner)
        axes.text(speed + 0.15, place, number, va="center_baseline", fontsize=16, color=INK, weight="bold")
    axes.set_xlim(-label_room, 1.15 * max(speeds))
    axes.set_ylim(PLACES[-1] + 0.5, -0.5)
    axes.axis("off")


def _kind(runner: str) -> str:
    """The colour's name: whose runtime it is, and for ours which model."""
    return "hf" if runner.startswith("hf-") else runner.split()[1]
