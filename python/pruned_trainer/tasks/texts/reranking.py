"""Queries with passages to be ranked: a model reads query and passage together and gives one score."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from pruned_ops.checkpoints.loading import load_to_fine_tune
from pruned_ops.files import read_json
from pruned_trainer.tasks.faults import FormatError, Skipped, get_field, skipping
from pruned_trainer.tasks.output_kinds import MULTI_LABEL
from pruned_trainer.tasks.sources import read_rows, suffix_of
from pruned_trainer.tasks.squad.examples import Example as SquadExample
from pruned_trainer.tasks.squad.examples import load_squad
from pruned_trainer.tasks.texts.base import TextTask
from pruned_trainer.tasks.texts.classification import HEAD
from pruned_trainer.tasks.texts.encoding import Encoded, encode
from pruned_trainer.tasks.texts.examples import (
    Example,
    Examples,
    read_score,
    some,
    texts_of,
    value_of,
)
from pruned_trainer.tasks.texts.metrics import SCORE_AGREEMENT
from pruned_trainer.tasks.texts.prepared import PreparedTexts
from pruned_trainer.tasks.texts.ranking import RANKING, grouped

QUERY, PASSAGE, RELEVANT = "query", "passage", "relevant"
# Passages of a query in a training file of SQuAD's: the right one, and so many others of its article.
SQUAD_NEGATIVES = 3


@dataclass(frozen=True)
class RerankingTask(TextTask):
    """reranking: rows with a query and a passage, or a query and a list of passages, and how relevant each
    is; or a SQuAD file, whose paragraphs are the passages, and of which whole articles are held out. Of rows,
    the pairs of whole queries are held out."""

    head = HEAD

    # -- models ------------------------------------------------------------------------------------------

    def start_model(self, source: str, examples: Examples) -> PreTrainedModel:
        """The checkpoint's own head where it gives one score, else a new one; trained by the binary
        cross-entropy of being relevant."""
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        known = (config.architectures or [""])[0].endswith(HEAD) and config.num_labels == 1
        fields = {} if known else {"num_labels": 1}
        return load_to_fine_tune(source, HEAD, **fields, problem_type=MULTI_LABEL)

    def check_model(self, model: PreTrainedModel, source: str) -> None:
        if model.config.num_labels != 1:
            raise ValueError(
                f"{source} gives {model.config.num_labels} classes, and reranking needs one score: "
                "pruned-trainer finetune --task reranking makes such a model"
            )
        # The binary cross-entropy of being relevant, also where the config does not say so: transformers
        # takes the squared difference of logit and label there.
        model.config.problem_type = MULTI_LABEL

    # -- data --------------------------------------------------------------------------------------------

    def read(self, source: Path | str, split: str) -> Examples:
        with self.skipping_bad() as skipped:
            if suffix_of(source) == ".json" and Path(source).is_file() and _is_squad(Path(source)):
                negatives = SQUAD_NEGATIVES if split == "train" else None
                examples = squad_pairs(Path(source), negatives, self.options.seed, skipped)
            else:
                examples = self._read_rows(source, split, skipped)
        if not any(row.label > 0 for row in examples.rows):
            raise FormatError(f"{examples.where}: no passage is relevant to its query")
        if not any(row.label <= 0 for row in examples.rows):
            raise FormatError(f"{examples.where}: every passage is relevant to its query")
        return examples

    def _read_rows(self, source: Path | str, split: str, skipped: Skipped | None) -> Examples:
        query, passage = self.columns
        label = self.options.scores or self.options.label_column or RELEVANT
        table = read_rows(source, split, {query, passage, label}, skipped)
        hint = "" if label in table.columns else "; --texts takes pairs without labels"
        table.require((query, passage, label), hint)
        rows: list[Example] = []
        for where, row in table.placed():
            with skipping(skipped):
                rows += list(_pairs(row, query, passage, label, where))
        return some(Examples(table.where, tuple(rows)), skipped)

    @property
    def columns(self) -> tuple[str, str]:
        columns = self.options.text_columns or (QUERY, PASSAGE)
        return columns[0], columns[1]

    def describe(self, examples: Examples) -> str:
        queries = len(set(_query_numbers(examples)))
        without = "" if examples.is_labelled else " without labels"
        return f"{queries:,} queries with {len(examples):,} passages{without}"

    def prepare(
        self,
        examples: Examples,
        tokenizer: PreTrainedTokenizerFast,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
    ) -> PreparedTexts:
        windows = self._encode(examples, tokenizer)
        numbers = _query_numbers(examples)
        queries = list({n: row.texts[0] for n, row in zip(numbers, examples.rows, strict=True)}.values())
        if not examples.is_labelled:
            pairs = PreparedTexts(
                noun="pairs", count=len(windows), windows=windows, gold=None, metrics=SCORE_AGREEMENT,
                read=_score, assemble=_flat, show=_listed,
            )  # fmt: skip
            return pairs.taught_by(teacher, lambda predicted: predicted, SCORE_AGREEMENT)
        return PreparedTexts(
            noun="queries",
            count=len(queries),
            windows=windows,
            gold=grouped([row.label for row in examples.rows], numbers),
            metrics=RANKING,
            read=_score,
            assemble=lambda logits: grouped(_flat(logits), numbers),
            show=partial(_by_query, queries),
        )

    def features(
        self, examples: Examples, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
    ) -> list[dict[str, Any]]:
        windows, numbers = self._encode(examples, tokenizer), _query_numbers(examples)
        if not examples.is_labelled:
            return [window.feature(group=n) for window, n in zip(windows, numbers, strict=True)]
        # A list of one, as the binary cross-entropy takes it, from 0 to 1.
        highest = max(row.label for row in examples.rows)
        labels = [np.array([row.label / highest], np.float32) for row in examples.rows]
        triples = zip(windows, labels, numbers, strict=True)
        return [window.feature(labels=label, group=n) for window, label, n in triples]

    def _encode(self, examples: Examples, tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
        return encode(tokenizer, [row.texts for row in examples.rows], self.options.max_length)


def _score(outputs: Any, mask: Any) -> Any:
    return outputs.logits


def _flat(logits: Sequence[Any]) -> Any:
    """(pairs,) of the (1,) logits of each."""
    return np.concatenate(logits)


def _listed(predicted: Any) -> list[float]:
    return np.asarray(predicted).tolist()


def _by_query(queries: Sequence[str], predicted: Any) -> list[dict[str, Any]]:
    """The scores of each query's passages, in the file's order."""
    return [
        {"query": query, "scores": scores.tolist()} for query, scores in zip(queries, predicted, strict=True)
    ]


def _query_numbers(examples: Examples) -> list[int]:
    """The number of each row's query."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(row.group or row.texts[0], len(numbers)) for row in examples.rows]


