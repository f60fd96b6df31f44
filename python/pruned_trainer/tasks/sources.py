"""Rows of any source: JSON lines, CSV, Parquet and Arrow files, folders, the Hugging Face hub.

`datasets` is imported only where a folder or the hub is read, and pyarrow (which comes with it) only where a
.parquet or .arrow file is; .jsonl, .json and .csv need neither. JSON lines and CSV may be compressed (.gz).
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

from pruned_ops.files import parse_json, shown
from pruned_trainer.tasks.faults import FormatError, Skipped, skipping

JSON_LINES = (".jsonl", ".ndjson")
ARROW = (".parquet", ".arrow")
SEPARATED = {".csv": ",", ".tsv": "\t"}
READ = (*JSON_LINES, ".json", *SEPARATED, *ARROW)

# OWNER/NAME. A single word is not taken as a hub name: it is more often a mistyped path, and `datasets` takes
# some words ("json", "text") for its own readers.
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SPLIT = re.compile(r"\w+(\.\w+)*")

Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Source:
    """The rows of a file or of a split.

    where: what errors begin with. columns: in the order of the source; of rows without fixed columns (JSON
    lines), all that occur. names: the class names that the source itself gives to a column's whole numbers.
    numbers: of the rows, where some of the source's may be left out.
    """

    where: str
    columns: tuple[str, ...]
    rows: Rows
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    numbers: Iterable[int] | None = None

    @classmethod
    def of(cls, path: Path, rows: Mapping[int, Mapping[str, Any]], columns: Iterable[str] = ()) -> Source:
        """A file's rows, by their numbers. columns: all that occur, by default."""
        names = dict.fromkeys(columns or (key for row in rows.values() for key in row))
        return cls(str(path), tuple(names), list(rows.values()), numbers=list(rows))

    def require(self, columns: Iterable[str], hint: str = "") -> None:
        """FormatError that names the columns that are missing, and those that there are."""
        missing = [repr(column) for column in columns if column not in self.columns]
        if missing and self.columns:
            listed = ", ".join(map(repr, self.columns))
            raise FormatError(f"{self.where}: no column {', '.join(missing)}; there are {listed}{hint}")

    def placed(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The rows, each with its place for errors; rows count from 0."""
        numbers = count() if self.numbers is None else self.numbers
        for number, row in zip(numbers, self.rows, strict=False):  # counting has no end
            yield f"{self.where}, row {number}", row


def suffix_of(source: str | Path) -> str:
    """The ending of a file's name in lower case, without that of its compression."""
    path = Path(source)
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def find(source: str | Path) -> tuple[str, str | None]:
    """Split NAME:SPLIT, where the whole is no file or folder, at the last colon behind one, else at the first
    colon; the split may be None.

    Errors: ValueError for what cannot be a split."""
    name, split = str(source), None
    if not Path(name).exists() and ":" in name:
        places = [place for place, letter in enumerate(name) if letter == ":"]
        at = next((place for place in reversed(places) if Path(name[:place]).exists()), places[0])
        name, split = name[:at], name[at + 1 :]
        if not _SPLIT.fullmatch(split):
            raise ValueError(f"{source}: no such file, and {split!r} is no split: one name, such as train")
    return name, split


def read_rows(
    source: str | Path,
    default_split: str,
    columns: Collection[str] | None = None,
    skipped: Skipped | None = None,
) -> Source:
    """The rows of a file, a folder or a data set of the hub.

    source: a file with one of the endings READ; a folder that `Dataset.save_to_disk` or
    `DatasetDict.save_to_disk` wrote, or that has the hub's layout; else a hub name. Folders and hub names may
    end in ":split"; default_split serves where they do not and there are splits. What comes from the hub
    stays in the cache of `datasets`. columns: those that are decoded where a source has fixed ones; all
    by default. skipped: collects the faults of lines that cannot be read; they are refused without it.

    Errors name the source, the split and the line: FileNotFoundError where there is no such file, OSError
    where the hub does not answer or does not know the name, ValueError for an unknown split or a missing
    library, FormatError (a ValueError) for a file that is not what its ending says.
    """
    name, split = find(source)
    path = Path(name)
    if path.is_dir():
        return _read_folder(path, split, default_split, columns)
    if path.exists():
        if split is not None:
            raise ValueError(f"{path} is a file and has no splits: leave ':{split}' away")
        return _read_file(path, columns, skipped)
    return _read_hub(name, split or default_split, columns)


def _read_file(path: Path, columns: Collection[str] | None, skipped: Skipped | None) -> Source:
    suffix = suffix_of(path)
    if suffix in ARROW and path.suffix.lower() != ".gz":
        table = _arrow_table(path, suffix)
        _check_once(path, table.column_names)
        chosen = table.select([name for name in table.column_names if columns is None or name in columns])
        rows_of_batches = (row for batch in chosen.to_batches() for row in batch.to_pylist())
        return Source(str(path), tuple(table.column_names), rows_of_batches)
    if suffix in SEPARATED:
        return _separated(path, SEPARATED[suffix], skipped)
    if suffix in JSON_LINES:
        rows = _json_lines(path, skipped)
    elif suffix == ".json":
        rows = _json_rows(path, skipped)
    else:
        raise FormatError(f"{path}: rows are read from {', '.join(READ)}, not from {suffix or 'such a file'}")
    return Source.of(path, rows)


def _open(path: Path) -> Any:
    """The file's bytes, decompressed where its name ends in .gz."""
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _json_lines(path: Path, skipped: Skipped | None) -> dict[int, dict[str, Any]]:
    """The object of each line, by its number from 0."""
    rows = {}
    try:
        with _open(path) as file:  # as bytes, whose lines end at \n only: a text may hold other line ends
            for number, line in enumerate(file):
                with skipping(skipped):
                    rows[number] = _parse_line(line, f"{path}: line {number + 1}")
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise FormatError(f"{path}: not .gz: {error}") from None
    return rows


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = parse_json(line, unique=True)
    except ValueError as error:
        raise FormatError(f"{where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise FormatError(f"{where}: an object is needed, not {type(row).__name__}")
    return row


def _json_rows(path: Path, skipped: Skipped | None) -> dict[int, dict[str, Any]]:
    """The objects in a .json file's list, by their numbers from 0."""
    try:
        with _open(path) as file:
            rows = parse_json(file.read(), unique=True)
    except (ValueError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise FormatError(f"{path} is no JSON: {error}") from None
    if not isinstance(rows, list):
        kind = type(rows).__name__
        raise FormatError(f"{path}: a list of objects, one for each row, is needed; it holds one {kind}")
    objects = {}
    for number, row in enumerate(rows):
        with skipping(skipped):
            if not isinstance(row, dict):
                raise FormatError(f"{path}, row {number}: an object is needed, not {type(row).__name__}")
            objects[number] = row
    return objects


def _separated(path: Path, separator: str, skipped: Skipped | None) -> Source:
    """A .csv or .tsv file, whose first line names the columns; every value is a text."""
    try:
        with _open(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            reader = csv.reader(text, delimiter=separator, strict=True)
            with _long_fields():
                columns, *lines = [row for row in reader if row] or [[]]
    except (csv.Error, UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise FormatError(f"{path}: not {suffix_of(path)} in UTF-8: {error}") from None
    _check_once(path, columns)
    rows = {}
    for number, line in enumerate(lines):
        with skipping(skipped):
            if len(line) != len(columns):
                listed = ", ".join(map(shown, columns[:8]))
                named = f"{len(columns)} in the first line ({listed}), separated by {separator!r}"
                raise FormatError(f"{path}, row {number}: {len(line)} values, and {named}")
            rows[number] = dict(zip(columns, line, strict=True))
    return Source.of(path, rows, columns)


def _check_once(path: Path, columns: Sequence[str]) -> None:
    """FormatError where two columns have one name, of which a row would keep the last."""
    repeated = [repr(name) for name, times in Counter(columns).items() if times > 1]
    if repeated:
        raise FormatError(f"{path}: there are several columns {', '.join(repeated)}: give each its own name")


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let csv read texts of any length inside the block; by itself it stops at 131,072 characters."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


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
            raise FormatError(f"{path}: not {suffix}: {_reason(error)}") from None
    return table


def _read_folder(
    path: Path, split: str | None, default_split: str, columns: Collection[str] | None
) -> Source:
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
            raise FormatError(f"{path}: not a folder that `datasets` can read: {_reason(error)}") from None
        if isinstance(loaded, Mapping):
            source = _read_split(loaded, str(path), split or default_split, columns)
            return Source(source.where, source.columns, list(source.rows), source.names)
        if split is not None and str(loaded.split) != split:
            own_split = f"it is {loaded.split!s}" if loaded.split else "it has none"
            raise ValueError(f"{path}: no split {split!r}: {own_split}")
        source = _of_dataset(str(path), loaded, columns)
        # The rows are read before the folder of the cache goes.
        return Source(source.where, source.columns, list(source.rows), source.names)


def _read_hub(name: str, split: str, columns: Collection[str] | None) -> Source:
    if not _HUB_NAME.fullmatch(name) or name.startswith(".") or suffix_of(name) in READ:
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
    return _read_split(loaded, name, split, columns)


def _read_split(splits: Mapping[str, Any], name: str, split: str, columns: Collection[str] | None) -> Source:
    if split not in splits:
        choice = f"choose with {name}:{next(iter(splits), 'train')}"
        raise ValueError(f"{name}: no split {split!r}; there are {', '.join(splits) or 'none'} ({choice})")
    return _of_dataset(f"{name}, split {split!r}", splits[split], columns)


def _of_dataset(where: str, dataset: Any, columns: Collection[str] | None) -> Source:
    try:
        dataset.data.validate(full=True)  # as in `_arrow_table`: such files are mapped into memory unchecked
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise FormatError(f"{where}: not a data set: {_reason(error)}") from None
    decoded = [column for column in dataset.column_names if columns is None or column in columns]
    # Only these columns are decoded; a saved data set may remember a format that turns lists into tensors.
    rows = dataset.with_format(None).select_columns(decoded)
    names = {column: _class_names(dataset.features[column]) for column in decoded}
    known = {column: classes for column, classes in names.items() if classes}
    return Source(where, tuple(dataset.column_names), rows, known)


def _class_names(feature: Any) -> Sequence[str]:
    """The names of a ClassLabel, or of a list of them; none for any other column."""
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else feature)
    return tuple(getattr(inner, "names", None) or ())


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
