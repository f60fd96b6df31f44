"""Examples of SQuAD 1.1 and 2.0, read from a file, checked and split.

Nothing here needs the `datasets` library.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pruned_ops.files import parse_json, shown
from pruned_trainer.tasks.faults import FormatError, Skipped, get_field, skipping

OnBadAnswer = Literal["raise", "keep"]
# An answer that is not at its answer_start is looked for so many characters to both sides.
NEAR = 5
# Blanks that a file may have in the place of another.
_BLANKS = dict.fromkeys(map(ord, "\t\n\r\xa0\u2002\u2003\u2007\u2009\u200a\u202f\u3000"), " ")


SquadFormatError = FormatError


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


Placed = tuple[str, Example]  # an example, and where it stands: its errors begin with that


@dataclass(frozen=True)
class SquadFile:
    """A checked file. parsed: its JSON. examples: in the file's order."""

    path: Path
    parsed: dict[str, Any]
    examples: tuple[Example, ...]


def load_squad(
    path: str | Path,
    on_bad_answer: OnBadAnswer = "raise",
    skipped: Skipped | None = None,
    repaired: list[str] | None = None,
) -> SquadFile:
    """Read a SQuAD 1.1 or 2.0 file, checked as `parse_squad` does; FileNotFoundError where there is none."""
    path = Path(path)
    content = path.read_bytes()
    try:
        parsed = parse_json(content)
    except ValueError as error:
        raise SquadFormatError(f"{path}: not JSON: {error if content else 'the file is empty'}") from None
    return SquadFile(path, parsed, parse_squad(parsed, str(path), on_bad_answer, skipped, repaired))


def parse_squad(
    parsed: Any,
    name: str = "gold",
    on_bad_answer: OnBadAnswer = "raise",
    skipped: Skipped | None = None,
    repaired: list[str] | None = None,
) -> tuple[Example, ...]:
    """The questions of a parsed SQuAD file.

    Without `is_impossible` (SQuAD 1.1) a question is impossible where it has no answer. on_bad_answer:
    "raise" also refuses an answer that is not at its answer_start, or that `is_impossible` contradicts;
    "keep" takes answers as they are, as the official evaluator does. skipped: collects the faults of the
    questions that would be refused, which are left out. repaired: collects the answers that
    `repaired_answer` has put right; without it they are refused.

    Raises SquadFormatError, with `name` and the place in the file, for anything else that is not SQuAD.
    """
    if on_bad_answer not in ("raise", "keep"):
        raise ValueError(f"on_bad_answer is {on_bad_answer!r}; it is 'raise' or 'keep'")
    if not isinstance(parsed, dict):
        raise SquadFormatError(f"{name}: an object with 'data' is needed, not {type(parsed).__name__}")
    placed = _placed_examples(parsed, name, skipped)
    if on_bad_answer == "keep":
        return distinct_examples(placed, name, skipped)
    return checked_examples(placed, name, skipped, repaired)


def checked_examples(
    placed: Iterable[Placed], name: str, skipped: Skipped | None = None, repaired: list[str] | None = None
) -> tuple[Example, ...]:
    """The examples, in their order, checked as `parse_squad` says. name: of the file, for errors."""
    return distinct_examples(_with_right_answers(placed, skipped, repaired), name, skipped)


def _with_right_answers(
    placed: Iterable[Placed], skipped: Skipped | None, repaired: list[str] | None
) -> Iterator[Placed]:
    for where, example in placed:
        with skipping(skipped):
            if repaired is not None:
                example = _repaired(example, where, repaired)
            _check_answers(example, where)
            yield where, example


def distinct_examples(
    placed: Iterable[Placed], name: str, skipped: Skipped | None = None
) -> tuple[Example, ...]:
    """The examples, in their order; an id that comes twice, and none at all, are refused."""
    examples: dict[str, Example] = {}
    for where, example in placed:
        with skipping(skipped):
            if example.id in examples:
                raise SquadFormatError(f"{where}: this id appears twice")
            examples[example.id] = example
    if not examples:
        left_out = f" ({len(skipped)} were skipped; the first: {skipped.faults[0]})" if skipped else ""
        raise SquadFormatError(f"{name}: no questions at all{left_out}")
    return tuple(examples.values())


