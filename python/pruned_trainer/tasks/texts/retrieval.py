"""Queries, the documents that are searched, and which are relevant to each: rows that say it themselves, or
files of queries and of relevance apart, as BEIR has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from pruned_ops.files import shown
from pruned_trainer.tasks.faults import FormatError, Skipped, get_field, skipping
from pruned_trainer.tasks.options import TaskOptions
from pruned_trainer.tasks.sources import Source, read_rows
from pruned_trainer.tasks.texts.examples import Example, Examples, read_score, some, texts_of, value_of

TEXT, TITLE, RELEVANT = "text", "title", "relevant"
# The columns of a file of relevance.
QUERY_ID, CORPUS_ID, GRADE = "query-id", "corpus-id", "score"
_IDS = ("id", "_id")

T = TypeVar("T")


@dataclass(frozen=True)
class Retrieval:
    """Queries with the documents that are relevant to each, and the documents that are searched.

    relevant: of each query, the numbers of its documents among `documents`, each with how relevant it is."""

    where: str
    queries: tuple[Example, ...]
    relevant: tuple[Mapping[int, float], ...]
    documents: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.queries)

    def split(self, seed: int) -> tuple[Retrieval, Retrieval]:
        """(training, held out), as for `Examples.split`; both search all documents."""
        pairs = zip(self.queries, self.relevant, strict=True)
        rows = Examples(self.where, tuple(replace(query, label=relevant) for query, relevant in pairs))
        train, held_out = (
            replace(self, queries=part.rows, relevant=tuple(row.label for row in part.rows))
            for part in rows.split(seed)
        )
        return train, held_out

    def on_fewer(self, most: int) -> Retrieval:
        """The same queries, searched among the documents that are relevant to any of them and so many evenly
        spread others that there are `most`."""
        answers = set(chain.from_iterable(self.relevant))
        others = [number for number in range(len(self.documents)) if number not in answers]
        room = min(max(most - len(answers), 0), len(others))
        kept = sorted(answers | {others[place * len(others) // room] for place in range(room)})
        place = {number: here for here, number in enumerate(kept)}
        return replace(
            self,
            documents=tuple(self.documents[number] for number in kept),
            relevant=tuple({place[n]: grade for n, grade in grades.items()} for grades in self.relevant),
        )


def read_retrieval(
    source: Path | str, split: str, options: TaskOptions, skipped: Skipped | None = None
) -> Retrieval:
    """The queries of a source, with the documents of options.corpus.

    A row has a query's text and the ids that are relevant to it; or, with options.queries, which holds the
    texts, a query's id, a document's id and a score, 0 or less for a document that is not relevant. skipped:
    collects the faults of bad rows, also of the documents and the queries. Errors: FormatError that names the
    place, also for an id that the other file does not have, and for a query to which no document is relevant.
    """
    assert options.corpus is not None
    numbers, documents = read_corpus(options.corpus, skipped)
    if options.queries is None:
        where, judgements = _with_ids(source, split, options, numbers, skipped)
    else:
        where, judgements = _joined(source, split, options, numbers, skipped)
    if not judgements:
        some(Examples(where, ()), skipped)
    queries = tuple(query for query, _ in judgements)
    return Retrieval(where, queries, tuple(relevant for _, relevant in judgements), documents)


Found = list[tuple[Example, Mapping[int, float]]]


def _with_ids(
    source: Path | str,
    split: str,
    options: TaskOptions,
    numbers: Mapping[str, int],
    skipped: Skipped | None,
) -> tuple[str, Found]:
    """(the source, its queries) of rows that name the documents themselves."""
    text, label = (options.text_columns or (TEXT,))[0], options.label_column or RELEVANT
    rows = read_rows(source, split, {text, label}, skipped)
    rows.require((text, label), "" if label in rows.columns else "; --queries takes files of relevance")
    judgements: Found = []
    for where, row in rows.placed():
        with skipping(skipped):
            ids = [_number(numbers, value, where) for value in get_field(row, label, list, where)]
            if not ids:
                raise FormatError(f"{where}: no document is relevant")
            judgements.append((Example(texts_of(row, (text,), where), where), dict.fromkeys(ids, 1.0)))
    return rows.where, judgements


def _joined(
    source: Path | str,
    split: str,
    options: TaskOptions,
    numbers: Mapping[str, int],
    skipped: Skipped | None,
) -> tuple[str, Found]:
    """(the source, its queries) of rows of relevance, with the texts of options.queries."""
    assert options.queries is not None
    text = (options.text_columns or (TEXT,))[0]
    queries = _by_id(
        read_rows(options.queries, "train", None, skipped),
        text,
        lambda row, where: Example(texts_of(row, (text,), where), where),
        skipped,
    )
    rows = read_rows(source, split, {QUERY_ID, CORPUS_ID, GRADE}, skipped)
    rows.require((QUERY_ID, CORPUS_ID))
    relevant: dict[str, dict[int, float]] = {}
    places: dict[str, str] = {}
    for where, row in rows.placed():
        with skipping(skipped):
            query = str(value_of(row, QUERY_ID, where))
            if query not in queries:
                raise FormatError(f"{where}: query {shown(query)} is not among the queries")
            document = _number(numbers, value_of(row, CORPUS_ID, where), where)
            grade = read_score(row[GRADE], where) if GRADE in row else 1.0
            places.setdefault(query, where)
            if grade > 0:
                relevant.setdefault(query, {})[document] = grade
    for query, where in places.items():
        with skipping(skipped):
            if query not in relevant:
                raise FormatError(f"{where}: no document is relevant to query {shown(query)}")
    return rows.where, [(queries[query], grades) for query, grades in relevant.items()]


def _number(numbers: Mapping[str, int], value: Any, where: str) -> int:
    """The number of the document of this id."""
    if str(value) not in numbers:
        raise FormatError(f"{where}: document {shown(str(value))} is not in the corpus")
    return numbers[str(value)]


def _by_id(
    source: Source, text: str, read: Callable[[Mapping[str, Any], str], T], skipped: Skipped | None
) -> dict[str, T]:
    """What `read` makes of each row and its place, by the rows' ids, which are told apart. text: the column
    of the texts."""
    key = next((name for name in _IDS if name in source.columns), _IDS[0])
    source.require((key, text))
    by_id: dict[str, T] = {}
    for where, row in source.placed():
        with skipping(skipped):
            name = value_of(row, key, where)
            if isinstance(name, bool) or not isinstance(name, str | int) or str(name) in by_id:
                raise FormatError(f"{where}: the id {shown(name)} is none, or appears twice")
            by_id[str(name)] = read(row, where)
    return by_id


def read_corpus(path: Path, skipped: Skipped | None = None) -> tuple[dict[str, int], tuple[str, ...]]:
    """(number of each document by its id, the documents) of a file of rows with an id (or _id), a text, and
    perhaps a title, which stands before the text. skipped: as for `read_retrieval`."""
    documents = _by_id(read_rows(path, "train", None, skipped), TEXT, _document, skipped)
    if not documents:
        some(Examples(str(path), ()), skipped)
    return {name: number for number, name in enumerate(documents)}, tuple(documents.values())


def _document(row: Mapping[str, Any], where: str) -> str:
    """A row's title, where it has one, and its text, which may then be empty; FormatError where both are."""
    document = f"{row.get(TITLE) or ''} {get_field(row, TEXT, str, where)}".strip()
    if not document:
        raise FormatError(f"{where}: {TEXT!r} is empty")
    return document
