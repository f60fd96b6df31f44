"""The demo's question-answering set, in SQuAD 2.0's JSON layout, generated from our own words: no download.

A paragraph tells three relations (say founder, product, staff) of three entities of one kind (say
companies), but each relation of two of them only. So every relation is stated exactly twice, every entity
has exactly two facts, and neither a count nor the type of an answer reveals which answer is right, or whether
there is one. Asked about an entity that has it, a relation has one right answer and one wrong answer of the
same type; asked about the third entity, it has two wrong answers and no right one. One of a paragraph's three
questions is unanswerable, and so is a third of the set.

The splits share nothing that could be learned by heart: every word that names are made of, every number and
every common noun used as an answer belongs to one split (`owner`), and so does every wording
(`wordings.RELATIONS`). `check_disjoint` reads a finished set back and verifies this. The validation set has
wordings of its own, too: it serves to choose the null threshold, which is another for wordings that a model
has not seen than for those it was trained on.
"""

from __future__ import annotations

import functools
import json
import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruned_ops.shape import checked_int
from pruned_trainer.demo.wordings import RELATIONS, SPLITS, Relation

VERSION = "pruned_ops demo 1"
GROUP = 3  # the number of entities, of relations and of questions in a paragraph: one missing fact each

_HEADS = tuple(
    onset + vowel + coda
    for onset in "B Br Ch Cl D F G Gr H K L M N P R S St T Th".split()
    for vowel in "a e i o u".split()
    for coda in "l ll lm n nd r rk rl st".split()
)


def _compounds(tails: str) -> tuple[str, ...]:
    return tuple(head + tail for head in _HEADS for tail in tails.split())


# The words that names and answers are made of.
PARTS: dict[str, tuple[str, ...]] = {
    "given": tuple(
        """
        Ada Agnes Albert Alma Anton Arthur Astrid Bella Boris Bruno Carla Cecil Celia Clara Conrad
        Cora Dora Doris Edgar Edith Edmund Ella Elsa Emil Erik Ernest Esther Eva Felix Flora Frank
        Freda George Greta Gustav Hannah Harold Hector Helen Henry Hugo Ida Ingrid Irene Isaac Ivan
        Jacob Jane Joan Josef Julia Karen Karl Laura Leo Lena Louis Lucy Mabel Magnus Maria Martha
        Martin Max Mina Nina Nora Olga Oscar Otto Paul Peter Philip Ralph Robert Rosa Ruth Sara
        Simon Sonia Stella Theo Thomas Vera Victor Walter Wanda
        """.split()
    ),
    "family": _compounds("by ell er ini kov man ov ski son"),
    "town": _compounds("bury ford ham haven mouth stead ton wick"),
    "river": _compounds("a ara en ia ow une"),
    "year": tuple(str(year) for year in range(1790, 2000)),
    "number": tuple(str(number) for number in range(21, 990)),
    "quality": tuple(
        """
        Ancient Bitter Blue Broken Burning Cold Crooked Dark Distant Empty Endless Fallen Final
        Frozen Gentle Golden Green Hidden Hollow Last Lonely Long Lost Narrow Painted Quiet Red
        Sacred Second Secret Silent Silver Sleeping Strange Stolen Sunken Sweet White Wild Winter
        """.split()
    ),
    "thing": tuple(
        """
        Anchor Bell Candle Castle Clock Crown Desert Door Dream Fire Forest Garden Ghost Harbour
        Harvest House Island Journey Kingdom Lake Letter Lion Mirror Moon Mountain Night Orchard
        Palace Promise Queen Raven Rose Shadow Ship Song Star Storm Stranger Tower Voyage Wind
        Window Wolf
        """.split()
    ),
    "profession": tuple(
        """
        baker banker barber butcher carpenter chemist cook dancer dentist diver doctor driver farmer
        fisherman gardener geologist hunter jeweller judge lawyer librarian mason mechanic miner
        musician nurse painter pilot plumber poet potter priest sailor sculptor singer soldier
        surgeon tailor teacher translator watchmaker weaver
        """.split()
    ),
    "product": tuple(
        """
        baskets beds bells bicycles blankets boats boots bottles bricks brushes buttons cameras
        candles carpets chairs clocks coats cups curtains dolls drums engines furniture glasses
        gloves guitars hats helmets kettles keys knives ladders lamps locks mirrors nails needles
        pens pianos pipes plates pots ropes saddles scissors shirts shoes soap spoons stoves tables
        tents tiles tools toys tractors umbrellas violins wagons watches wheels windows
        """.split()
    ),
    "material": tuple(
        """
        aluminium bamboo basalt brass brick bronze cedar chalk clay concrete copper flint glass
        granite gravel iron limestone marble oak pine plastic sandstone slate steel stone teak
        timber titanium
        """.split()
    ),
    "fuel": tuple(
        """
        alcohol biogas charcoal coal coke diesel electricity ethanol gas hydrogen kerosene methane
        oil paraffin peat petrol sawdust steam straw sunlight water wind wood
        """.split()
    ),
}
# The ways to write each kind of entity or value. Words outside braces may stand in every split.
KINDS: dict[str, tuple[str, ...]] = {
    "person": ("{given} {family}",),
    "company": tuple("{family} " + word for word in ("Works", "Brothers", "Industries", "Partners", "Mills")),
    "novel": ("The {quality} {thing}",),
    "bridge": tuple("{town} " + word for word in ("Bridge", "Viaduct", "Footbridge", "Crossing")),
    "machine": tuple("{family} " + word for word in ("engine", "pump", "press", "loom", "boiler", "saw")),
}
KINDS |= {part: (f"{{{part}}}",) for part in PARTS}  # values that are one word: a town, a year, a fuel

