"""Writes benchmarks/README.md and the README's first result, with their figures, from benchmarks/results/.

Usage: python benchmarks/results_page.py (or `make results`). --take OUT first keeps the numbers of a run's
report.json there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
from harness import Row, read_rows
from presentation import counted, table
from pruned_ops.files import write_json, write_whole
from study.figures import Results, figures
from study.page import mean, section
from whole_models import first_result
from whole_models.first_result import FirstResult

ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- From benchmarks/results by `make results`; edits here are lost. -->"
END = "<!-- Here it ends. -->"
# The commands of two files from before rows named theirs; each goes when its file is measured anew.
COMMANDS = {
    "models-amd-epyc-family-26-model-2-2t.csv": "python benchmarks/bench_models.py --dense TEACHER "
    "--pruned OUT --data SQUAD/eval.json --rounds 5",
    "int8-intel-r-xeon-r-processor-family-6-model-207-1t.csv": "python benchmarks/bench_int8.py TEACHER OUT "
    "--data SQUAD",
}
FIGURE_BYTES = 200_000
# The sections of what other benchmarks wrote for readers themselves, and what their files' names begin with:
# a file goes to the first that fits.
OTHERS = {
    "A family of pruned models": ("family-",),
    "Whole models in bfloat16": ("bfloat16-",),
    "sentence-transformers": ("sentence-transformers-",),
    "Servers": ("serve-",),
    "Other tasks": ("tasks-",),
    "Natural Questions": ("natural-questions-", "paper-natural-questions-"),
    "Where the time of a layer goes": ("avx2-", "parts-"),
    "More": ("",),
}


def take(out: Path, results: Path, title: str) -> Path:
    """Keep what the page shows of OUT/report.json, as prune-MACHINE.json."""
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    workload = report["speedup"]["workload"]
    kept: dict[str, Any] = {"title": title, "date": datetime.date.today().isoformat()}
    kept |= {key: report[key] for key in ("command", "machine", "versions")}
    kept["questions"] = report["evaluated_on"]["questions"]
    for name in ("dense", "pruned"):
        model = report[name]
        kept[name] = {key: model[key] for key in ("f1", "f1_span", "macs")}
        kept[name]["ms"] = model["workloads"][workload]["ms"]["p50"]
    kept["pruned"]["layers"] = " ".join(
        f"{layer['num_heads']}/{layer['ffn_width']}" for layer in report["shape"]
    )
    kept |= _removed(report)
    kept |= {key: report[key] for key in report if re.fullmatch(r"f1(_span)?_loss(_interval)?", key)}
    kept |= {
        "target": report["target"]["asked"],
        "workload": workload,
        "speedup": report["speedup"]["reached"],
    }
    path = results / f"{harness.file_stem('prune', report['machine'])}.json"
    write_json(path, kept)
    return path


def _removed(report: dict[str, Any]) -> dict[str, float]:
    """The shares of heads and of FFN units that a run removed."""
    dense, pruned = report["dense_shape"], report["shape"]
    return {
        name: round(1 - sum(layer[key] for layer in pruned) / (dense[key] * len(pruned)), 4)
        for name, key in (("heads_removed", "num_heads"), ("ffn_removed", "ffn_width"))
    }


def result_table(kept: dict[str, Any]) -> list[str]:
    """One run of the pruner: the dense model beside the pruned one."""
    dense, pruned = kept["dense"], kept["pruned"]

    def scores(label: str, key: str, first: bool) -> str:
        low, high = kept[f"{key}_loss_interval"]
        words = "95% interval: " if first else ""
        change = f"{-kept[f'{key}_loss']:+z.2f} ({words}{-high:+z.2f} to {-low:+z.2f})"
        return f"| {label} | {dense[key]:.2f} | {pruned[key]:.2f} | {change} |"

    batch = kept["workload"].rpartition("-b")[2]
    asked = ", ".join(f"`--{unit.replace('_', '-')} {value}`" for unit, value in kept["target"].items())
    return [
        f"| {kept['title']} | dense | pruned | |",
        "| --- | --- | --- | --- |",
        scores("F1", "f1", True),
        scores("span F1 (answerable questions, no null option)", "f1_span", False),
        f"| encoder multiply-accumulates a sequence | {dense['macs'] / 1e6:,.0f} M | "
        f"{pruned['macs'] / 1e6:,.0f} M | {pruned['macs'] / dense['macs']:.3f} |",
        f"| ms per batch of {batch}, our runtime; asked: {asked} | {dense['ms']:.1f} | {pruned['ms']:.1f} | "
        f"**{kept['speedup']:.2f}x** |",
    ]


def taken(results: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Runs of the pruner that were kept, the newest first."""
    paths = sorted(results.glob("prune-*.json"))
    runs = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    return sorted(runs, key=lambda run: run[1]["date"], reverse=True)


