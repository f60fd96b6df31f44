"""Natural Questions windows to train on, on disk as Arrow: made by several processes, read one by one."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pruned_trainer.tasks.natural_questions.documents import Document, Skipped, read_documents
from pruned_trainer.tasks.natural_questions.files import NqFormatError
from pruned_trainer.tasks.natural_questions.windows import cut, features

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ArrowWindows(Sequence[dict[str, Any]]):
    """Training windows in a temporary folder, which goes when this object does. lengths: tokens of each."""

    def __init__(self, folder: tempfile.TemporaryDirectory[str], table: Any, skipped: Skipped) -> None:
        self._folder, self._table, self.skipped = folder, table, skipped
        self.lengths: list[int] = table.with_format("numpy")["length"][:].tolist() if len(table) else []
        self._rows = table.with_format("numpy").remove_columns("length")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: Any) -> Any:
        """The window, as `natural_questions_features.features` gave it."""
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        row = self._rows[int(number) % len(self)]
        scalars = {name: int(row[name]) for name in ("start_positions", "end_positions", "answer_types")}
        ids = {name: np.asarray(row[name], np.int32) for name in ("input_ids", "token_type_ids")}
        return {**ids, "attention_mask": np.ones_like(ids["input_ids"]), **scalars}


def training_windows(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int = 384,
    stride: int = 128,
    null_rate: float = 1.0,
    seed: int = 0,
    num_proc: int = 1,
    skip_bad: bool = False,
    held_out: float = 0.0,
) -> ArrowWindows:
    """Read, tokenise and cut the documents of these files, and keep the windows on disk (under TMPDIR).

    num_proc: processes, which share a file's lines where there are fewer files; their number changes the
    windows' order, not which they are. skip_bad: bad lines are left out and counted, else they are an
    NqFormatError; an id that comes twice is a fault only where one process meets it twice in a file.
    held_out: the share of documents that `is_held_out` takes away.
    """
    folder = tempfile.TemporaryDirectory(prefix="natural-questions-", ignore_cleanup_errors=True)
    make = partial(
        _windows, tokenizer=tokenizer, max_length=max_length, stride=stride, null_rate=null_rate, seed=seed,
        held_out=held_out, skip_bad=skip_bad, folder=folder.name,
    )  # fmt: skip
    shares = -(-num_proc // len(files))
    parts = [(str(path), k, shares) for path in files for k in range(shares)]
    try:
        table = _table(make, parts, num_proc, folder.name)
    except BaseException:
        folder.cleanup()
        raise
    skipped = Skipped(_notes(folder.name, "fault"))
    if not len(table):
        raise NqFormatError(f"{files[0]}: no windows to train on ({len(skipped)} lines were skipped)")
    return ArrowWindows(folder, table, skipped)


def _table(
    make: Callable[..., Iterator[dict[str, Any]]],
    parts: list[tuple[str, int, int]],
    num_proc: int,
    folder: str,
) -> Any:
    """The datasets.Dataset of `make`'s rows, in `folder`."""
    import datasets  # only here: readers and metric do without

    ids, number = datasets.List(datasets.Value("int32")), datasets.Value("int32")
    columns = {
        "input_ids": ids, "token_type_ids": ids, "start_positions": number, "end_positions": number,
        "answer_types": number, "length": number,
    }  # fmt: skip
    try:
        return datasets.Dataset.from_generator(
            make,
            features=datasets.Features(columns),
            gen_kwargs={"parts": parts},
            num_proc=num_proc if num_proc > 1 else None,
            cache_dir=folder,
            fingerprint="windows",  # the folder is new: there is nothing to tell apart
        )
    except datasets.exceptions.DatasetGenerationError:
        # What went wrong in another process comes without its own error.
        for text in _notes(folder, "error"):
            raise NqFormatError(text) from None
        raise


def _windows(
    parts: Sequence[tuple[str, int, int]],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    stride: int,
    null_rate: float,
    seed: int,
    held_out: float,
    skip_bad: bool,
    folder: str,
) -> Iterator[dict[str, Any]]:
    """Rows of the table. parts: (file, k, n), every n-th line of a file, from the k-th. What is wrong is
    written to files in `folder`: that is all that processes have in common."""
    skipped = Skipped() if skip_bad else None
    try:
        for path, share, shares in parts:
            for document in read_documents([Path(path)], skipped, (share, shares)):
                if is_held_out(document, held_out, seed):
                    continue
                for one in features(document, *cut(document, tokenizer, max_length, stride), null_rate, seed):
                    del one["attention_mask"]  # all ones
                    yield {**one, "length": len(one["input_ids"])}
    except (ValueError, OSError) as error:
        _note(folder, "error", [str(error)])
        raise
    if skipped:
        _note(folder, "fault", skipped.faults)


def _note(folder: str, kind: str, texts: list[str]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=f".{kind}", delete=False) as file:
        json.dump(texts, file)


def _notes(folder: str, kind: str) -> list[str]:
    found = sorted(Path(folder).glob(f"*.{kind}"))
    return [text for file in found for text in json.loads(file.read_text())]


def is_held_out(document: Document, fraction: float, seed: int) -> bool:
    """Whether a training document serves as a validation document: a draw that depends on seed and example
    id."""
    return random.Random(f"held out {seed} {document.id}").random() < fraction
