"""Questions out of files (SQuAD's JSON, or JSON lines), their order of arrival, and SQuAD's scores."""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pruned_ops.files import parse_json, shown
from pruned_ops.qa.windows import windows

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


def read_questions(path: Path) -> list[Question]:
    """The questions of a SQuAD-format JSON file or, where its name ends in .jsonl or .ndjson, of JSON lines.

    A line is an object with a question, a context and, where they are known, answers: a list of texts or of
    SQuAD's objects, or SQuAD's columns. Errors: OSError where there is no file; ValueError that names the
    file, and the line, for any other content.
    """
    if path.suffix.lower() in JSON_LINES:
        questions = [_of_line(line, f"{path}: line {number}") for number, line in _lines(path)]
    else:
        try:
            questions = list(_of_squad(parse_json(path.read_bytes())))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no SQuAD-format JSON (a file of JSON lines is named .jsonl): {error!r}"
            ) from error
    if not questions:
        raise ValueError(f"{path} holds no question")
    return questions


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The number and the bytes of each line that is not empty. A line of bytes ends at \n alone; the lines of
    text would end elsewhere, too."""
    with path.open("rb") as file:
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def _of_squad(parsed: Any) -> Iterator[Question]:
    for article in parsed["data"]:
        for paragraph in article["paragraphs"]:
            for entry in paragraph["qas"]:
                yield _question(entry["question"], paragraph["context"], entry.get("answers"))


def _of_line(line: bytes, where: str) -> Question:
    try:
        record = parse_json(line)
        return _question(record["question"], record["context"], record.get("answers"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is no object with a question and a context: {error!r}") from error


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
) -> list[int]:
    """The lengths in tokens of the windows of a file's questions, in order of arrival.

    needed: how many lengths there are at most (default: all). Errors: `read_questions`'s; ValueError that
    names the file where a question cannot be cut.
    """
    # The order depends on the number of questions alone, and each has a window: the rest need not be cut.
    questions = in_arrival_order(read_questions(path), needed)
    texts, contexts = [one.question for one in questions], [one.context for one in questions]
    try:
        cut = windows(tokenizer, texts, contexts, max_length, stride)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}, its questions counted in arrival order: {error}") from error
    return [len(window) for window in cut][:needed]


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