def with_first_result(readme: str, results: Path) -> str:
    """The README with the first result between its marks; ValueError where they are not there once."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError("the README has no place, or several, for the first result")
    before, rest = readme.split(BEGIN)
    lines = first_result.lines(FirstResult.read(results))
    return "\n".join([before + BEGIN, *lines, END + rest.split(END)[1]])


# -- the page --------------------------------------------------------------------------------------------


def page(results: Path) -> str:
    """The whole page."""
    sections = [
        *_pruned(results),
        *_studies(results),
        *_models(results),
        *_int8(results),
        *_others(results),
    ]
    lines = [
        "# Results",
        "",
        "This page is for anybody who wants to check a number: each table names its machine, date, command "
        "and [files](results). Each benchmark keeps its newest numbers for each kind of machine, losses "
        "included. `make results` makes the page from the files; it is never edited.",
        "",
        *contents(sections),
        "",
        *sections,
    ]
    return "\n".join(lines).rstrip() + "\n"


def contents(sections: Sequence[str]) -> list[str]:
    """A link to each section, in their order."""
    titles = [line.removeprefix("## ") for line in sections if line.startswith("## ")]
    return [f"- [{title}](#{anchor(title)})" for title in titles]


def anchor(title: str) -> str:
    """What a link to this heading ends with, after #."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def _pruned(results: Path) -> list[str]:
    lines = ["## A teacher, pruned to a measured speed", ""]
    for path, kept in taken(results):
        machine = kept["machine"]
        versions = ", ".join(f"{name} {kept['versions'][name]}" for name in ("torch", "transformers"))
        note = f" ({kept['note']})" if kept.get("note") else ""
        lines += [
            *result_table(kept),
            "",
            f"{kept['questions']:,} questions; the intervals are over them, of one training. "
            f"Heads/FFN width left: {kept['pruned']['layers']}: "
            f"{kept['heads_removed']:.0%} of the heads and {kept['ffn_removed']:.0%} of the FFN removed. "
            f"{machine['accelerator'] or machine['processor']}, {machine['cores']} cores, {versions}, "
            f"{kept['date']}: [{path.name}](results/{path.name}){note}, by `{kept['command']}`.",
            "",
        ]
    return lines


def _studies(results: Path) -> list[str]:
    paths = study_files(results)
    if not paths:
        return []
    lines = [
        "## The paper's study on SQuAD 2.0 data",
        "",
        "The paper is McCarley, Chakravarti, Sil, arXiv 1910.06360. Span F1 is the F1 of the best span on "
        "the answerable questions, without the null option. On this data a model that always answers "
        "nothing scores about 50 F1, so F1 alone hides damage. The null threshold is chosen for each model "
        "on the validation questions.",
        "",
    ]
    for path in paths:
        lines += section(Results(path))
    return lines


def study_files(results: Path) -> list[Path]:
    """The CSVs of studies, without those of their timings."""
    paths = sorted(results.glob("study-*.csv"))
    return [path for path in paths if not path.name.startswith("study-timings-")]


def _machine(row: Row) -> str:
    device = row.get("machine_accelerator") if row.get("device") == "cuda" else None
    return f"{device or row['machine_processor']}, {counted(row['machine_threads'], 'thread')}"


def _source(path: Path, rows: Sequence[Row]) -> str:
    """Where a file's numbers come from: machine, torch, date, commands, and the files themselves."""
    first, commands = rows[0], list(dict.fromkeys(row["command"] for row in rows if "command" in row))
    earlier = _command_in(path.with_suffix(".md")) or COMMANDS.get(path.name)
    shown = [f"`{command}`" for command in commands or ([earlier] if earlier else [])]
    files = [path.with_suffix(kind) for kind in (".csv", ".md", ".png", ".npz")]
    links = [f"[{file.name}](results/{file.name})" for file in files if file.is_file()]
    about = "; ".join([_machine(first), f"torch {first['version_torch']}", str(first["date"]), *shown])
    return f"{about}: {', '.join(links)}."


def _command_in(page: Path) -> str | None:
    """The command that ends a benchmark's own page, where there is such a page."""
    commands = re.findall(r"`(python [^`]+)`$", page.read_text("utf-8"), re.M) if page.is_file() else []
    return commands[-1] if commands else None


def _models(results: Path) -> list[str]:
    lines = [
        "## Whole models",
        "",
        "Times as fast: the median over the rounds of the ratio of both runners' seconds in one round. It "
        "may differ a little from the ratio of the medians beside it.",
        "",
    ]
    for path in sorted(results.glob("models-*.csv")):
        rows = read_rows(path)
        timed = [row for row in rows if "ms_p50" in row]
        lines += [_source(path, rows), ""]
        lines += (
            _against_rivals(timed) if any("best_rival" in row for row in timed) else _against_first(timed)
        )
    return lines