_ENTITY_KINDS = sorted({relation.entity_kind for relation in RELATIONS})
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class DemoSet:
    """Three parsed SQuAD 2.0 files: version and data[title, paragraphs[context, qas[...]]]."""

    train: dict[str, Any]
    validation: dict[str, Any]
    evaluation: dict[str, Any]


@dataclass(frozen=True)
class Fact:
    """What a sentence states or a question asks. value: "" in a question. split: whose wording it is."""

    relation: str
    entity: str
    value: str
    split: str


def owner(word: str) -> str:
    """The split that may use a word in names and answers; the splits own 60, 15 and 25% of all words."""
    share = zlib.crc32(word.encode()) % 20
    return "train" if share < 12 else "validation" if share < 15 else "evaluation"


@functools.cache
def words_of(part: str, split: str) -> tuple[str, ...]:
    """The words of a part that a split owns, each once, in the order of PARTS."""
    return tuple(dict.fromkeys(word for word in PARTS[part] if owner(word) == split))


def _name(kind: str, split: str, rng: random.Random, taken: set[str]) -> str:
    """A name that shares no word with `taken`, which gets its words: an answer appears once in a context."""
    while True:
        form = rng.choice(KINDS[kind])
        words = {part: rng.choice(words_of(part, split)) for part in _SLOT.findall(form)}
        if not any(a in b or b in a for a in words.values() for b in taken):
            taken.update(words.values())
            return form.format(**words)


def _paragraph(split: str, rng: random.Random, first_id: int) -> dict[str, Any]:
    """A context and its questions. Relation i is stated of every entity but the i-th, which has no answer."""
    kind = rng.choice(_ENTITY_KINDS)
    relations = rng.sample([relation for relation in RELATIONS if relation.entity_kind == kind], GROUP)
    taken: set[str] = set()
    entities = [_name(kind, split, rng, taken) for _ in range(GROUP)]
    pairs = [(i, j) for i in range(GROUP) for j in range(GROUP) if i != j]
    rng.shuffle(pairs)
    context, answers = "", {}
    for i, j in pairs:
        statement = rng.choice(relations[i].wordings[split].statements).replace("{e}", entities[j])
        before, after = statement.split("{v}")
        value = _name(relations[i].value_kind, split, rng, taken)
        context += (" " if context else "") + before
        answers[i, j] = {"text": value, "answer_start": len(context)}
        context += value + after
    unanswerable = rng.randrange(GROUP)
    qas = []
    for i, relation in enumerate(relations):
        j = i if i == unanswerable else rng.choice([j for j in range(GROUP) if j != i])
        question = rng.choice(relation.wordings[split].questions).replace("{e}", entities[j])
        qa = {"id": f"{split}-{first_id + i:05d}", "question": question, "is_impossible": i == j}
        qa["answers"] = [] if i == j else [answers[i, j]]
        if i == j:
            qa["plausible_answers"] = [answer for pair, answer in answers.items() if pair[0] == i]
        qas.append(qa)
    return {"context": context, "qas": qas}


