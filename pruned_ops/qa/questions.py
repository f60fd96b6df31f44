"""Questions out of a user's file, for whoever measures on them: SQuAD's JSON, or JSON lines."""

from __future__ import annotations

import json
import random
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruned_ops.qa.windows import windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Question:
    """A question and the text it is asked of. answers: the right ones, none where there is no answer; None
    where the file does not say."""

    question: str
    context: str
    answers: tuple[str, ...] | None = None


def read_questions(path: Path) -> list[Question]:
    """The questions of a SQuAD-format JSON file or, by its name (.jsonl, .ndjson), of JSON lines with
    question, context and, where they are known, answers: texts, SQuAD's objects, or SQuAD's columns.

    Errors: OSError where there is no file; ValueError that names it, and the line, for anything else.
    """
    if path.suffix.lower() in JSON_LINES:
        found = [_of_line(line, f"{path}: line {n}") for n, line in _lines(path)]
    else:
        try:
            found = list(_of_squad(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path} is no SQuAD-format JSON (a file of JSON lines is named .jsonl): {error!r}"
            ) from error
    if not found:
        raise ValueError(f"{path} holds no question")
    return found


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:  # as bytes, whose lines end at \n only: text may hold other line ends
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def _of_squad(parsed: Any) -> Iterator[Question]:
    for article in parsed["data"]:
        for paragraph in article["paragraphs"]:
            for entry in paragraph["qas"]:
                yield _question(entry["question"], paragraph["context"], entry.get("answers"))


def _of_line(line: bytes, where: str) -> Question:
    try:
        record = json.loads(line.decode("utf-8-sig"))
        return _question(record["question"], record["context"], record.get("answers"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where} is no object with a question and a context: {error!r}") from error


def _question(question: Any, context: Any, answers: Any) -> Question:
    if not isinstance(question, str) or not isinstance(context, str):
        raise ValueError("questions and contexts are needed")
    if isinstance(answers, dict):
        answers = answers["text"]
    if answers is None:
        return Question(question, context)
    texts = tuple(one["text"] if isinstance(one, dict) else one for one in answers)
    if isinstance(answers, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"answers are {answers!r}; a list of texts is needed")
    return Question(question, context, texts)


def in_arrival_order(questions: list[Question], needed: int | None = None) -> list[Question]:
    """Shuffled as `arrival_lengths` does it; so many of them at most."""
    return [questions[i] for i in arrival_lengths([[i] for i in range(len(questions))])[:needed]]


def window_lengths(
    path: Path,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int = 384,
    stride: int = 128,
    needed: int | None = None,
) -> list[int]:
    """Lengths in tokens of the windows of a file's questions, in arrival order.

    needed: so many of them at most (default: all). Errors: `read_questions`'s; ValueError that names the file
    where a question cannot be cut.
    """
    # Where a question comes depends on nothing but their number: so those beyond `needed` need not be cut.
    asked = in_arrival_order(read_questions(path), needed)
    questions, contexts = [one.question for one in asked], [one.context for one in asked]
    try:
        cut = windows(tokenizer, questions, contexts, max_length, stride)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}, its questions counted in arrival order: {error}") from error
    return [len(window) for window in cut][:needed]


def arrival_lengths(lengths_by_question: Sequence[Sequence[int]]) -> list[int]:
    """Window lengths with the questions shuffled (seed 0): the order in which users' questions would
    arrive."""
    questions = list(lengths_by_question)
    random.Random(0).shuffle(questions)
    return [length for windows in questions for length in windows]


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised_answer(text: str) -> str:
    """Lower case, without punctuation, without the articles a, an, the, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def answer_scores(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """(exact, F1) in percent, each the best over the answers; without answers, "" is the right one."""
    gold = [text for text in map(normalised_answer, answers) if text] or [""]
    predicted = normalised_answer(prediction)
    f1 = max(_token_f1(predicted.split(), text.split()) for text in gold)
    return 100.0 * (predicted in gold), 100.0 * f1


def _token_f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    same = (Counter(predicted) & Counter(gold)).total()
    if not same:
        return 0.0
    precision, recall = same / len(predicted), same / len(gold)
    return 2 * precision * recall / (precision + recall)
