"""Natural Questions files and their refusals, the official metric, and training windows on disk."""

from __future__ import annotations

import copy
import gzip
import json
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nq_pages import annotation, original, page, write
from pruned_trainer.tasks.natural_questions.documents import (
    NqFormatError,
    Skipped,
    nq_files,
    parse_document,
    read_documents,
)
from pruned_trainer.tasks.natural_questions.metrics import (
    _bests,
    best_f1_loss_interval,
    f1_loss_interval,
    kind_metrics,
    mean_threshold,
    nq_metrics,
    parse_predictions,
    read_gold,
    read_predictions,
    score_answers,
)
from real_data import real_data
from thorough import EVERYTHING
from tiny_tokenizers import word_tokenizer

PAGE = page(7, "who ?", "w1 w2 w3", "w4 w5 😀")
PAGE["annotations"] = [annotation(PAGE, 1, (10, 12))]


def test_metric_is_the_official_evaluator_s() -> None:
    folder = real_data("data/natural_questions/metric")
    expected = json.loads((folder / "expected.json").read_text())
    metrics = nq_metrics(folder / "gold.jsonl.gz", folder / "predictions.json")
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-9), name


def best_threshold(stats: Any) -> float:
    return kind_metrics(stats, "")["best-threshold"]


def test_f1_at_a_threshold_and_its_interval() -> None:
    folder = real_data("data/natural_questions/metric")
    gold, predictions = read_gold(folder / "gold.jsonl.gz"), read_predictions(folder / "predictions.json")
    official = nq_metrics(folder / "gold.jsonl.gz", folder / "predictions.json")
    for stats, kind in zip(score_answers(gold, predictions), ("long", "short"), strict=True):
        best = official[f"{kind}-best-threshold-f1"]
        assert best_threshold(stats) == official[f"{kind}-best-threshold"]
        assert stats.f1_at(best_threshold(stats)) == pytest.approx(best, abs=1e-12)
        assert stats.f1_at(np.inf) == 0 < stats.f1_at(-np.inf) <= best
        same, other = stats.counts_at(best_threshold(stats)), stats.counts_at(2.0)
        assert f1_loss_interval(same, same) == (0.0, 0.0)
        low, high = f1_loss_interval(same, other)
        assert low < 100 * (best - stats.f1_at(2.0)) < high


def test_best_thresholds_on_resampled_documents() -> None:
    """One sample with every document once is the official number; the mean threshold lies among the best of
    samples, and the interval of a model's loss against itself is nothing."""
    folder = real_data("data/natural_questions/metric")
    gold, predictions = read_gold(folder / "gold.jsonl.gz"), read_predictions(folder / "predictions.json")
    for stats in score_answers(gold, predictions):
        threshold, f1 = _bests(stats, np.ones((1, len(stats.score))))
        assert threshold[0] == best_threshold(stats) and f1[0] == pytest.approx(stats.f1_at(threshold[0]))
        doubled = replace(stats, **{name: np.repeat(value, 2) for name, value in vars(stats).items()})
        weights = np.arange(len(stats.score)) % 3
        rows = np.repeat(np.arange(len(stats.score)), weights)
        sample = replace(stats, **{name: value[rows] for name, value in vars(stats).items()})
        threshold, f1 = _bests(stats, weights[None].astype(float))
        assert f1[0] == pytest.approx(sample.f1_at(best_threshold(sample)))
        assert abs(mean_threshold(doubled) - best_threshold(stats)) < 0.2
        assert mean_threshold(stats) == mean_threshold(stats) != best_threshold(stats)
        assert best_f1_loss_interval(stats, stats) == (0.0, 0.0)
        worse = replace(stats, correct=stats.correct & (np.arange(len(stats.score)) % 2 > 0))
        low, high = best_f1_loss_interval(stats, worse, resamples=200)
        lost = 100 * (stats.f1_at(best_threshold(stats)) - worse.f1_at(best_threshold(worse)))
        assert 0 < low < lost < high
        nothing = replace(stats, correct=stats.correct & False)
        assert mean_threshold(nothing) == 0.0


def prediction(key: int, **changes: Any) -> dict[str, Any]:
    long = {"start_token": 3, "end_token": 5, "start_byte": -1, "end_byte": -1}
    scores = {"long_answer_score": 1.0, "short_answers_score": 1.0}
    return {
        "example_id": key, "long_answer": long, "short_answers": [], "yes_no_answer": "NONE", **scores,
        **changes,
    }  # fmt: skip


def label(**changes: Any) -> dict[str, Any]:
    long = {"start_token": 3, "end_token": 5}
    return {"long_answer": long, "short_answers": [], "yes_no_answer": "NONE", **changes}