def _placed_examples(parsed: dict[str, Any], name: str, skipped: Skipped | None) -> Iterator[Placed]:
    for a, article in enumerate(get_field(parsed, "data", list, name)):
        with skipping(skipped):
            title = get_field(article, "title", str, f"{name}: article {a}")
            in_article = f"{name}: article {a} ({shown(title)})"
            for p, paragraph in enumerate(get_field(article, "paragraphs", list, in_article)):
                with skipping(skipped):
                    yield from _of_paragraph(paragraph, title, f"{in_article}, paragraph {p}", skipped)


def _of_paragraph(paragraph: object, title: str, where: str, skipped: Skipped | None) -> Iterator[Placed]:
    context = get_field(paragraph, "context", str, where)
    for q, entry in enumerate(get_field(paragraph, "qas", list, where)):
        with skipping(skipped):
            key = get_field(entry, "id", str, f"{where}, question {q}")
            place = f"{where}, question {shown(key)}"
            yield place, read_question(entry, title, context, place)


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
            raise SquadFormatError(
                f"{where}: answer {shown(text)} is not at {start}; there stands {shown(at_start)}"
            )


def _repaired(example: Example, where: str, repaired: list[str]) -> Example:
    """The example with its answers put right where that is sure; `repaired` gets a sentence for each."""
    answers = []
    for answer in example.answers:
        right = repaired_answer(answer, example.context)
        if right != answer:
            repaired.append(
                f"{where}: answer {shown(answer.text)} at {answer.start} is {shown(right.text)} at "
                f"{right.start}"
            )
        answers.append(right)
    return replace(example, answers=tuple(answers)) if tuple(answers) != example.answers else example


def repaired_answer(answer: GoldAnswer, context: str) -> GoldAnswer:
    """The answer at its place in the context; the same answer where it is there already, or where its place
    is not sure.

    The place is sure where the answer's text, any blank for any other, occurs exactly once within NEAR
    characters of answer_start, or at the place that answer_start means if it counts bytes, UTF-16 units or
    another number of characters a line end, and that as whole words.
    """
    text, start = answer
    if start < 0 or not text.strip() or context[start : start + len(text)] == text:
        return answer
    plain, sought = context.translate(_BLANKS), text.translate(_BLANKS)
    places = {at for at in range(max(0, start - NEAR), start + NEAR + 1) if plain.startswith(sought, at)}
    places |= {at for at in _recounted(context, start) if plain.startswith(sought, at)}
    if len(places) != 1:
        return answer
    (at,) = places
    end = at + len(text)
    cuts = (context[at - 1 : at] + text[0]).isalnum() and at > 0
    cuts = cuts or (end < len(context) and (text[-1] + context[end]).isalnum())
    return answer if cuts else GoldAnswer(context[at:end], at)


def _recounted(context: str, start: int) -> Iterator[int]:
    """The characters that `start` may stand for where it counts something else: bytes, UTF-16 units, two
    characters for a line end that is one here, or one for a line end that is two."""
    for encoding, size in (("utf-8", 1), ("utf-16-le", 2)):
        yield len(context.encode(encoding, "replace")[: size * start].decode(encoding, "ignore"))
    if "\r" not in context:
        yield len(context.replace("\n", "\r\n")[:start].replace("\r\n", "\n"))
    yield len(context.replace("\r\n", "\n")[:start].replace("\n", "\r\n"))


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
    names, held, room = list(sizes), set(), fraction * len(examples)
    random.Random(seed).shuffle(names)
    for name in names:
        if sizes[name] <= room:
            held.add(name)
            room -= sizes[name]
    held = held or {min(names, key=lambda name: sizes[name])}
    train = [example for group, example in zip(groups, examples, strict=True) if group not in held]
    return train, [example for group, example in zip(groups, examples, strict=True) if group in held]
