"""Questions from files and folders with SQuAD's columns and from the hub: what is read, what is refused."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from matching import squad_file
from pruned_trainer.tasks.faults import FormatError, Skipped
from pruned_trainer.tasks.sources import read_rows
from pruned_trainer.tasks.squad.examples import Example, SquadFormatError, load_squad
from pruned_trainer.tasks.squad.sources import read_examples
from text_files import write_rows

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")

CONTEXT = "The cat 😀 sat\u2028on the mat."
ANSWERS = {"text": ["cat", "cat 😀"], "answer_start": [4, 4]}
ROW = {"id": "q0", "title": "Cats", "question": "Who?", "context": CONTEXT, "answers": ANSWERS}
NOTHING = {**ROW, "id": "q1", "answers": {"text": [], "answer_start": []}}


@pytest.fixture(autouse=True)
def _quiet_and_without_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "users")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
    assert not (tmp_path / "users").exists()


def columns(example: Example) -> dict[str, Any]:
    texts = {"text": [a.text for a in example.answers], "answer_start": [a.start for a in example.answers]}
    names = ("id", "title", "question", "context", "is_impossible")
    return {**{name: getattr(example, name) for name in names}, "answers": texts}


def json_lines(path: Path, rows: list[Any]) -> Path:
    # As UTF-8, with the line ends that only some take for line ends.
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    return str(json_lines(path / "questions.jsonl", rows))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    datasets.Dataset.from_list(rows).to_parquet(path / "questions.parquet")
    return str(path / "questions.parquet")


def write_arrow_stream(path: Path, rows: list[dict[str, Any]]) -> str:
    datasets.Dataset.from_list(rows).save_to_disk(path / "saved")
    return str(next((path / "saved").glob("*.arrow")))


def write_arrow_file(path: Path, rows: list[dict[str, Any]]) -> str:
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_file(path / "questions.arrow", table.schema) as file:
        file.write_table(table)
    return str(path / "questions.arrow")


def write_saved(path: Path, rows: list[dict[str, Any]]) -> str:
    # The format is saved with the data: as tensors, answer_start would be none of the int that is asked for.
    datasets.Dataset.from_list(rows).with_format("numpy").save_to_disk(path / "saved")
    return str(path / "saved")


def write_saved_splits(path: Path, rows: list[dict[str, Any]]) -> str:
    dev = datasets.Dataset.from_list(rows)
    datasets.DatasetDict({"train": dev.select([0]), "dev": dev}).save_to_disk(path / "saved")
    return f"{path / 'saved'}:dev"


def write_hub_layout(path: Path, rows: list[dict[str, Any]]) -> str:
    folder = path / "json"  # the name of one of `datasets`' own readers
    validation = datasets.Dataset.from_list(rows)
    for name, part in (("train", validation.select([0])), ("validation", validation)):
        part.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    entries = "".join(f"  - split: {s}\n    path: data/{s}-*\n" for s in ("train", "validation"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: squad\n  data_files:\n{entries}---\n")
    return str(folder)


KINDS = [
    write_json_lines, write_parquet, write_arrow_stream, write_arrow_file, write_saved, write_saved_splits,
    write_hub_layout,
]  # fmt: skip
Write = Callable[[Path, list[dict[str, Any]]], str]


@pytest.mark.parametrize("write", KINDS)
def test_every_kind_gives_what_the_json_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write
) -> None:
    path = squad_file(tmp_path / "squad.json", questions=12, seed=3, unanswerable=0.3)
    expected = list(load_squad(path).examples)
    assert any(e.is_impossible for e in expected) and any(e.answers for e in expected)
    source = write(tmp_path, [columns(example) for example in expected])
    assert read_examples(path, "validation") == expected
    assert read_examples(source, "validation") == expected
    monkeypatch.chdir(tmp_path)
    assert read_examples(Path(os.path.relpath(source)), "validation") == expected


@pytest.mark.parametrize("write", KINDS)
def test_optional_columns_may_be_absent_or_null(tmp_path: Path, write: Write) -> None:
    bare = [{key: row[key] for key in ("id", "question", "context", "answers")} for row in (ROW, NOTHING)]
    nulls = [{**bare[0], "title": None, "is_impossible": None}, {**NOTHING, "is_impossible": True}]
    for name, rows, title in (("absent", bare, ""), ("null", nulls, "Cats")):
        (tmp_path / name).mkdir()
        read = read_examples(write(tmp_path / name, rows), "validation")
        summary = [(e.title, e.is_impossible, len(e.answers)) for e in read]
        assert summary == [("", False, 2), (title, True, 0)]
        assert read[0].context == CONTEXT


def test_a_changed_folder_is_read_anew(tmp_path: Path) -> None:
    for question in ("Who?", "Where?"):  # the same names and sizes: `datasets`' cache would not see it
        write_hub_layout(tmp_path, [{**ROW, "question": question}])
        assert read_examples(tmp_path / "json", "validation")[0].question == question


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "q0"}, "row 1, question 'q0': this id appears twice"),
        ({"id": 7}, "row 1: 'id' has type int, not str"),
        ({"question": None}, "row 1, question 'q1': 'question' has type NoneType, not str"),
        ({"context": 3}, "row 1, question 'q1': 'context' has type int, not str"),
        ({"title": 3}, "row 1, question 'q1': 'title' has type int, not str"),
        ({"answers": []}, "row 1, question 'q1': 'answers' has type list, not dict"),
        ({"answers": {"text": []}}, "question 'q1', answers: no 'answer_start'"),
        ({"answers": {"text": "cat", "answer_start": 4}}, "answers: 'text' has type str, not list"),
        ({"answers": {"text": ["cat"], "answer_start": []}}, "1 answers' texts, but 0 answer_start"),
        ({"answers": {"text": ["cat"], "answer_start": [4.0]}}, "answer 0: 'answer_start' has type float"),
        ({"answers": {"text": ["cat"], "answer_start": [5]}}, "'q1': answer 'cat' is not at 5; there stands"),
        ({"answers": {"text": [" "], "answer_start": [3]}}, "'q1': an answer is empty"),
        ({"is_impossible": False}, "'is_impossible' is false, but it has 0 answers"),
        ({"is_impossible": "no"}, "'is_impossible' has type str, not bool"),
    ],
)
def test_refuses_bad_rows_and_names_them(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = json_lines(tmp_path / "bad.jsonl", [ROW, {**NOTHING, **change}])
    with pytest.raises(SquadFormatError, match=rf"bad\.jsonl.*{message}"):
        read_examples(path, "train")


@pytest.mark.parametrize("write", KINDS)
def test_errors_name_source_split_row_and_question(tmp_path: Path, write: Write) -> None:
    moved = {**NOTHING, "answers": {"text": ["cat"], "answer_start": [5]}}
    source = write(tmp_path, [ROW, moved])
    folder, _, split = source.partition(":")
    split = "validation" if write is write_hub_layout else split
    place = f"{folder}, split {split!r}" if split else folder
    with pytest.raises(SquadFormatError, match=f"^{place}, row 1, question 'q1': answer 'cat' is not at 5"):
        read_examples(source, "validation")


@pytest.mark.parametrize("write", KINDS)
def test_missing_columns_are_named_with_those_there_are(tmp_path: Path, write: Write) -> None:
    rows = [{"id": "q0", "text": "x", "answers": ANSWERS}] * 2
    message = "no column 'question', 'context'; there are 'id', 'text', 'answers'$"
    with pytest.raises(SquadFormatError, match=message):
        read_examples(write(tmp_path, rows), "validation")


def test_a_source_without_questions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(SquadFormatError, match=r"empty\.jsonl: no questions at all"):
        read_examples(tmp_path / "empty.jsonl", "train")
    datasets.Dataset.from_list([ROW]).select([]).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(SquadFormatError, match=r"empty\.parquet: no questions at all"):
        read_examples(tmp_path / "empty.parquet", "train")
    (tmp_path / "bare").mkdir()
    with pytest.raises(SquadFormatError, match="bare: not a folder that `datasets` can read: .*data files"):
        read_examples(tmp_path / "bare", "train")


def test_splits_are_those_of_the_source(tmp_path: Path) -> None:
    source = write_saved_splits(tmp_path, [ROW, NOTHING]).removesuffix(":dev")
    assert len(read_examples(source, "train")) == 1 and len(read_examples(source, "dev")) == 2
    with pytest.raises(ValueError, match=r"saved: no split 'validation'; there are train, dev \(.*saved:tr"):
        read_examples(source, "validation")
    with pytest.raises(ValueError, match=r"'train\[:1\]' is no split"):
        read_examples(f"{source}:train[:1]", "train")
    dataset = datasets.Dataset.from_list([ROW], split="train")
    dataset.save_to_disk(tmp_path / "one")
    assert read_examples(f"{tmp_path}/one:train", "x") == read_examples(tmp_path / "one", "validation")
    with pytest.raises(ValueError, match="one: no split 'dev': it is train"):
        read_examples(f"{tmp_path}/one:dev", "train")
    path = json_lines(tmp_path / "q.jsonl", [ROW])
    with pytest.raises(ValueError, match="is a file and has no splits: leave ':train' away"):
        read_examples(f"{path}:train", "train")
    (tmp_path / "2026:01").mkdir()
    Path(source).rename(tmp_path / "2026:01" / "of:us")  # the colons of a folder's name are its own
    assert len(read_examples(tmp_path / "2026:01" / "of:us:dev", "train")) == 2
    path.rename(tmp_path / "q:train.jsonl")  # a name that exists is that file, whatever it looks like
    assert len(read_examples(tmp_path / "q:train.jsonl", "dev")) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.csv", b"id,question\n", r"a \.csv file has no nested columns"),
        ("q.json", b"{}", "no 'data'"),
        ("q.jsonl", b'{"id": 1}\n\n', "line 2 is not JSON: it is empty"),
        ("q.jsonl", b'{"id": 1}\n{"id', "line 2 is not JSON: Unterminated string"),
        ("q.jsonl", b"\xff", "line 1 is not JSON: .*0xff"),
        ("q.jsonl", b"[1]\n", "line 1: an object is needed, not list"),
        ("q.parquet", b"PAR1 and nothing else PAR1", r"not \.parquet: "),
        ("q.arrow", b"ARROW1 and nothing else", r"not \.arrow: "),
        ("q.arrow", b"\xff\xff\xff\xff\x10\x00\x00\x00", r"not \.arrow: "),
        ("q/train.parquet", b"PAR1", "not a folder that `datasets` can read: "),
        ("q/dataset_dict.json", b"{}", "not a folder that `datasets` can read: "),
    ],
)
def test_refuses_broken_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    source = path if path.parent == tmp_path else path.parent
    with pytest.raises(SquadFormatError, match=f"^{source}: .*{message}") as caught:
        read_examples(source, "train")
    assert "\n" not in str(caught.value)


def test_arrow_offsets_that_lead_anywhere_are_refused(tmp_path: Path) -> None:
    """Of a stream, a file and a saved folder. Before this check the process ended by SIGSEGV: it is run in
    one of its own."""
    offsets, anywhere = struct.pack("<ii", 0, len(CONTEXT.encode())), struct.pack("<ii", 0, 1 << 28)
    sources = []
    for kind in ("stream", "file", "saved"):
        folder = tmp_path / kind
        folder.mkdir()
        path = Path((write_arrow_file if kind == "file" else write_arrow_stream)(folder, [ROW]))
        content = path.read_bytes()
        assert offsets in content
        path.write_bytes(content.replace(offsets, anywhere))
        sources.append(str(folder if kind == "saved" else path))
    # Ends without the interpreter's own end, where other libraries' threads sometimes abort: not tested here.
    code = f"""