@pytest.mark.parametrize(
    ("labels", "changes", "long", "short"),
    [
        ([label()], {}, (False, True, False), (False, False, False)),  # one annotator is too few
        ([label(), label()], {}, (True, True, True), (False, False, False)),
        ([label(yes_no_answer="YES"), label(yes_no_answer="NO")], {"yes_no_answer": "no"}, None, (1, 1, 1)),
        ([label(yes_no_answer="YES")] * 2, {"yes_no_answer": "NO"}, None, (1, 1, 0)),
        (
            [label(short_answers=[{"start_token": 3, "end_token": 4}])] * 2,
            {"short_answers": [{"start_token": 3, "end_token": 4}, {"start_token": 4, "end_token": 5}]},
            None, (1, 1, 0),  # a set is right as a whole
        ),
        (
            [label(short_answers=[{"start_token": 3, "end_token": 4, "start_byte": 10, "end_byte": 12}])] * 2,
            {"short_answers": [{"start_token": -1, "end_token": -1, "start_byte": 10, "end_byte": 12}]},
            None, (1, 1, 1),  # by bytes where there are no tokens
        ),
        ([label(long_answer={})] * 2, {"long_answer": {}}, (False, False, False), None),
    ],
)  # fmt: skip
def test_what_counts_as_right(labels: Any, changes: Any, long: Any, short: Any, tmp_path: Path) -> None:
    gold = read_gold(write(tmp_path / "gold.jsonl", [{"example_id": 1, "annotations": labels}]))
    statistics = score_answers(gold, parse_predictions({"predictions": [prediction(1, **changes)]}))
    for stats, expected in zip(statistics, (long, short), strict=True):
        if expected is not None:
            got = (stats.has_gold[0], stats.has_predicted[0], stats.correct[0])
            assert got == tuple(map(bool, expected))


def test_metric_refusals(tmp_path: Path) -> None:
    gold = read_gold(write(tmp_path / "gold.jsonl", [{"example_id": 1, "annotations": []}]))
    with pytest.raises(NqFormatError, match=r"not of the same examples: 1 are in one .* \(example 2\)"):
        score_answers(gold, parse_predictions({"predictions": [prediction(1), prediction(2)]}))
    short = [{"start_token": 1, "end_token": 2}]
    for bad, message in (
        ({"yes_no_answer": "YES", "short_answers": short}, "both short answers and YES"),
        ({"yes_no_answer": "maybe"}, "yes_no_answer is 'MAYBE'"),
        ({"long_answer_score": None}, "'long_answer_score' is None; a number is needed"),
        ({"long_answer": {"start_token": 4, "end_token": 4}}, "start_token 4 and end_token 4 are no span"),
    ):
        with pytest.raises(NqFormatError, match=f"predictions: example 1.*{message}"):
            parse_predictions({"predictions": [prediction(1, **bad)]})
    with pytest.raises(NqFormatError, match="example 1: this id appears twice"):
        parse_predictions({"predictions": [prediction(1), prediction(1)]})
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(NqFormatError, match=r"empty\.jsonl: no examples at all"):
        read_gold(tmp_path / "empty.jsonl")


