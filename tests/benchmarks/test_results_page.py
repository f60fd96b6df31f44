"""The results page and the README's first result are what the files in benchmarks/results/ say."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import bench_natural_questions
import bench_sentence_transformers
import harness
import results_page
import study_natural_questions
from reports import a_report, put
from serving.page import page as servers_page
from study.figures import Results
from study.page import section
from whole_models import first_result
from whole_models.first_result import FirstResult
from whole_models.report import markdown

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "benchmarks" / "README.md"
README = ROOT / "README.md"


def test_the_page_is_what_the_files_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == results_page.page(harness.RESULTS), "make results"


# What a file's name begins with -> the page that its benchmark writes beside it.
OWN_PAGES: dict[str, Callable[[list[harness.Row]], str]] = {
    "sentence-transformers-": bench_sentence_transformers.page,
    "serve-": servers_page,
    "bfloat16-": markdown,
    "models-random-": markdown,
    "paper-natural-questions-": study_natural_questions.page,
    "natural-questions-speed-": lambda rows: "\n".join(bench_natural_questions.lines(rows)) + "\n",
}


@pytest.mark.parametrize("begins", OWN_PAGES)
def test_a_benchmarks_own_page_is_what_its_rows_say(begins: str) -> None:
    for path in harness.RESULTS.glob(f"{begins}*.csv"):
        rows = harness.read_rows(path)
        if "command" in rows[0]:  # two files are from before rows named theirs
            assert path.with_suffix(".md").read_text(encoding="utf-8") == OWN_PAGES[begins](rows), path.name


def test_every_command_that_made_a_file_stands_beside_it(tmp_path: Path) -> None:
    rows = [{"runner": "a", **harness.stamp(), "command": f"python bench.py {how}"} for how in "xyx"]
    harness.write_rows(tmp_path / "new-x.csv", rows)
    assert "; `python bench.py x`; `python bench.py y`: [new-x.csv]" in results_page.page(tmp_path)


def test_the_readmes_first_result_is_what_the_files_say() -> None:
    text = README.read_text(encoding="utf-8")
    assert text == results_page.with_first_result(text, harness.RESULTS), "make results"
    with pytest.raises(ValueError, match="no place"):
        results_page.with_first_result(text.replace(results_page.BEGIN, ""), harness.RESULTS)


def test_the_readmes_picture_shows_the_files_numbers() -> None:
    result = FirstResult.read(harness.RESULTS)
    path = ROOT / first_result.PICTURE
    with Image.open(path) as picture:
        assert picture.info["Description"] == first_result.description(result), "make results"
    assert path.stat().st_size <= first_result.PICTURE_BYTES


def test_the_picture_is_of_the_widest_vectors_and_newer_numbers_are_said(tmp_path: Path) -> None:
    """Whichever was measured last; the scores beside speeds are those of the models that were timed."""
    for pattern in ("natural-questions-*.csv", "int8-*.csv"):
        for path in harness.RESULTS.glob(pattern):
            shutil.copy(path, tmp_path)
    result = FirstResult.read(tmp_path)
    assert result.capability == "AVX512" and result.newer is not None and result.newer.newer is None
    newer = result.newer
    assert (
        newer.capability == "AVX2"
        and newer.pruned["short_f1"] == 35.48
        and result.pruned["short_f1"] == 31.86
    )
    words = " ".join(first_result.lines(result))
    assert f"runs {newer.times_as_fast('ours pruned'):.1f} times as fast, and its dense model" in words
    assert (
        "In another pair of models, whose pruned one was trained on for 74 minutes, pruning changed the F1 "
        "of short answers by +0.40" in words
    )
    (path,) = tmp_path.glob("natural-questions-speed-*model-1-2t.csv")
    path.unlink()
    alone = FirstResult.read(tmp_path)
    assert alone.newer is None and alone.speeds == result.speeds
    assert "another pair of models" not in " ".join(first_result.lines(alone))


def test_every_ratio_of_the_first_result_has_one_baseline() -> None:
    result = FirstResult.read(harness.RESULTS)
    baseline = result.speeds[first_result.BASELINE]["ms_p50"]
    for runner in first_result.LABELS:
        row = result.speeds[runner]
        assert (row["data"], row["documents"]) == ("eval.jsonl.gz", 24)
        assert result.times_as_fast(runner) == pytest.approx(baseline / row["ms_p50"], rel=0.03)


def test_what_the_page_links_is_there_and_small() -> None:
    links = re.findall(r"\]\((results/[^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert len(links) > 5
    for link in links:
        path = PAGE.parent / link
        assert path.is_file(), link
        if path.suffix == ".png":
            assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size <= results_page.FIGURE_BYTES


def test_every_result_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for path in harness.RESULTS.iterdir():
        assert f"](results/{path.name})" in text or path.name.startswith("."), path.name


def test_the_page_begins_with_links_to_its_sections() -> None:
    """Each result is found from the top, in the section of its kind."""
    text = PAGE.read_text(encoding="utf-8")
    head, *sections = re.split(r"^## ", text, flags=re.M)
    titles = [section.split("\n", 1)[0] for section in sections]
    assert re.findall(r"^- \[(.+)\]\(#(.+)\)$", head, re.M) == [
        (title, results_page.anchor(title)) for title in titles
    ]
    servers = sections[titles.index("Servers")]
    assert re.findall(r"^### (.*)$", servers, re.M) == [
        path.stem for path in sorted(harness.RESULTS.glob("serve-*.csv"))
    ]


def test_a_benchmark_without_a_table_here_brings_its_own(tmp_path: Path) -> None:
    harness.write_rows(
        tmp_path / "new-x.csv", [{"runner": "ours", **harness.stamp(), "command": "python new"}]
    )
    (tmp_path / "new-x.md").write_text("# Found\n\n| a |\n| --- |\n| 7 |\n", encoding="utf-8")
    text = results_page.page(tmp_path)
    assert "### new-x" in text and "`python new`: [new-x.csv](results/new-x.csv), [new-x.md]" in text
    assert "\n#### Found\n" in text and "\n| 7 |\n" in text


def test_a_taken_report_becomes_a_table_of_the_page(tmp_path: Path) -> None:
    report = a_report(versions={"torch": "2.13.0", "transformers": "5.24.0"})
    results_page.take(put(tmp_path / "out", report), tmp_path, "A teacher")
    ((path, kept),) = results_page.taken(tmp_path)
    assert path.name == "prune-a-processor-7-2t.json"
    lines = results_page.result_table(kept)
    assert "\n".join(lines) in results_page.page(tmp_path)
    assert lines[0] == "| A teacher | dense | pruned | |"
    f1, span = (f"{report['pruned'][key]:.2f}" for key in ("f1", "f1_span"))
    assert f"| {f1} | -0.50 (95% interval: -1.75 to +0.25) |" in lines[2]
    assert f"| {span} | -0.50 (-1.75 to +0.25) |" in lines[3]
    asked = "| ms per batch of 8, our runtime; asked: `--macs 0.5` |"
    assert lines[5].startswith(asked) and "1.99x" in lines[5]


def curve_row(
    method: str, behind: float, width: float, fraction: float = 0.5, seed: int = 0
) -> dict[str, Any]:
    """A point of span F1 60 less `behind`, known to +-width."""
    row: dict[str, Any] = {"unit": f"curve-{fraction}", "kind": "curve", "on": "heads", "fraction": fraction}
    row |= {"method": method, "seed": seed, "questions": 100, "finished": True, "profile": "cpu"}
    for score, dense in (("f1", 58.0), ("f1_span", 70.0)):
        row |= {score: 60 - behind, f"{score}_loss": dense - 60 + behind}
        for name, value in ((f"{score}_loss", dense - 60 + behind), (f"{score}_behind_l0", behind)):
            row |= {name: value, f"{name}_low": value - width, f"{name}_high": value + width}
    row |= {"gate_batch": 4, "gate_learning_rate": 0.1, "gate_start": 2.5}
    row |= {"held": 0.45} if method == "l0" else {}
    row |= {f"windows_{name}": 64 for name in ("l0", "gain", "leave-one-out", "retrained")}
    return {**row, **harness.stamp(), "command": "python study", "model": "m"}


def test_an_order_is_stated_only_where_the_interval_allows(tmp_path: Path) -> None:
    rows = [curve_row("l0", 0, 0), curve_row("gain", 3, 2), curve_row("leave-one-out", 1, 2)]
    rows += [curve_row("random", -4, 2), curve_row("random", -2, 2, seed=1)]
    for name in ("row-g-seed0", "row-f-seed0", "row-g-seed1"):
        rows.append({"part": "rows", "unit": name, "finished": False, "profile": "cpu"})
    harness.write_rows(tmp_path / "study-cpu-x.csv", rows)
    text = "\n".join(section(Results(tmp_path / "study-cpu-x.csv")))
    assert "L0 against gain: in span F1 ahead at 50%. In F1 ahead at 50%." in text
    assert "L0 against leave-one-out: in span F1 not to be told apart at 50%." in text
    assert "L0 against random: in span F1 not to be told apart at 50%." in text  # -6 to 0 over two seeds
    assert "| 63.00 (-3.0; -6.0 to 0.0) |" in text
    assert "- L0's gates: 50% from those held at 45%." in text
    claim = "| without retraining, L0 gates choose heads better than gain | "
    assert claim + "shown | 50% (seed 0) +3.0 (+1.0 to +5.0) |" in text
    assert "choose heads better than random | not shown | 50% -3.0 (-6.0 to +0.0) |" in text
    assert "without 50% (seed 0): F1 lost -2.0 (-2.0 to -2.0); span F1 lost +10.0 (+10.0 to +10.0)" in text
    assert "not retrained | shown at F1; the opposite at span F1 |" in text
    assert "L0 removes none of the shares tried for less than 5 points of both" in text
    assert "missing above, are pieces of these parts: rows, 2 of seed 0, 1 of seed 1." in text
