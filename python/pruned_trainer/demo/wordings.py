"""The wordings of the demo's questions: how each relation is stated and asked, read from wordings.txt.

The file has one block per relation. The block's first line is `relation: kind of entity -> kind of value`;
the kinds are keys of `questions.KINDS`. Then one line per split gives the split's statements (with {e}, the
entity, and {v}, the value) and its questions (with {e}, and a question mark at the end), separated by bars.
An indented line continues the line above it.

No wording appears in two splits: the evaluation asks whether a model reads, not whether it remembers a
phrase. `parse` refuses a table that breaks any of these rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

SPLITS = ("train", "validation", "evaluation")


@dataclass(frozen=True)
class Wordings:
    """How one split states one relation, and how it asks for it."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.statements or not self.questions:
            raise ValueError(f"needs both statements and questions: {self}")
        for text in self.statements + self.questions:
            slots = (text.count("{e}"), text.count("{v}"))
            if slots != ((1, 0) if text.endswith("?") else (1, 1)):
                raise ValueError(f"{{e}} stands {slots[0]} times and {{v}} {slots[1]} times in {text!r}")


@dataclass(frozen=True)
class Relation:
    """A kind of fact, such as a company's founder. wordings: one entry for each split."""

    name: str
    entity_kind: str
    value_kind: str
    wordings: Mapping[str, Wordings]


def parse(table: str) -> tuple[Relation, ...]:
    """The relations of a table in this module's format; ValueError for a wrong or a repeated wording."""
    return tuple(_relation(block) for block in table.strip().split("\n\n"))


def _relation(block: str) -> Relation:
    head, lines = block.split("\n", 1)
    name, kinds = head.split(": ")
    entity_kind, value_kind = kinds.split(" -> ")
    texts_by_split = {}
    for line in lines.replace("\n  ", " ").splitlines():
        split, texts = line.split(": ", 1)
        texts_by_split[split] = texts.split(" | ")
    texts_of_all = [text for texts in texts_by_split.values() for text in texts]
    if tuple(texts_by_split) != SPLITS or len(set(texts_of_all)) != len(texts_of_all):
        raise ValueError(f"relation {name}: splits {tuple(texts_by_split)}, or a wording stands twice")
    wordings = {split: _wordings(texts) for split, texts in texts_by_split.items()}
    return Relation(name, entity_kind, value_kind, wordings)


def _wordings(texts: list[str]) -> Wordings:
    questions = tuple(text for text in texts if text.endswith("?"))
    return Wordings(tuple(text for text in texts if text not in questions), questions)


RELATIONS = parse((files("pruned_trainer.demo") / "wordings.txt").read_text(encoding="utf-8"))