def _against_first(rows: Sequence[Row]) -> list[str]:
    """Every runner compared with the first, for files without a best rival."""
    lines = [
        [row["workload"], row["runner"], f"{row['ms_p50']:.1f}", f"{row['sequences_per_s']:.1f}",
         f"{row['speedup_vs_rival']:.2f}x"]
        for row in rows
    ]  # fmt: skip
    header = ["workload", "runner", "ms a batch", "sequences/s", f"times as fast as {rows[0]['rival']}"]
    return table(header, lines)


def _against_rivals(rows: Sequence[Row]) -> list[str]:
    """Ours beside the fastest rival of the same precision, for each workload and model; then the losses."""
    by_runner = {(row["workload"], row["model"], row["runner"]): row for row in rows}
    ours = [row for row in rows if "best_rival" in row and str(row["runtime"]).startswith("ours")]
    lines, lost = [], []
    for row in ours:
        ratio, rival = row["speedup_vs_best_rival"], row["best_rival"].rsplit(" ", 1)[0]
        best = by_runner[row["workload"], row["model"], row["best_rival"]]
        cells = [f"{row['ms_p50']:.1f}", rival, f"{best['ms_p50']:.1f}", f"{ratio:.2f}x"]
        lines.append([row["workload"], row["model"], row["runtime"], *cells])
        if ratio < 1:
            lost.append(
                f"{row['runtime']} {row['model']} on {row['workload']} against {rival} ({ratio:.2f}x)"
            )
    header = ["workload", "model", "runtime", "ms a batch", "best rival", "its ms a batch", "times as fast"]
    summary = (
        f"Slower than a rival in {len(lost)} of {len(lines)}: {'; '.join(lost)}."
        if lost
        else "Faster than every rival in all rows."
    )
    return [*table(header, lines), summary, ""]


def _int8(results: Path) -> list[str]:
    lines: list[str] = []
    for path in sorted([*results.glob("int8-*.csv"), *results.glob("answers-*.csv")]):
        rows = read_rows(path)
        cells = [
            [str(row["checkpoint"]), row["runner"], mean([row], "f1"), mean([row], "f1_span")]
            + [f"{row['cosine']:.5f}"]
            for row in rows
        ]
        header = ["checkpoint", "runner", "F1", "span F1", "cosine to fp32"]
        lines += [_source(path, rows), "", *table(header, cells)]
    return ["## int8 and bfloat16: what they cost in answers", "", *lines] if lines else []


def _others(results: Path) -> list[str]:
    """The files of other benchmarks, with the pages that they wrote for readers themselves."""
    shown = ("study", "models", "int8", "answers", "prune")
    sections: dict[str, list[str]] = {title: [] for title in OTHERS}
    for path in sorted(results.glob("*.csv")):
        if path.name.split("-")[0] in shown:
            continue
        lines = [f"### {path.stem}", "", _source(path, read_rows(path)), ""]
        if path.with_suffix(".md").is_file():
            text = path.with_suffix(".md").read_text(encoding="utf-8")
            lines += [re.sub(r"^#", "####", text, flags=re.M).rstrip(), ""]
        sections[next(title for title, begins in OTHERS.items() if path.name.startswith(begins))] += lines
    return [line for title, lines in sections.items() if lines for line in (f"## {title}", "", *lines)]


def draw_figures(results: Path) -> list[Path]:
    """Draw the studies' figures, beside their CSVs; ValueError for one that is too large to keep."""
    drawn = []
    for path in study_files(results):
        for figure in figures(Results(path)):
            if len(figure.png) > FIGURE_BYTES:
                raise ValueError(f"{figure.name} has {len(figure.png)} bytes; {FIGURE_BYTES} are the limit")
            drawn.append(figure.save(results))
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--take",
        type=Path,
        metavar="OUT",
        help="keep the numbers of this folder, which pruned-trainer prune wrote",
    )
    parser.add_argument(
        "--title", default="a pruned model", help="names model and data of --take (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if arguments.take:
        print(f"written: {take(arguments.take, harness.RESULTS, arguments.title)}")
    written = draw_figures(harness.RESULTS)
    readme, here = ROOT / "README.md", Path(__file__).with_name("README.md")
    first_result.draw(FirstResult.read(harness.RESULTS), ROOT / first_result.PICTURE)
    write_whole(readme, with_first_result(readme.read_text(encoding="utf-8"), harness.RESULTS))
    write_whole(here, page(harness.RESULTS))
    for path in (*written, ROOT / first_result.PICTURE, here, readme):
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    harness.run(main)
