"""Examples from any source: SQuAD's JSON, SQuAD's columns in files and folders, the Hugging Face hub.

SQuAD's columns are id, question, context and answers {text: [...], answer_start: [...]}, and optionally title
and is_impossible. `datasets` is imported only where a folder or the hub is read, and pyarrow (which comes
with it) only where a .parquet or .arrow file is; .json and .jsonl need neither.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from pruned_ops.files import parse_json, shown
from pruned_trainer.tasks.faults import Skipped, get_field, skipping
from pruned_trainer.tasks.squad.examples import (
    Example,
    Placed,
    SquadFormatError,
    checked_examples,
    load_squad,
    read_question,
)

NEEDED = ("id", "question", "context", "answers")
OPTIONAL = ("title", "is_impossible")
JSON_LINES = (".jsonl", ".ndjson")
ARROW = (".parquet", ".arrow")
NO_NESTED_COLUMNS = (".csv", ".tsv")

# OWNER/NAME. A single word is not taken as a hub name: it is more often a mistyped path, and `datasets` takes
# some words ("json", "text") for its own readers.
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SPLIT = re.compile(r"\w+(\.\w+)*")

Rows = Iterable[Mapping[str, Any]]


class _Record(NamedTuple):
    """Where the faults of bad rows and the answers that were put right go; None for either: they are
    refused."""

    skipped: Skipped | None
    repaired: list[str] | None


def read_examples(
    source: str | Path,
    default_split: str,
    skipped: Skipped | None = None,
    repaired: list[str] | None = None,
) -> list[Example]:
    """The questions of a file, a folder or a data set of the hub, checked as `load_squad` checks.

    source: .parquet, .jsonl or .arrow with SQuAD's columns, any other file as SQuAD's JSON; a folder that
    `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote, or that has the hub's layout; else a hub name.
    Folders and hub names may end in ":split"; default_split serves where they do not and there are splits.
    What comes from the hub stays in the cache of `datasets`. skipped, repaired: as for `parse_squad`.

    Errors name the source, split, row (from 0) and question: FileNotFoundError where there is no such file,
    OSError where the hub does not answer or does not know the name, ValueError for an unknown split or a
    missing library, SquadFormatError (a ValueError) for everything that is not SQuAD.
    """
    name, split = str(source), None
    if not Path(name).exists() and ":" in name:
        name, split = name.split(":", 1)
        if not _SPLIT.fullmatch(split):
            raise ValueError(f"{source}: no such file, and {split!r} is no split: one name, such as train")
    path, record = Path(name), _Record(skipped, repaired)
    if path.is_dir():
        return _read_folder(path, split, default_split, record)
    if path.exists():
        if split is not None:
            raise ValueError(f"{path} is a file and has no splits: leave ':{split}' away")
        return _read_file(path, record)
    return _read_hub(name, split or default_split, record)


def _read_file(path: Path, record: _Record) -> list[Example]:
    suffix = path.suffix.lower()
    if suffix in NO_NESTED_COLUMNS:
        raise SquadFormatError(
            f"{path}: a {suffix} file has no nested columns, and answers are nested: "
            f"write it as {', '.join((*JSON_LINES[:1], *ARROW))} or SQuAD's .json"
        )
    if suffix in JSON_LINES:
        rows = _json_lines(path, record.skipped)
        return _examples(str(path), list(dict.fromkeys(key for row in rows for key in row)), rows, record)
    if suffix in ARROW:
        table = _arrow_table(path, suffix)
        chosen = table.select([column for column in table.column_names if column in NEEDED + OPTIONAL])
        rows_of_batches = (row for batch in chosen.to_batches() for row in batch.to_pylist())
        return _examples(str(path), table.column_names, rows_of_batches, record)
    return list(load_squad(path, "raise", *record).examples)


def _json_lines(path: Path, skipped: Skipped | None) -> list[dict[str, Any]]:
    rows = []
    with path.open("rb") as file:  # as bytes, whose lines end at \n only: a text may hold other line ends
        for number, line in enumerate(file, 1):
            with skipping(skipped):
                rows.append(_parse_line(line, f"{path}: line {number}"))
    return rows


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise SquadFormatError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise SquadFormatError(f"{where}: an object is needed, not {type(row).__name__}")
    return row


def _arrow_table(path: Path, suffix: str) -> Any:
    """A file's pyarrow.Table. An .arrow file is a stream (`datasets` writes those) or in the file format."""
    pyarrow = _library("pyarrow", path)
    reader = _library("pyarrow.parquet" if suffix == ".parquet" else "pyarrow.ipc", path)
    with path.open("rb") as file:  # outside the try: an OSError of the file system stays what it is
        try:
            if suffix == ".parquet":
                table = reader.read_table(file)
            else:
                is_file_format = file.read(6) == b"ARROW1"
                file.seek(0)
                table = (reader.open_file if is_file_format else reader.open_stream)(file).read_all()
            # Offsets may lead anywhere: whoever follows them before this check may crash.
            table.validate(full=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise SquadFormatError(f"{path}: not {suffix}: {_reason(error)}") from None
    return table


def _read_folder(path: Path, split: str | None, default_split: str, record: _Record) -> list[Example]:
    datasets = _library("datasets", path)
    is_saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    # The cache is not the user's: where a folder's README lists its files, `datasets` compares names and not
    # contents, and so would return the questions that the folder, or another of its name, once held.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        try:
            # Absolute, because `datasets` takes some relative names ("json", "text") for its own readers.
            folder = str(path.resolve())
            loaded = (
                datasets.load_from_disk(folder)
                if is_saved
                else datasets.load_dataset(folder, cache_dir=cache)
            )
        except Exception as error:  # datasets, pyarrow and each reader raise their own kind
            raise SquadFormatError(
                f"{path}: not a folder that `datasets` can read: {_reason(error)}"
            ) from None
        if isinstance(loaded, Mapping):
            return _read_split(loaded, str(path), split or default_split, record)
        if split is not None and str(loaded.split) != split:
            own_split = f"it is {loaded.split!s}" if loaded.split else "it has none"
            raise ValueError(f"{path}: no split {split!r}: {own_split}")
        return _dataset_examples(str(path), loaded, record)


def _read_hub(name: str, split: str, record: _Record) -> list[Example]:
    known = (".json", *JSON_LINES, *ARROW, *NO_NESTED_COLUMNS)
    if not _HUB_NAME.fullmatch(name) or name.startswith(".") or Path(name).suffix.lower() in known:
        raise FileNotFoundError(f"{name}: no such file or folder (nor a hub name, which is OWNER/NAME)")
    datasets = _library("datasets", name)
    try:
        loaded = datasets.load_dataset(name)
    except datasets.exceptions.DatasetNotFoundError as error:
        text = f"{name}: no such file here, and no such data set on the hub: {_reason(error)}"
        raise FileNotFoundError(text) from None
    except OSError as error:
        text = f"{name}: no such file here, and the hub could not be asked: {_reason(error)}"
        raise ConnectionError(text) from None
    except Exception as error:  # datasets, the hub's client, pyarrow and each reader raise their own kind
        text = f"{name}: no such file here, and the hub's data set cannot be read: {_reason(error)}"
        raise ValueError(text) from None
    return _read_split(loaded, name, split, record)


def _read_split(splits: Mapping[str, Any], name: str, split: str, record: _Record) -> list[Example]:
    if split not in splits:
        choice = f"choose with {name}:{next(iter(splits), 'train')}"
        raise ValueError(f"{name}: no split {split!r}; there are {', '.join(splits) or 'none'} ({choice})")
    return _dataset_examples(f"{name}, split {split!r}", splits[split], record)


def _dataset_examples(where: str, dataset: Any, record: _Record) -> list[Example]:
    try:
        dataset.data.validate(full=True)  # as in `_arrow_table`: such files are mapped into memory unchecked
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise SquadFormatError(f"{where}: not a data set: {_reason(error)}") from None
    columns = [column for column in dataset.column_names if column in NEEDED + OPTIONAL]
    # Only these columns are decoded; a saved data set may remember a format that turns lists into tensors.
    rows = dataset.with_format(None).select_columns(columns)
    return _examples(where, dataset.column_names, rows, record)


def _examples(where: str, columns: Sequence[str], rows: Rows, record: _Record) -> list[Example]:
    missing = [repr(column) for column in NEEDED if column not in columns]
    if missing and columns:
        listed = ", ".join(columns)
        raise SquadFormatError(f"{where}: no column {', '.join(missing)}; there are {listed}")
    placed = _placed_examples(rows, where, record.skipped)
    return list(checked_examples(placed, where, *record))


def _placed_examples(rows: Rows, name: str, skipped: Skipped | None) -> Iterator[Placed]:
    for number, row in enumerate(rows):
        with skipping(skipped):
            yield _placed_example(row, f"{name}, row {number}")


def _placed_example(row: Mapping[str, Any], where: str) -> Placed:
    # A column has a value in every row: an optional field that is absent is null.
    entry = {key: value for key, value in row.items() if value is not None or key not in OPTIONAL}
    where = f"{where}, question {shown(get_field(entry, 'id', str, where))}"
    answers = get_field(entry, "answers", dict, where)
    texts = get_field(answers, "text", list, f"{where}, answers")
    starts = get_field(answers, "answer_start", list, f"{where}, answers")
    if len(texts) != len(starts):
        raise SquadFormatError(f"{where}: {len(texts)} answers' texts, but {len(starts)} answer_start")
    pairs = zip(texts, starts, strict=True)
    entry["answers"] = [{"text": text, "answer_start": start} for text, start in pairs]
    title = get_field(entry, "title", str, where, default="")
    return where, read_question(entry, title, get_field(entry, "context", str, where), where)


def _library(module: str, source: str | Path) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ValueError(f"{source} cannot be read without {name} ({error}): pip install datasets") from None


def _reason(error: BaseException) -> str:
    """The first line of an error's text, or of its cause's where the error only says that there is one."""
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