def _pairs(row: Mapping[str, Any], query: str, passage: str, label: str, where: str) -> Iterator[Example]:
    """The pairs of a row: one passage with a number, or as many as its list has, with a number for each."""
    passages = value_of(row, passage, where)
    if not isinstance(passages, list):
        number = _relevance(value_of(row, label, where), where)
        yield Example(texts_of(row, (query, passage), where), where, number)
        return
    numbers = get_field(row, label, list, where)
    if len(passages) != len(numbers) or not passages:
        raise FormatError(f"{where}: {len(passages)} passages, but {len(numbers)} numbers in {label!r}")
    for text, number in zip(passages, numbers, strict=True):
        pair = texts_of({**row, passage: text}, (query, passage), where)
        yield Example(pair, where, _relevance(number, where), group=where)


def _relevance(value: Any, where: str) -> float:
    """How relevant a passage is: 0 for not at all; true and false are 1 and 0."""
    relevance = float(value) if isinstance(value, bool) else read_score(value, where)
    if relevance < 0:
        raise FormatError(f"{where}: the relevance is {relevance:g}; 0 or more is needed")
    return relevance


# -- SQuAD ---------------------------------------------------------------------------------------------------


def _is_squad(path: Path) -> bool:
    """Whether a .json file is one of SQuAD's, and no list of rows."""
    try:
        return isinstance(read_json(path, max_bytes=None), dict)
    except ValueError:
        return False  # which the reader of rows refuses


def squad_pairs(path: Path, negatives: int | None, seed: int, skipped: Skipped | None = None) -> Examples:
    """SQuAD's answerable questions, each with its own paragraph, which is relevant, and with others of its
    article, which are not, whatever is asked of them.

    negatives: how many others, drawn with the seed; all by default. A question whose article has no other
    paragraph is left out. Errors: FormatError for a file that is not SQuAD's, or without such a question.
    """
    examples = load_squad(path, "raise", skipped).examples
    paragraphs: dict[str, dict[str, None]] = {}
    for example in examples:
        paragraphs.setdefault(example.title, {})[example.context] = None
    rng = random.Random(seed)
    rows: list[Example] = []
    for example in examples:
        if not example.answers:
            continue
        others = [text for text in paragraphs[example.title] if text != example.context]
        if negatives is not None and len(others) > negatives:
            others = rng.sample(others, negatives)
        if others:
            rows += _ranked(example, others, str(path))
    if not rows:
        raise FormatError(
            f"{path}: no answerable question has another paragraph in its article, to be told from its own"
        )
    return Examples(str(path), tuple(rows))


def _ranked(example: SquadExample, others: Sequence[str], name: str) -> Iterator[Example]:
    where = f"{name}, question {example.id!r}"
    article = {"group": example.id, "unit": example.title}
    yield Example((example.question, example.context), where, 1.0, **article)
    for text in others:
        yield Example((example.question, text), where, 0.0, **article)