def test_reads_both_layouts(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.jsonl", [PAGE])
    packed = write(tmp_path / "packed.jsonl.gz", [original(PAGE)])
    (simple,), (full,) = (list(read_documents([path])) for path in (plain, packed))
    assert (simple.id, simple.question, simple.title) == (7, "who ?", "Title")
    assert simple.tokens == full.tokens == tuple(PAGE["document_text"].split(" "))
    assert simple.is_html.tolist() == full.is_html.tolist()
    assert simple.byte_offsets is None and full.byte_offsets is not None
    text = PAGE["document_text"].encode()
    assert [text[a:b].decode() for a, b in full.byte_offsets] == list(full.tokens)
    assert len(simple.labels) == 1 and full.labels == simple.labels * 5
    assert simple.labels[0].short == ((10, 12, -1, -1),)
    empty = next(read_documents([write(tmp_path / "empty.jsonl", [page(1, "?", document_text="")])]))
    assert empty.tokens == () and empty.candidates == ()


def test_tags_of_the_simplified_layout_are_those_of_the_original() -> None:
    documents = read_documents(nq_files(real_data("data/natural_questions/eval.jsonl.gz")))
    for document in islice(documents, None if EVERYTHING else 100):
        line = page(1, "?", document_text=" ".join(document.tokens))
        again = parse_document(json.dumps(line).encode())
        assert again.tokens == document.tokens and (again.is_html == document.is_html).all()


def test_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "notes.txt"):
        write(tmp_path / name, [PAGE])
    assert [path.name for path in nq_files(tmp_path)] == ["a.jsonl.gz", "b.jsonl"]
    with pytest.raises(NqFormatError, match=r"b\.jsonl, line 1, example 7: this id appears twice"):
        list(read_documents(nq_files(tmp_path)))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        nq_files(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \.jsonl or \.jsonl\.gz file"):
        nq_files(tmp_path / "empty")


def changed(**changes: Any) -> dict[str, Any]:
    entry = copy.deepcopy(PAGE)
    for path, value in changes.items():
        *way, last = [int(step) if step.isdigit() else step for step in path.split("__")]
        holder = entry
        for step in way:
            holder = holder[step]
        holder[last] = value
    return entry


BAD = [
    (b"{", "not JSON: Expecting"),
    (b'{"a": "\xff"}', "not JSON: 'utf-8' codec can't decode byte 0xff"),
    (b"", "not JSON: it is empty"),
    (b"[]", "an object is needed, not list"),
    (changed(example_id="7"), "'example_id' has type str, not int"),
    (changed(document_text=None), "example 7: 'document_text' has type NoneType, not str"),
    (changed(document_tokens=[{"token": "a"}]), "example 7, token 0: no 'start_byte'"),
    (changed(long_answer_candidates__0__end_token=99), "candidate 0: tokens 3 to 99 are no part of a doc"),
    (changed(long_answer_candidates__0__start_token=-1), "candidate 0: tokens -1 to 8 are no part"),
    (changed(annotations__0__short_answers__0__end_token=40), "short answer: tokens 10 to 40 are no part"),
    (changed(annotations__0__short_answers__0__end_token=10), "start_token 10 and end_token 10 are no span"),
    (changed(annotations__0__long_answer__candidate_index=5), "candidate_index 5, but there are 2"),
    (changed(annotations__0__long_answer__candidate_index=0), "tokens 8 to 13, is not candidate 0"),
    (changed(annotations__0__long_answer={"start_token": 4, "end_token": 6}), "is not any candidate"),
    (changed(annotations__0__yes_no_answer="MAYBE"), "yes_no_answer is 'MAYBE'"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_a_bad_line_is_refused_or_skipped(line: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{**PAGE, "example_id": 1}, line, {**PAGE, "example_id": 2}])
    with pytest.raises(NqFormatError) as caught:
        list(read_documents([path]))
    assert str(caught.value).startswith(f"{path}, line 2") and message in str(caught.value)
    skipped = Skipped()
    assert [document.id for document in read_documents([path], skipped)] == [1, 2]
    assert skipped.faults == [str(caught.value)]


def test_a_gzip_file_that_breaks_off(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.jsonl.gz", [{**PAGE, "example_id": i, "x": "y" * i} for i in range(5000)])
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(whole.read_bytes()[:-2000])
    with pytest.raises(NqFormatError, match=r"cut\.jsonl\.gz: the gzip data is broken after line \d+"):
        list(read_documents([cut]))
    skipped = Skipped()
    other = write(tmp_path / "other.jsonl", [{**PAGE, "example_id": 9999}])
    ids = [document.id for document in read_documents([cut, other], skipped)]
    assert ids[-1] == 9999 and len(ids) > 100 and len(skipped) == 1


def test_a_file_is_read_line_by_line(tmp_path: Path) -> None:
    """The first document is there before the rest of the file can have been read."""
    path = write(tmp_path / "x.jsonl", [PAGE, b"{"])
    documents = read_documents([path])
    assert next(documents).id == 7
    with pytest.raises(NqFormatError, match="line 2"):
        next(documents)


def test_parts_share_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl.gz", [{**PAGE, "example_id": i} for i in range(7)])
    parts = [[document.id for document in read_documents([path], part=(k, 3))] for k in range(3)]
    assert parts == [[0, 3, 6], [1, 4], [2, 5]]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_training_windows_on_disk(num_proc: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    from pruned_trainer.tasks.natural_questions.windows import training_windows

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    good = [{**PAGE, "example_id": i} for i in range(6)]
    path = write(tmp_path / "x.jsonl", [*good[:3], b"{", *good[3:], changed(example_id="x")])
    windows = training_windows([path], word_tokenizer(), 64, 8, num_proc=num_proc, skip_bad=True)
    assert len(windows) == 6 and windows.lengths == [len(windows[i]["input_ids"]) for i in range(6)]
    assert sorted(fault.split(": ")[0] for fault in windows.skipped.faults) == [
        f"{path}, line {number}" for number in (4, 8)
    ]
    assert {window["answer_types"] for window in windows} == {3}
    assert windows[-1]["input_ids"].dtype == np.int32 and windows[-1]["attention_mask"].all()
    with pytest.raises(IndexError):
        windows[6]
    with pytest.raises(NqFormatError, match=r"x\.jsonl, line (4|8)"):
        training_windows([path], word_tokenizer(), 64, 8, num_proc=num_proc)
    del windows
    assert not list(tmp_path.glob("natural-questions-*"))


WITHOUT = """
import sys
sys.modules["datasets"] = None
import pruned_trainer.tasks.squad
from pruned_trainer.tasks.natural_questions import nq_metrics, read_documents
from pruned_trainer.tasks.natural_questions import predictions
from pruned_trainer.tasks.natural_questions.windows import training_windows
"""


def test_readers_and_metrics_do_without_datasets() -> None:
    """SQuAD's, too."""
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_gold_may_be_packed_or_not(tmp_path: Path) -> None:
    folder = real_data("data/natural_questions/metric")
    plain = tmp_path / "gold.jsonl"
    plain.write_bytes(gzip.decompress((folder / "gold.jsonl.gz").read_bytes()))
    assert read_gold(plain) == read_gold(folder / "gold.jsonl.gz")
