"""The demo's question-answering set: its layout, that it is a fair test, that a seed gives the same bytes."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import BertModel

from pruned_trainer.cli import main
from pruned_trainer.demo import run as demo_run
from pruned_trainer.demo.questions import (
    KINDS,
    PARTS,
    DemoSet,
    check_disjoint,
    demo_set,
    read,
    texts,
    words_of,
    write_demo_set,
)
from pruned_trainer.demo.wordings import RELATIONS, SPLITS, parse
from text_files import CUT, checkpoint

DEMO = demo_set()


def questions(file: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(context, question entry) of a file, in its order."""
    for article in file["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                yield paragraph["context"], qa


@functools.cache
def template_words() -> frozenset[str]:
    """The words that every split may show: those of the wordings, and those of names such as "Bridge"."""
    wordings = [split for relation in RELATIONS for split in relation.wordings.values()]
    written = [text for split in wordings for text in split.statements + split.questions]
    written += [form for forms in KINDS.values() for form in forms]
    return frozenset(re.findall(r"\w+", re.sub(r"\{\w+\}", " ", " ".join(written))))


def own_words(file: dict[str, Any]) -> set[str]:
    return set(re.findall(r"\w+", " ".join(texts(file)))) - template_words()


def skeletons(file: dict[str, Any]) -> set[str]:
    """The sentences and questions of a file with every word blotted out that no wording has."""
    return {re.sub(r"\w+", lambda m: m[0] if m[0] in template_words() else "#", text) for text in texts(file)}


@pytest.mark.parametrize("split", SPLITS)
def test_layout_is_squad_2_and_every_offset_is_exact(split: str) -> None:
    file = getattr(DEMO, split)
    assert set(file) == {"version", "data"}
    assert all(set(article) == {"title", "paragraphs"} for article in file["data"])
    entries = list(questions(file))
    assert len({qa["id"] for _, qa in entries}) == len(entries)
    for context, qa in entries:
        assert set(qa) - {"plausible_answers"} == {"id", "question", "answers", "is_impossible"}
        assert qa["question"].endswith("?") and "{" not in qa["question"] + context
        assert len(qa["answers"]) == (0 if qa["is_impossible"] else 1)
        for answer in qa["answers"] + qa.get("plausible_answers", []):
            start, text = answer["answer_start"], answer["text"]
            assert context[start : start + len(text)] == text
            assert len(re.findall(rf"\b{text}\b", context)) == 1, "no second place where it could be found"


def test_as_many_questions_as_asked_and_a_third_without_answer() -> None:
    demo = demo_set(3, train_questions=100, validation_questions=1, evaluation_questions=50)
    assert [len(list(questions(getattr(demo, split)))) for split in SPLITS] == [100, 1, 50]
    for split, count in zip(SPLITS, (3000, 300, 540), strict=True):
        impossible = [qa["is_impossible"] for _, qa in questions(getattr(DEMO, split))]
        assert len(impossible) == count and sum(impossible) == count // 3
    with pytest.raises(ValueError, match="the number of train questions is 0: at least 1 is needed"):
        demo_set(train_questions=0)


@pytest.mark.parametrize("split", SPLITS)
def test_only_reading_tells_the_answer(split: str) -> None:
    """What is asked is told of two entities of its paragraph: of the one asked about only if answerable."""
    for context, qa in questions(getattr(DEMO, split)):
        facts = [fact for text in re.split(r"(?<=\.) ", context) for fact in read(text)]
        questioned = {(fact.relation, fact.entity) for fact in read(qa["question"])}
        ((relation, entity),) = questioned
        values = {fact.entity: fact.value for fact in facts if fact.relation == relation}
        assert len(values) == 2 and len(facts) == 6
        if qa["is_impossible"]:
            assert entity not in values and entity in context
            assert sorted(values.values()) == sorted(answer["text"] for answer in qa["plausible_answers"])
        else:
            assert values[entity] == qa["answers"][0]["text"]


def test_splits_share_no_wording_and_no_name_number_or_answer() -> None:
    check_disjoint(DEMO)
    # Again, without the reader: a word that no wording has is of a name or an answer; the rest is wording.
    answers = {
        split: {answer["text"] for _, qa in questions(getattr(DEMO, split)) for answer in qa["answers"]}
        for split in SPLITS
    }
    for first, second in itertools.combinations(SPLITS, 2):
        left, right = getattr(DEMO, first), getattr(DEMO, second)
        assert not answers[first] & answers[second]
        assert not own_words(left) & own_words(right)
        assert not skeletons(left) & skeletons(right)
    assert len(own_words(DEMO.evaluation)) > 500 and len(skeletons(DEMO.evaluation)) > 100


def test_splits_of_different_seeds_are_disjoint_too() -> None:
    sets = [demo_set(seed, 300, 300, 300) for seed in (0, 5, 6)]
    check_disjoint(DemoSet(sets[0].train, sets[1].validation, sets[2].evaluation))


def test_check_disjoint_finds_a_leak() -> None:
    demo = demo_set(0, 30, 30, 30)
    source = demo.train["data"][0]["paragraphs"][0]
    for leak in ("context", "question"):
        target = copy.deepcopy(demo.evaluation)
        paragraph = target["data"][0]["paragraphs"][0]
        if leak == "context":
            paragraph["context"] = source["context"]
        else:
            paragraph["qas"][0]["question"] = source["qas"][0]["question"]
        with pytest.raises(ValueError, match="not worded as evaluation is"):
            check_disjoint(DemoSet(demo.train, demo.validation, target))
    source["qas"][0]["question"] = "How long is the Bellford Bridge?"
    entry = demo.evaluation["data"][0]["paragraphs"][0]["qas"][0]
    entry["question"] = "How far does the Bellford Bridge reach?"
    with pytest.raises(ValueError, match="'Bellford' stands in train and in evaluation"):
        check_disjoint(demo)


def test_every_split_has_words_and_relations_enough() -> None:
    assert len(RELATIONS) >= 8
    for part in PARTS:
        assert min(len(words_of(part, split)) for split in SPLITS) >= 4, part
    for relation in RELATIONS:
        assert len(relation.wordings["train"].statements) >= 4
        assert len(relation.wordings["train"].questions) >= 4
        assert len(relation.wordings["evaluation"].statements) >= 3


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("train: {e} is old. | Who is {e}?", "{v} 0 times"),
        ("train: {e} is {v}. | Who is {e} of {v}?", "{v} 1 times"),
        ("train: {e} is {v}.", "both statements and questions"),
        ("train: {e} is {v}. | Who is {e}?\nvalidation: {e} is {v}. | What is {e}?", "splits"),
    ],
)
def test_a_wrong_table_is_refused(lines: str, message: str) -> None:
    others = "\nvalidation: {e}, {v}. | Is {e}?\nevaluation: {v}, {e}. | Was {e}?"
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(f"age: person -> number\n{lines}" + others * ("validation" not in lines))


