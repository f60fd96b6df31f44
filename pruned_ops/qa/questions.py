"""Questions out of files (SQuAD's JSON, or JSON lines), their order of arrival, and SQuAD's scores."""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pruned_ops.files import parse_json, shown
from pruned_ops.qa.windows import RefusedQuestion, windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")

JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Question:
    """A question and the text it is asked of. answers: the right answers, empty where the text has none; None
    where they are not known."""

    question: str
    context: str
    answers: tuple[str, ...] | None = None


def read_questions(path: Path, skipped: list[str] | None = None) -> list[Question]:
    """The questions of a SQuAD-format JSON file or, where its name ends in .jsonl or .ndjson, of JSON lines.

    A line is an object with a question, a context and, where they are known, answers: a list of texts or of
    SQuAD's objects, or SQuAD's columns. skipped: collects what is wrong with each line or question that
    cannot be read, which is then left out. Errors: OSError where there is no file; ValueError that names the
    file, and the line, for any other content.
    """
    if path.suffix.lower() in JSON_LINES:
        entries = _of_lines(path, skipped)
    else:
        entries = _of_squad(path, skipped)
    questions = [question for question in entries if question is not None]
    if not questions:
        raise ValueError(f"{path} holds no question{' that can be asked' if skipped else ''}")
    return questions


def _of_lines(path: Path, skipped: list[str] | None) -> Iterator[Question | None]:
    for number, line in _lines(path):
        where = f"{path}: line {number} is no object with a question and a context"
        yield _read(where, skipped, partial(_of_line, line))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The number and the bytes of each line that is not empty. A line of bytes ends at \n alone; the lines of
    text would end elsewhere, too."""
    with path.open("rb") as file:
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def _of_squad(path: Path, skipped: list[str] | None) -> Iterator[Question | None]:
    refusal = f"{path} is no SQuAD-format JSON (a file of JSON lines is named .jsonl)"
    entries: list[tuple[str, Any]] = _read(refusal, None, lambda: list(_squad_entries(path))) or []
    for where, record in entries:
        yield _read(f"{refusal}: {where}", skipped, partial(_of_record, record))


def _squad_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Each entry of a SQuAD file with its place, as a record that holds its context, too."""
    for a, article in enumerate(parse_json(path.read_bytes())["data"]):
        for p, paragraph in enumerate(article["paragraphs"]):
            for q, entry in enumerate(paragraph["qas"]):
                record = {**entry, "context": paragraph["context"]} if isinstance(entry, dict) else entry
                yield f"data[{a}].paragraphs[{p}].qas[{q}]", record


def _read(where: str, skipped: list[str] | None, read: Callable[[], T]) -> T | None:
    """Return what `read` returns. Where it fails, ValueError says `where`, or, if bad entries are skipped,
    None is returned and the reason is kept."""
    try:
        return read()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{where}: {error!r}"
        if skipped is None:
            raise ValueError(reason) from error
        skipped.append(reason)
        return None


def _of_line(line: bytes) -> Question:
    return _of_record(parse_json(line))


def _of_record(record: Any) -> Question:
    return _question(record["question"], record["context"], record.get("answers"))


def _question(question: Any, context: Any, answers: Any) -> Question:
    """The question of these parsed values; an error of any kind for values that are none."""
    if not isinstance(question, str) or not isinstance(context, str):
        raise ValueError("questions and contexts are needed")
    if isinstance(answers, dict):
        answers = answers["text"]
    if answers is None:
        return Question(question, context)
    texts = tuple(answer["text"] if isinstance(answer, dict) else answer for answer in answers)
    if isinstance(answers, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"answers are {shown(answers)}; a list of texts is needed")
    return Question(question, context, texts)


def in_arrival_order(questions: Sequence[T], needed: int | None = None) -> list[T]:
    """The questions shuffled (seed 0), as users' questions would arrive; at most `needed` of them."""
    shuffled = list(questions)
    random.Random(0).shuffle(shuffled)
    return shuffled[:needed]


def window_lengths(
    path: Path,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int = 384,
    stride: int = 128,
    needed: int | None = None,
    skipped: list[str] | None = None,
) -> list[int]:
    """The lengths in tokens of the windows of a file's questions, in order of arrival.

    needed: how many lengths there are at most (default: all). skipped: collects the faults of questions that
    cannot be read or cut, which are left out. Errors: `read_questions`'s; ValueError that names the file
    where a question cannot be cut.
    """
    # The order depends on the number of questions alone, and each has a window, but for those that are left
    # out: the rest need not be cut.
    questions = in_arrival_order(read_questions(path, skipped))
    where = f"{path}, its questions counted in arrival order"
    lengths: list[int] = []
    step = needed or len(questions)
    for first in range(0, len(questions), step):
        chunk, refused = questions[first : first + step], list[RefusedQuestion]()
        texts, contexts = [question.question for question in chunk], [question.context for question in chunk]
        try:
            cut = windows(tokenizer, texts, contexts, max_length, stride, refused=refused)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error
        faults = [f"{where}: question {first + error.index} {error.reason}" for error in refused]
        if skipped is not None:
            skipped += faults
        elif faults:
            raise ValueError(faults[0])
        lengths += [len(window) for window in cut]
        if needed is not None and len(lengths) >= needed:
            break
    if not lengths:
        raise ValueError(f"{path} holds no question that can be asked")
    return lengths[:needed]


def arrival_lengths(lengths_by_question: Sequence[Sequence[int]]) -> list[int]:
    """The window lengths of all questions, the questions in the order of `in_arrival_order`."""
    return [length for lengths in in_arrival_order(lengths_by_question) for length in lengths]


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised_answer(text: str) -> str:
    """The text in lower case, without punctuation and the articles a, an, the, with single spaces: SQuAD's
    official evaluator compares such texts."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def answer_scores(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1) in percent, each the best over the answers; without answers, "" is the right one."""
    gold = [text for text in map(normalised_answer, answers) if text] or [""]
    predicted = normalised_answer(prediction)
    f1 = max(_token_f1(predicted.split(), text.split()) for text in gold)
    return 100.0 * (predicted in gold), 100.0 * f1


def _token_f1(predicted: list[str], gold: list[str]) -> float:
    """The F1 of two lists of words, as bags."""
    if not predicted or not gold:
        return float(predicted == gold)
    same = (Counter(predicted) & Counter(gold)).total()
    if not same:
        return 0.0
    precision, recall = same / len(predicted), same / len(gold)
    return 2 * precision * recall / (precision + recall)