def _file(split: str, questions: int, seed: int) -> dict[str, Any]:
    rng = random.Random(f"{split} {seed}")  # a string seeds alike on every machine; a stream for each split
    paragraphs = [_paragraph(split, rng, first_id) for first_id in range(0, questions, GROUP)]
    del paragraphs[-1]["qas"][GROUP - (-questions % GROUP) :]
    # Each paragraph is an article of its own, so that the first articles of a file are of every kind.
    data = [{"title": f"{split} {number}", "paragraphs": [text]} for number, text in enumerate(paragraphs)]
    return {"version": VERSION, "data": data}


def demo_set(
    seed: int = 0,
    train_questions: int = 3000,
    validation_questions: int = 300,
    evaluation_questions: int = 540,
) -> DemoSet:
    """The three files, the same for the same arguments. Splits share nothing across seeds either."""
    counts = (train_questions, validation_questions, evaluation_questions)
    for split, count in zip(SPLITS, counts, strict=True):
        checked_int(f"the number of {split} questions", count, 1)
    return DemoSet(*(_file(split, count, seed) for split, count in zip(SPLITS, counts, strict=True)))


def write_demo_set(folder: str | Path, demo: DemoSet | None = None) -> dict[str, Path]:
    """Write train.json, validation.json and eval.json into the folder, new or not; their paths by split."""
    demo = demo_set() if demo is None else demo
    paths = {split: Path(folder) / f"{split.replace('evaluation', 'eval')}.json" for split in SPLITS}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for split, path in paths.items():
        text = json.dumps(getattr(demo, split), ensure_ascii=False, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
    return paths


@functools.cache
def _patterns(kind: str) -> str:
    """What a name of this kind looks like, as alternatives of a regular expression."""
    digits = {"year": r"\d{4}", "number": r"\d{2,3}"}
    forms = (_SLOT.sub(lambda slot: digits.get(slot[1], "[A-Z]?[a-z]+"), form) for form in KINDS[kind])
    return "|".join(forms)


@functools.cache
def _readers() -> tuple[tuple[re.Pattern[str], Relation, str], ...]:
    """An expression that matches each wording, with the wording's relation and split."""
    readers = []
    for relation in RELATIONS:
        for split in SPLITS:
            for text in relation.wordings[split].statements + relation.wordings[split].questions:
                body = re.escape(text).replace(r"\{e\}", f"(?P<e>{_patterns(relation.entity_kind)})")
                body = body.replace(r"\{v\}", f"(?P<v>{_patterns(relation.value_kind)})")
                readers.append((re.compile(body), relation, split))
    return tuple(readers)


def read(text: str) -> list[Fact]:
    """The facts that a sentence or a question of the set can be read as: one for each wording that fits."""
    matches = ((reader.fullmatch(text), relation, split) for reader, relation, split in _readers())
    return [
        Fact(relation.name, match["e"], match.groupdict().get("v", ""), split)
        for match, relation, split in matches
        if match
    ]


def texts(file: dict[str, Any]) -> Iterator[str]:
    """Every sentence and every question of a file."""
    for article in file["data"]:
        for paragraph in article["paragraphs"]:
            yield from re.split(r"(?<=\.) ", paragraph["context"])
            yield from (qa["question"] for qa in paragraph["qas"])


def check_disjoint(demo: DemoSet) -> None:
    """Raise ValueError where a wording, or a word of a name or an answer, appears in two splits."""
    forms = " ".join(form for forms in KINDS.values() for form in forms)
    common = set(re.findall(r"\w+", _SLOT.sub("", forms)))
    seen: dict[str, str] = {}
    for split in SPLITS:
        for text in texts(getattr(demo, split)):
            facts = read(text)
            if {fact.split for fact in facts} != {split}:
                raise ValueError(f"not worded as {split} is: {text!r}, read as {facts}")
            names = " ".join(f"{fact.entity} {fact.value}" for fact in facts)
            for word in set(re.findall(r"\w+", names)) - common:
                if seen.setdefault(word, split) != split:
                    raise ValueError(f"{word!r} stands in {seen[word]} and in {split}: {text!r}")