import os
from pruned_trainer.tasks.squad.sources import read_examples
for source in {sources!r}:
    try:
        print(read_examples(source, "train"), flush=True)
    except ValueError as error:
        print("refused:", error, flush=True)
os._exit(0)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for source, said in zip(sources, run.stdout.splitlines(), strict=True):
        assert said.startswith(f"refused: {source}: not ")


def test_files_as_other_tools_write_them(tmp_path: Path) -> None:
    """A byte order mark, line ends of two characters; what is refused is not printed."""
    text = json.dumps(ROW, ensure_ascii=False) + "\r\n" + json.dumps(NOTHING, ensure_ascii=False) + "\r\n"
    (tmp_path / "q.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [example.id for example in read_examples(tmp_path / "q.jsonl", "train")] == ["q0", "q1"]
    squad_file(tmp_path / "plain.json", questions=3, seed=0)
    content = (tmp_path / "plain.json").read_bytes()
    (tmp_path / "q.json").write_bytes(b"\xef\xbb\xbf" + content)
    assert read_examples(tmp_path / "q.json", "x") == read_examples(tmp_path / "plain.json", "x")
    for encoding, message in (("utf-16", "UTF-16"), ("latin1", "0xc5")):
        for name in ("q.json", "q.jsonl"):
            (tmp_path / name).write_bytes('{"secret": "Åsa"}\n'.encode(encoding))
            with pytest.raises(SquadFormatError, match=rf"q\.json.* JSON: .*{message}") as refusal:
                read_examples(tmp_path / name, "train")
            assert "secret" not in repr(refusal.value)


def test_bad_rows_are_skipped_and_answers_moved_where_that_is_asked_for(tmp_path: Path) -> None:
    moved = {**ROW, "id": "q2", "answers": {"text": ["cat"], "answer_start": [5]}}
    rows = [ROW, {"id": 3}, moved, {**moved, "id": "q4", "context": "none"}]
    path = json_lines(tmp_path / "q.jsonl", rows)
    with path.open("ab") as file:
        file.write(b'{"id": "\\ud800"}\n[\n')
    skipped, repaired = Skipped(), list[str]()
    read = read_examples(path, "train", skipped, repaired)
    assert [(example.id, example.answers[0].start) for example in read] == [("q0", 4), ("q2", 4)]
    assert repaired == [f"{path}, row 2, question 'q2': answer 'cat' at 5 is 'cat' at 4"]
    assert len(skipped) == 4 and "half a surrogate pair" in skipped.faults[0]
    with pytest.raises(SquadFormatError, match="is not at 5"):
        read_examples(json_lines(tmp_path / "one.jsonl", [moved]), "train")


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.json"])
def test_bad_rows_of_every_format_are_skipped_where_that_is_asked_for(name: str, tmp_path: Path) -> None:
    """The others are read, and those after them, too."""
    path, between = tmp_path / name, "," if name == "rows.csv" else "\t"
    path.write_text("text label\na 1\nb\nc 2 3\nd 4\n".replace(" ", between))
    if name == "rows.json":
        path.write_text('[{"text": "a", "label": "1"}, 3, null, {"text": "d", "label": "4"}]')
    skipped = Skipped()
    source = read_rows(path, "train", None, skipped)
    assert list(source.rows) == [{"text": "a", "label": "1"}, {"text": "d", "label": "4"}]
    assert [where for where, _ in source.placed()] == [f"{path}, row 0", f"{path}, row 3"]
    assert len(skipped) == 2
    assert skipped.faults[0].startswith(f"{path}, row 1: ")
    with pytest.raises(FormatError, match="row 1: "):
        read_rows(path, "train")


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.arrow"])
def test_columns_of_one_name_are_refused(name: str, tmp_path: Path) -> None:
    """A row would keep the last of them, whichever was meant."""
    path = tmp_path / name
    if name == "rows.arrow":
        pyarrow, ipc = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.ipc")
        columns = [pyarrow.array([text]) for text in ("a", "b", "1")]
        twice = pyarrow.table(columns, names=["text", "text", "label"])
        with ipc.new_file(path, twice.schema) as writer:
            writer.write_table(twice)
    else:
        path.write_text("text text label\na b 1\n".replace(" ", "," if name == "rows.csv" else "\t"))
    with pytest.raises(
        FormatError, match=f"^{path}: there are several columns 'text': give each its own name"
    ):
        read_rows(path, "train", None, Skipped())


def test_rows_after_a_line_that_is_skipped_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n[\n{"text": "b"}\n')
    places = [where for where, _ in read_rows(path, "train", None, Skipped()).placed()]
    assert places == [f"{path}, row 0", f"{path}, row 2"]


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []

    def load_dataset(name: str) -> Any:
        names.append(name)
        parts = {"train": [ROW], "validation": [{**ROW, "id": "v0"}]}
        return datasets.DatasetDict({s: datasets.Dataset.from_list(rows) for s, rows in parts.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [e.id for e in read_examples("me/cats", "train")] == ["q0"]
    assert [e.id for e in read_examples(Path("me/cats:validation"), "train")] == ["v0"]
    with pytest.raises(ValueError, match=r"me/cats: no split 'dev'; there are train, validation \(choose"):
        read_examples("me/cats", "dev")
    assert names == ["me/cats"] * 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me").mkdir()
    json_lines(tmp_path / "me/cats", [ROW]).rename("me/cats")  # a path that is there is no hub name
    with pytest.raises(SquadFormatError, match="me/cats: "):
        read_examples("me/cats", "train")
    for name in ("absent.json", "data/absent.json", "absent", "./data/absent", "/a/b", "a/b.csv:train"):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            read_examples(name, "train")
    assert len(names) == 3


def test_hub_failures_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[tuple[Exception, type[Exception], str]] = [
        (ConnectionError("Couldn't reach\nand more"), OSError, "the hub could not be asked: Couldn't reach$"),
        (datasets.exceptions.DatasetNotFoundError("x"), OSError, "no such data set on the hub: x$"),
        (RuntimeError("scripts"), ValueError, "the hub's data set cannot be read: scripts$"),
        (ValueError(), ValueError, "the hub's data set cannot be read: ValueError$"),
    ]
    for raised, kind, message in failures:

        def load_dataset(name: str, raised: Exception = raised) -> Any:
            raise raised

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        with pytest.raises(kind, match=f"^me/cats: no such file here, and {message}"):
            read_examples("me/cats", "train")


def test_offline_and_without_libraries(tmp_path: Path) -> None:
    squad_file(tmp_path / "squad.json", questions=3, seed=0)
    json_lines(tmp_path / "q.jsonl", [ROW])
    (tmp_path / "q.parquet").touch()
    code = """
import sys
from pruned_trainer.tasks.squad.sources import read_examples

def refusal(source):
    try:
        read_examples(source, "train")
    except (ValueError, OSError) as error:
        return str(error)

print(refusal("me/cats"))
sys.modules["datasets"] = sys.modules["pyarrow"] = None
assert len(read_examples("squad.json", "train")) == 3 and len(read_examples("q.jsonl", "train")) == 1
for source in (".", "me/cats", "q.parquet"):
    assert refusal(source).endswith("pip install datasets"), refusal(source)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    environment["HF_HOME"] = str(tmp_path / "home")
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("me/cats: no such file here, and the hub could not be asked: ")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json"])
def test_a_text_may_have_any_length(suffix: str, tmp_path: Path) -> None:
    row = {"text": "long " * 100_000, "label": "yes"}
    path = write_rows(tmp_path / f"rows.{suffix}", [row])
    assert [read for _, read in read_rows(path, "train").placed()] == [row]
