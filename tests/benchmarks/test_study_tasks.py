"""The study of tasks other than question answering, on small models: its steps, its rows, its table."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import BertModel

import study_tasks
from harness import read_rows
from pruned_ops.measure.timing import Workload
from pruned_trainer.cli import main
from study.records import one_in
from study_tasks import Case, Study
from text_files import CUT, checkpoint, classified, scored, write_rows

CLASSES = Case("classes", "classes", "jsonl.gz", ("--task", "text-classification"), "accuracy", 2.0)
VECTORS = Case("vectors", "vectors", "jsonl.gz", ("--task", "embedding"), "spearman")
SPEEDS_OF = study_tasks.speeds
SPEEDS = {"workload": "w", "against_our_dense": 2.0}
SPEEDS |= {"fp32_against_hugging_face": 4.0, "int8_against_hugging_face": 8.0}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """On small files; a target in time is one in MACs, which random models can reach, and nothing is
    timed."""
    for case, make in ((CLASSES, classified), (VECTORS, scored)):
        for seed, split in enumerate(("train", "validation", "eval")):
            file = tmp_path / "data" / case.folder / f"{split}.jsonl.gz"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_rows(file, make(60, seed))

    def run_here(argv: Sequence[str], check: bool) -> None:
        assert check and argv[1:3] == ["-m", "pruned_trainer.cli"]
        words = list(argv[3:])
        if "--speedup" in words:
            words[words.index("--speedup") : words.index("--speedup") + 2] = ["--macs", "0.6"]
        if "--max-minutes" in words:
            words[words.index("--max-minutes") : words.index("--max-minutes") + 2] = ["--retrain-steps", "2"]
        assert main(words) == 0

    monkeypatch.setattr(study_tasks.subprocess, "run", run_here)
    monkeypatch.setattr(study_tasks, "CUT", CUT)
    monkeypatch.setattr(study_tasks, "CASES", (CLASSES, VECTORS))
    monkeypatch.setattr(study_tasks, "speeds", lambda *_: SPEEDS)
    start = checkpoint(tmp_path / "start", BertModel)
    return Study(tmp_path / "data", str(start), tmp_path / "work", 5.0)


def test_each_case_has_a_row_with_its_control_and_int8(study: Study, tmp_path: Path) -> None:
    rows = []
    for case in study_tasks.CASES:
        study_tasks.train(study, case)
        rows += study_tasks.score(study, case)
    classes, vectors = rows
    assert 0 < classes["dense"] <= 100 and abs(vectors["dense"]) <= 100
    for name in ("pruned", "control", "int8"):
        low, high = classes[f"{name}_loss_low"], classes[f"{name}_loss_high"]
        assert low <= classes[f"{name}_loss"] <= high
    assert "control_loss" not in vectors and vectors["pruned_loss"] is not None
    done = sorted(
        path.relative_to(study.work).as_posix() for path in study.work.glob("*/*/model.safetensors")
    )
    steps = ("classes/control", "classes/dense", "classes/pruned-2", "vectors/pruned-2")
    assert done == [f"{step}/model.safetensors" for step in steps]
    texts = (study.work / "vectors/texts.txt").read_text().splitlines()
    assert len(texts) == len(set(texts)) > 60

    study_tasks.write(rows, tmp_path / "tasks.csv", "python study")
    assert [row["case"] for row in read_rows(tmp_path / "tasks.csv")] == ["classes", "vectors"]
    study_tasks.write([{**classes, "dense": 12.5}], tmp_path / "tasks.csv", "python study --only classes")
    classes_again, vectors_as_before = read_rows(tmp_path / "tasks.csv")
    assert classes_again["dense"] == 12.5 and vectors_as_before["command"] == "python study"
    assert classes_again["model"] == "start"
    study_tasks.write([{**classes, "model": "other", "dense": 7.0}], tmp_path / "tasks.csv", "python study")
    assert [row["dense"] for row in read_rows(tmp_path / "tasks.csv")][:2] == [12.5, 7.0]
    study_tasks.write([{**vectors, "asked": 3.0}], tmp_path / "tasks.csv", "python study --speedups 3")
    at_both_speeds = [row["asked"] for row in read_rows(tmp_path / "tasks.csv") if row["case"] == "vectors"]
    assert at_both_speeds == [2.0, 3.0]  # what was measured at another speed stays
    page = (tmp_path / "tasks.md").read_text()
    assert "| start | vectors: spearman |" in page and "| start | classes: accuracy | 12.5 |" in page
    assert "| other | classes: accuracy | 7.0 |" in page
    assert "| 2.00x |" in page and "| - |" in page
    assert str(tmp_path) not in page


def test_speeds_are_ratios_of_the_same_rounds(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], str]] = []

    def compare(models: dict[str, Any], workload: Workload, rounds: int, dtype: str) -> Any:
        asked.append((list(models), dtype))
        return SimpleNamespace(against_dense=2.0, against_their_dense=3.0 if dtype == "fp32" else 5.0)

    table = SimpleNamespace(workload=Workload.fixed(8, 2, 9))
    task = SimpleNamespace(load_model=str)
    monkeypatch.setattr(study_tasks.LatencyTable, "load", lambda path: table)
    monkeypatch.setattr(study_tasks, "task_of", lambda *_: task)
    monkeypatch.setattr(study_tasks, "compare", compare)
    assert SPEEDS_OF(study, VECTORS, study.folder(VECTORS, "pruned-2")) == {
        "workload": "fixed8-b2",
        "fp32_against_hugging_face": 3.0,
        "against_our_dense": 2.0,
        "int8_against_hugging_face": 5.0,
    }
    assert asked == [(["pruned", "dense"], "fp32"), (["pruned", "dense"], "int8")]


def test_finished_steps_are_not_done_again_and_interrupted_ones_go_on(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(study_tasks.subprocess, "run", lambda argv, check: commands.append(argv[3:]))
    study.folder(CLASSES, "dense").mkdir(parents=True)
    partial = study.folder(CLASSES, "pruned-2").with_name("pruned-2.partial")
    partial.mkdir()
    (partial / "run.json").write_text("{}")
    study.folder(CLASSES, "control").with_name("control.partial").mkdir()
    study_tasks.train(study, CLASSES)
    assert [(command[0], command[-1]) for command in commands] == [
        ("prune", "--resume"),
        ("prune", "--overwrite"),
    ]


def test_models_of_another_encoder_other_minutes_or_data_are_not_taken(study: Study, tmp_path: Path) -> None:
    study.claim(CLASSES)
    study.claim(CLASSES)  # the same study goes on, and another speed may be asked for
    replace(study, speedups=(3.0,)).claim(CLASSES)
    others = ({"model": "another/encoder"}, {"minutes": 6.0}, {"data": tmp_path / "other"})
    for number, changes in enumerate(others):
        other = replace(study, **changes)
        with pytest.raises(ValueError, match="has models of start .*, trained for 5 minutes on .*--work"):
            other.claim(CLASSES)
        with pytest.raises(ValueError, match="name another --work"):
            other.claim(replace(VECTORS, models="classes"))
        replace(other, work=tmp_path / f"work{number}").claim(CLASSES)


def test_two_encoders_of_one_name_are_two(study: Study, tmp_path: Path) -> None:
    """Their folders' names are the same; one that is moved is still itself. No path gets into the results."""
    other = str(checkpoint(tmp_path / "elsewhere" / "start", BertModel, initializer_range=0.5))
    moved = shutil.copytree(study.model, tmp_path / "moved" / "start")
    study.claim(CLASSES)
    replace(study, model=str(moved)).claim(CLASSES)
    message = rf"has models of start \({study.encoder}\), trained for 5 minutes on .*: name another --work"
    with pytest.raises(ValueError, match=message):
        replace(study, model=other).claim(CLASSES)
    claimed = study.work / "classes" / "study.json"
    record = json.loads(claimed.read_text())
    claimed.write_text(json.dumps({name: record[name] for name in record.keys() - {"encoder"}}))
    replace(study, model=other).claim(CLASSES)  # of an earlier version, which knew the name alone

    def row(study: Study, dense: float, **more: Any) -> dict[str, Any]:
        about = {"model": study.name, "case": "classes", "score": "accuracy", "asked": 2.0, "dense": dense}
        return {**about, **SPEEDS, **more}

    def written(*rows: dict[str, Any]) -> list[tuple[float, str | None]]:
        study_tasks.write(rows, tmp_path / "tasks.csv", "python study")
        return [(row["dense"], row.get("encoder")) for row in read_rows(tmp_path / "tasks.csv")]

    second = replace(study, model=other)
    assert study.encoder.startswith("sha256:") and second.encoder != study.encoder
    assert written(row(study, 1.0)) == [(1.0, None)]
    assert written(row(study, 2.0, encoder=study.encoder)) == [(2.0, study.encoder)]
    assert "| start | classes" in (tmp_path / "tasks.md").read_text()
    both = [(2.0, study.encoder), (3.0, second.encoder)]
    assert written(row(second, 3.0, encoder=second.encoder)) == both
    page = (tmp_path / "tasks.md").read_text()
    assert all(f"| start ({name}) | classes" in page for _, name in both) and str(tmp_path) not in page
    assert replace(study, model="hub/encoder").encoder == ""


