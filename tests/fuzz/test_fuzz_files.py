"""Readers of data files under attack: JSON and bytes that are almost right. A file is read, and what is read
is consistent, or it is refused in one line that names it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from fuzzing import CASES, assert_refusal, fuzzed, in_child, json_bytes, mutated_bytes, mutated_json
from nq_pages import annotation, original, page
from pruned_trainer.pruning.decision import Decision
from pruned_trainer.tasks.natural_questions import nq_metrics
from pruned_trainer.tasks.natural_questions.documents import NqFormatError, parse_document
from pruned_trainer.tasks.squad.examples import Example, SquadFormatError, load_squad
from pruned_trainer.tasks.squad.sources import read_examples

CONTEXT = "Ada Lovelace wrote the first program in 1843. \U0001f600 São Paulo."
ROWS: list[dict[str, Any]] = [
    {
        "id": f"q{i}", "title": "Ada", "context": CONTEXT, "question": "When?",
        "answers": {"text": ["1843"], "answer_start": [CONTEXT.index("1843")]},
    }
    for i in range(3)
]  # fmt: skip
ROWS.append({**ROWS[0], "id": "none", "answers": {"text": [], "answer_start": []}})


def _entry(row: dict[str, Any]) -> dict[str, Any]:
    pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
    answers = [{"text": text, "answer_start": start} for text, start in pairs]
    return {"id": row["id"], "question": row["question"], "answers": answers, "is_impossible": not answers}


SQUAD = {
    "version": "v2.0",
    "data": [{"title": "Ada", "paragraphs": [{"context": CONTEXT, "qas": [_entry(row) for row in ROWS]}]}],
}
DECISION = {
    "format": 1,
    "layers": [
        {"heads": {"indices": [0, 2], "values": [1.0, 0.5]}, "ffn": {"indices": [1, 3], "values": [1, 0.9]}},
        {"heads": {"indices": [], "values": []}, "ffn": {"indices": [], "values": []}},
    ],
    "align": 8, "target": {"speedup": 2.0}, "reached": {"speedup": 2.1},
    "hidden": {"indices": [0], "values": [0.5]},
}  # fmt: skip
_PAGE = page(7, "who wrote it", "Ada wrote it", "in 1843")
_PAGE["annotations"] = [annotation(_PAGE, 0, (4, 5)), annotation(_PAGE, 1, yes_no="YES")]
PAGES = [_PAGE, original(_PAGE, 2)]
NQ_PREDICTIONS = {
    "predictions": [
        {
            "example_id": 7,
            "long_answer": {"start_token": 3, "end_token": 8, "start_byte": -1, "end_byte": -1},
            "long_answer_score": 1.5, "short_answers": [{"start_token": 4, "end_token": 5}],
            "short_answers_score": 0.5, "yes_no_answer": "NONE",
        }
    ]
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("attacked")


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def check_examples(examples: Any) -> None:
    """What a reader returns can be trained and scored on."""
    assert examples and len({example.id for example in examples}) == len(examples)
    for example in examples:
        assert isinstance(example, Example) and example.is_impossible == (not example.answers)
        for text, start in example.answers:
            assert text and example.context[start : start + len(text)] == text


def read_squad(path: Path) -> None:
    try:
        check_examples(load_squad(path).examples)
    except SquadFormatError as error:
        assert_refusal(error, path.name)


def read_rows(path: Path) -> None:
    try:
        check_examples(read_examples(path, "train"))
    except SquadFormatError as error:
        assert_refusal(error, path.name)


def read_decision(path: Path) -> None:
    try:
        decision = Decision.load(path)
    except ValueError as error:
        assert_refusal(error, path.name)
    else:
        decision.save(path)
        assert Decision.load(path) == decision


def read_nq(line: bytes) -> None:
    try:
        document = parse_document(line, "nq.jsonl, line 1")
    except NqFormatError as error:
        assert_refusal(error, "nq.jsonl, line 1")
        return
    size = len(document.tokens)
    assert len(document.is_html) == size and isinstance(document.id, int)
    assert all(0 <= candidate.start < candidate.end <= size for candidate in document.candidates)


@fuzzed(60, cases="squad", value=mutated_json([SQUAD]))
def test_squad(folder: Path, value: Any) -> None:
    read_squad(written(folder, "squad.json", json_bytes(value)))


@fuzzed(40, cases="squad", content=mutated_bytes([json_bytes(SQUAD), b"\xef\xbb\xbf" + json_bytes(SQUAD)]))
def test_squad_bytes(folder: Path, content: bytes) -> None:
    read_squad(written(folder, "squad.json", content))


@fuzzed(60, cases="rows", value=mutated_json(ROWS))
def test_squad_lines(folder: Path, value: Any) -> None:
    read_rows(written(folder, "squad.jsonl", b"\n".join([json_bytes(ROWS[1]), json_bytes(value)])))


@fuzzed(60, cases="decision", value=mutated_json([DECISION]))
def test_decisions(folder: Path, value: Any) -> None:
    read_decision(written(folder, "decision.json", json_bytes(value)))


@fuzzed(30, cases="decision", content=mutated_bytes([json_bytes(DECISION)]))
def test_decision_bytes(folder: Path, content: bytes) -> None:
    read_decision(written(folder, "decision.json", content))


@fuzzed(80, cases="nq", value=mutated_json(PAGES))
def test_nq_pages(value: Any) -> None:
    read_nq(json_bytes(value))


@fuzzed(40, cases="nq", line=mutated_bytes([json_bytes(entry) for entry in PAGES]))
def test_nq_bytes(line: bytes) -> None:
    read_nq(line)


@fuzzed(40, value=mutated_json([NQ_PREDICTIONS]))
def test_nq_predictions(folder: Path, value: Any) -> None:
    gold = written(folder, "gold.jsonl", json_bytes(PAGES[1]))
    try:
        metrics = nq_metrics(gold, written(folder, "predictions.json", json_bytes(value)))
    except ValueError as error:
        assert_refusal(error, "predictions")
    else:
        assert all(
            0 <= number <= 1 for name, number in metrics.items() if "threshold" not in name or "f1" in name
        )


def table_bytes(kind: str) -> bytes:
    """The rows as a Parquet file, an Arrow file or an Arrow stream."""
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    table, file = pyarrow.Table.from_pylist(ROWS), io.BytesIO()
    if kind == "parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        new = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
        with new(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["file", "stream", "parquet"])
@fuzzed(8, data=st.data())
def test_tables(folder: Path, kind: str, data: st.DataObject) -> None:
    """In a child, because a broken table can end the process that reads it."""
    pytest.importorskip("pyarrow")
    content = data.draw(mutated_bytes([table_bytes(kind)]))
    path = written(folder, "squad.parquet" if kind == "parquet" else "squad.arrow", content)
    assert in_child(lambda: outcome(path)) == "fine"


def outcome(path: Path) -> str:
    """ "fine", or the assertion that failed, or the error of another kind."""
    try:
        read_rows(path)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


READERS: dict[str, Callable[[Path], None]] = {
    "squad": read_squad,
    "decision": read_decision,
    "tables": read_rows,
    "rows": read_rows,
    "nq": lambda path: read_nq(path.read_bytes()),
}


KEPT = [path for reader in READERS for path in sorted(CASES.glob(f"{reader}/*"))]


@pytest.mark.parametrize("path", KEPT, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_failed_once(path: Path, folder: Path) -> None:
    """Files of tests/fuzz/cases: each is refused, or read as it should be."""
    kept = written(folder, path.name, path.read_bytes())

    def read() -> str:
        try:
            READERS[path.parent.name](kept)
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        return "fine"

    assert in_child(read) == "fine"


def test_the_attacked_files_are_right(folder: Path) -> None:
    """What the attacks begin with is read whole."""
    assert len(load_squad(written(folder, "squad.json", json_bytes(SQUAD))).examples) == len(ROWS)
    lines = b"\n".join(json_bytes(row) for row in ROWS)
    assert len(read_examples(written(folder, "squad.jsonl", lines), "train")) == len(ROWS)
    for kind, name in (("file", "a.arrow"), ("stream", "b.arrow"), ("parquet", "c.parquet")):
        assert len(read_examples(written(folder, name, table_bytes(kind)), "train")) == len(ROWS)
    assert Decision.load(written(folder, "decision.json", json_bytes(DECISION))).hidden is not None
    assert all(parse_document(json_bytes(entry)).labels for entry in PAGES)
    gold = written(folder, "gold.jsonl", json_bytes(PAGES[1]))
    assert nq_metrics(gold, written(folder, "predictions.json", json.dumps(NQ_PREDICTIONS).encode()))