def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first, again = write_demo_set(tmp_path / "a" / "b"), write_demo_set(tmp_path / "c", demo_set(0))
    assert [path.name for path in first.values()] == ["train.json", "validation.json", "eval.json"]
    other = write_demo_set(tmp_path / "d", demo_set(1))
    for split in SPLITS:
        assert first[split].read_bytes() == again[split].read_bytes()
        assert first[split].read_bytes() != other[split].read_bytes()
        assert json.loads(first[split].read_text(encoding="utf-8")) == getattr(DEMO, split)


def test_files_of_ones_own_are_read_as_prune_reads_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer that does not stand at its answer_start is moved where its place is sure."""
    answer = {"text": "w2", "answer_start": 4}  # it stands at 3
    qas = [{"id": "q", "question": "w2", "answers": [answer], "is_impossible": False}]
    article = {"title": "t", "paragraphs": [{"context": "w1 w2 w3", "qas": qas}]}
    model = checkpoint(tmp_path / "model", BertModel)
    argv = ["demo", "--model", str(model), "--out", str(tmp_path / "out"), *CUT, "--stride", "4"]
    for split in ("train", "eval"):
        (tmp_path / f"{split}.json").write_text(json.dumps({"version": "v2.0", "data": [article]}))
        argv += [f"--{split}-file", str(tmp_path / f"{split}.json")]

    def train(model: Any, features: Any, *_: Any) -> None:
        raise ValueError(f"the answer begins at token {features[0]['start_positions']}")

    monkeypatch.setattr(demo_run, "train", train)
    assert main(argv) == 2
    assert "the answer begins at token 4" in capsys.readouterr().err  # [CLS] w2 [SEP] w1 w2