def test_other_speedups_may_be_asked_for(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(study_tasks.subprocess, "run", lambda argv, check: commands.append(argv[3:]))
    study_tasks.train(replace(study, speedups=(1.5, 3.0)), VECTORS)
    asked = [command[command.index("--speedup") + 1] for command in commands]
    assert asked == ["1.5", "3"] and commands[0][-1] == str(study.folder(VECTORS, "pruned-1.5"))


def test_an_embedder_of_documents_learns_from_them(study: Study) -> None:
    """Titles before texts, the queries beside them, and none of the other cases' pairs."""
    folder = study.data / "search"
    folder.mkdir()
    write_rows(
        folder / "corpus.jsonl.gz", [{"id": "1", "title": "a  b", "text": "c"}, {"id": "2", "text": "d"}]
    )
    write_rows(
        folder / "train.jsonl.gz", [{"id": "0", "text": "e", "relevant": ["1"]}, {"id": "3", "text": "d"}]
    )
    case = Case(
        "search", "search", "jsonl.gz", ("--task", "embedding", "--corpus", "corpus.jsonl.gz"), "ndcg"
    )
    assert study_tasks.texts_of(study, case).read_text().splitlines() == ["a b c", "d", "e"]


def test_a_part_of_a_corpus_answers_every_question(study: Study) -> None:
    folder = study.data / "search"
    folder.mkdir()
    documents = [{"id": f"d{number}", "title": "", "text": f"é {number}"} for number in range(20)]
    write_rows(folder / "corpus.jsonl.gz", documents)
    for split, answer in (("validation", "d3"), ("eval", "d4")):
        write_rows(folder / f"{split}.jsonl.gz", [{"id": "0", "text": "e", "relevant": [answer, "d18"]}])
    options = ("--task", "embedding", "--corpus", "corpus.jsonl.gz")
    case = Case("search", "search", "jsonl.gz", options, "ndcg", documents=7)
    for _ in range(2):  # it is made once
        where = Path(study.options(case)[3])
        assert where != folder / "corpus.jsonl.gz"
        assert list(study_tasks.records(where)) == [documents[number] for number in (0, 3, 4, 6, 10, 14, 18)]
    whole = replace(case, documents=None)
    assert study.options(whole)[3] == str(folder / "corpus.jsonl.gz")


def test_files_that_are_missing_are_named_before_anything_is_trained(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = Case("lost", "lost", "jsonl.gz", ("--task", "embedding"), "spearman")
    monkeypatch.setattr(study_tasks, "CASES", (CLASSES, lost))
    monkeypatch.setattr(study_tasks, "train", lambda *_: pytest.fail("it trains"))
    options = ["--data", str(study.data), "--model", study.model, "--work", str(study.work)]
    monkeypatch.setattr("sys.argv", ["study_tasks.py", *options, "--results", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=r"lost needs .*lost/train\.jsonl\.gz"):
        study_tasks.main()


def test_the_command_that_is_kept_has_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = "python benchmarks/study_tasks.py --data DATA --model ENCODER --minutes 6"
    for more in ("", " --speedups 1.5 2 --only stsb sst2"):
        options = (whole + more).replace("DATA", "/a/b").replace("ENCODER", "/c").split()[1:]
        monkeypatch.setattr("sys.argv", options)
        assert study_tasks.command_of(study_tasks.parsed()) == whole + more


def test_a_part_of_the_questions_keeps_every_paragraph(study: Study) -> None:
    questions = [[{"id": f"{p}-{q}"} for q in range(3)] for p in range(4)]
    squad: dict[str, Any] = {"data": [{"paragraphs": [{"qas": qas} for qas in questions]}]}
    kept = one_in(5, json.loads(json.dumps(squad)))["data"][0]["paragraphs"]
    assert [[qa["id"] for qa in paragraph["qas"]] for paragraph in kept] == [["0-0"], ["1-2"], [], ["3-1"]]
    case = Case("pairs", "pairs", "json", ("--task", "reranking"), "mrr", every=5)
    folder = study.data / "pairs"
    folder.mkdir()
    (folder / "eval.json").write_text(json.dumps(squad))
    assert json.loads(study.file(case, "eval").read_text()) == one_in(5, squad)
    with gzip.open(study.data / "classes" / "eval.jsonl.gz") as lines:
        assert len(list(lines)) == 60


def test_the_page_counts_its_trainings() -> None:
    trained = [case for case in study_tasks.CASES if case.models is None]
    assert sum(len(case.speedups) + (case.epochs is not None) for case in trained) == 12
    page = (Path(__file__).resolve().parents[2] / "docs" / "develop.md").read_text(encoding="utf-8")
    assert "a study of twelve trainings of `--minutes` each" in " ".join(page.split())
