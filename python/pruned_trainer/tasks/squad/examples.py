"""Examples of SQuAD 1.1 and 2.0, read from a file, checked and split.

Nothing here needs the `datasets` library.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

OnBadAnswer = Literal["raise", "keep"]
T = TypeVar("T")


class SquadFormatError(ValueError):
    """A file that is not SQuAD; the message names file, article, paragraph and question."""


class GoldAnswer(NamedTuple):
    """An annotator's answer: `context[start : start + len(text)] == text`."""

    text: str
    start: int


@dataclass(frozen=True)
class Example:
    """One question. answers: empty where the question has none."""

    id: str
    title: str
    question: str
    context: str
    answers: tuple[GoldAnswer, ...]
    is_impossible: bool


@dataclass(frozen=True)
class SquadFile:
    """A checked file. parsed: its JSON. examples: in the file's order."""

    path: Path
    parsed: dict[str, Any]
    examples: tuple[Example, ...]


def load_squad(path: str | Path, on_bad_answer: OnBadAnswer = "raise") -> SquadFile:
    """Read a SQuAD 1.1 or 2.0 file, checked as `parse_squad` does; FileNotFoundError where there is none."""
    path = Path(path)
    content = path.read_bytes()
    try:
        parsed = json.loads(content.decode("utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        reason = error if content.strip() else "the file is empty"
        raise SquadFormatError(f"{path}: not JSON: {reason}") from None
    return SquadFile(path, parsed, parse_squad(parsed, str(path), on_bad_answer))


def parse_squad(parsed: Any, name: str = "gold", on_bad_answer: OnBadAnswer = "raise") -> tuple[Example, ...]:
    """The questions of a parsed SQuAD file.

    Without `is_impossible` (SQuAD 1.1) a question is impossible where it has no answer. on_bad_answer:
    "raise" also refuses an answer that is not at its answer_start, or that `is_impossible` contradicts;
    "keep" takes answers as they are, as the official evaluator does.

    Raises SquadFormatError, with `name` and the place in the file, for anything else that is not SQuAD.
    """
    if on_bad_answer not in ("raise", "keep"):
        raise ValueError(f"on_bad_answer is {on_bad_answer!r}; it is 'raise' or 'keep'")
    if not isinstance(parsed, dict):
        raise SquadFormatError(f"{name}: an object with 'data' is needed, not {type(parsed).__name__}")
    return checked_examples(_placed_examples(parsed, name), name, on_bad_answer)


def checked_examples(
    placed: Iterable[tuple[str, Example]], name: str, on_bad_answer: OnBadAnswer = "raise"
) -> tuple[Example, ...]:
    """The examples, in their order, checked as `parse_squad` says.

    placed: (where, example) pairs; errors begin with `where`. name: of the file, for errors.
    """
    examples: dict[str, Example] = {}
    for where, example in placed:
        if example.id in examples:
            raise SquadFormatError(f"{where}: this id appears twice")
        if on_bad_answer == "raise":
            _check_answers(example, where)
        examples[example.id] = example
    if not examples:
        raise SquadFormatError(f"{name}: no questions at all")
    return tuple(examples.values())


def _placed_examples(parsed: dict[str, Any], name: str) -> Iterator[tuple[str, Example]]:
    for a, article in enumerate(get_field(parsed, "data", list, name)):
        title = get_field(article, "title", str, f"{name}: article {a}")
        in_article = f"{name}: article {a} ({title!r})"
        for p, paragraph in enumerate(get_field(article, "paragraphs", list, in_article)):
            in_paragraph = f"{in_article}, paragraph {p}"
            context = get_field(paragraph, "context", str, in_paragraph)
            for q, entry in enumerate(get_field(paragraph, "qas", list, in_paragraph)):
                key = get_field(entry, "id", str, f"{in_paragraph}, question {q}")
                where = f"{in_paragraph}, question {key!r}"
                yield where, read_question(entry, title, context, where)


def read_question(entry: dict[str, Any], title: str, context: str, where: str) -> Example:
    """The example of an entry of "qas"; its answers' places in the context are not checked."""
    key, question = get_field(entry, "id", str, where), get_field(entry, "question", str, where)
    answers = tuple(_answers(entry, where))
    impossible = get_field(entry, "is_impossible", bool, where, default=not answers)
    return Example(key, title, question, context, answers, impossible)


def _answers(entry: dict[str, Any], where: str) -> Iterator[GoldAnswer]:
    for number, answer in enumerate(get_field(entry, "answers", list, where)):
        place = f"{where}, answer {number}"
        yield GoldAnswer(get_field(answer, "text", str, place), get_field(answer, "answer_start", int, place))


def get_field(holder: object, key: str, kind: type[T], where: str, default: T | None = None) -> T:
    """holder[key], which must be of this kind (True is no int); `default`, if given, where it is absent.

    SquadFormatError, with `where`, for anything else.
    """
    if not isinstance(holder, dict):
        raise SquadFormatError(f"{where}: an object is needed, not {type(holder).__name__}")
    if key not in holder and default is not None:
        return default
    if key not in holder:
        raise SquadFormatError(f"{where}: no {key!r}")
    value = holder[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise SquadFormatError(f"{where}: {key!r} has type {type(value).__name__}, not {kind.__name__}")
    return value


def _check_answers(example: Example, where: str) -> None:
    if example.is_impossible == bool(example.answers):
        state = f"'is_impossible' is {str(example.is_impossible).lower()}"
        raise SquadFormatError(f"{where}: {state}, but it has {len(example.answers)} answers")
    for text, start in example.answers:
        if not text.strip():
            raise SquadFormatError(f"{where}: an answer is empty")
        if not 0 <= start < len(example.context):
            size = f"{len(example.context)} characters"
            raise SquadFormatError(f"{where}: answer_start {start} is outside the context of {size}")
        at_start = example.context[start : start + len(text)]
        if at_start != text:
            raise SquadFormatError(f"{where}: answer {text!r} is not at {start}; there stands {at_start!r}")


def split_articles(
    examples: Sequence[Example], fraction: float = 0.05, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """(train, held out): whole articles are held out, with at most `fraction` of the questions.

    Articles are drawn at random, but not those that are too large for what is left of the fraction (some are
    a quarter of a file); where all are too large, the smallest is held out. Articles are distinguished by
    title, so that no paragraph's neighbours are on the other side. A single article is split by paragraphs
    instead. Both sides keep the order of the examples; the same seed draws the same articles. Raises
    ValueError where there is one paragraph only.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}; it must be between 0 and 1")
    groups = [example.title for example in examples]
    if len(set(groups)) < 2:
        groups = [example.context for example in examples]
    sizes = Counter(groups)  # in the order of the examples
    if len(sizes) < 2:
        raise ValueError(f"nothing can be held out of {len(sizes)} paragraphs: pass a validation file")
    names, held, left = list(sizes), set(), fraction * len(examples)
    random.Random(seed).shuffle(names)
    for name in names:
        if sizes[name] <= left:
            held.add(name)
            left -= sizes[name]
    held = held or {min(names, key=lambda name: sizes[name])}
    train = [example for group, example in zip(groups, examples, strict=True) if group not in held]
    return train, [example for group, example in zip(groups, examples, strict=True) if group in held]
