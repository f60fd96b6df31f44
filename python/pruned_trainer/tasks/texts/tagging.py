"""Words with a label each: entities in BIO, parts of speech, whatever a sentence's words are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from pruned_ops.checkpoints.loading import load_to_fine_tune
from pruned_trainer.tasks.faults import FormatError, get_field, skipping
from pruned_trainer.tasks.output_kinds import IGNORED
from pruned_trainer.tasks.sources import SEPARATED, read_rows, suffix_of
from pruned_trainer.tasks.task import Score
from pruned_trainer.tasks.texts.base import TextTask
from pruned_trainer.tasks.texts.examples import (
    Example,
    Examples,
    read_class,
    some,
)
from pruned_trainer.tasks.texts.labels import Labels
from pruned_trainer.tasks.texts.metrics import FloatArray, IntArray, Metric, sums
from pruned_trainer.tasks.texts.prepared import PreparedTexts
from pruned_trainer.tasks.texts.words import Sentence, encode_words

HEAD = "ForTokenClassification"
TOKENS, TAGS = "tokens", "tags"
OUTSIDE = "O"


@dataclass(frozen=True)
class TaggingTask(TextTask):
    """token-classification: rows with a list of words and a list of their labels, of which -100 stands for
    none; texts without labels, whose words are what stands between their blanks."""

    head = HEAD

    # -- models ------------------------------------------------------------------------------------------

    def start_model(self, source: str, examples: Examples) -> PreTrainedModel:
        """The checkpoint's own head where its labels are the examples', else a new one."""
        values = [label for row in examples.rows for label in row.label if label != IGNORED]
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if (config.architectures or [""])[0].endswith(HEAD) and Labels.of(config).fit(values, examples.names):
            return load_to_fine_tune(source, HEAD)
        labels = Labels.found_in(values, examples.names)
        if len(labels.names) < 2:
            raise FormatError(_one_label(examples, labels.names[0]))
        return load_to_fine_tune(source, HEAD, **labels.to_config())

    # -- data --------------------------------------------------------------------------------------------

    def read(self, source: Path | str, split: str) -> Examples:
        if Path(source).is_file() and suffix_of(source) in SEPARATED:
            raise FormatError(
                f"{source}: a {suffix_of(source)} file has no lists, and words and their labels are lists: "
                "write it as .jsonl or .parquet"
            )
        tokens = (self.options.text_columns or (TOKENS,))[0]
        label = self.options.label_column or TAGS
        with self.skipping_bad() as skipped:
            table = read_rows(source, split, {tokens, label}, skipped)
            hint = "" if label in table.columns else "; --texts takes texts without labels"
            table.require((tokens, label), hint)
            rows = []
            for where, row in table.placed():
                with skipping(skipped):
                    words = _words(row, tokens, where)
                    labels = [_label(value, where) for value in get_field(row, label, list, where)]
                    if len(labels) != len(words):
                        raise FormatError(f"{where}: {len(words)} words, but {len(labels)} labels")
                    if all(value == IGNORED for value in labels):
                        raise FormatError(f"{where}: no word has a label: all are {IGNORED}")
                    rows.append(Example(words, where, tuple(labels), unit=" ".join(words)))
        return some(Examples(table.where, tuple(rows), True, tuple(table.names.get(label, ()))), skipped)

    @property
    def columns(self) -> tuple[str, ...]:
        return self.options.text_columns or ("text",)

    def of_texts(self, texts: Examples) -> Examples:
        rows = (replace(row, texts=tuple(row.texts[0].split()), unit=row.texts[0]) for row in texts.rows)
        return Examples(texts.where, tuple(rows), False)

    def describe(self, examples: Examples) -> str:
        return f"{len(examples):,} sentences" + ("" if examples.is_labelled else " without labels")

    def prepare(
        self,
        examples: Examples,
        tokenizer: PreTrainedTokenizerFast,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
    ) -> PreparedTexts:
        names = Labels.of(model.config).names
        rows, gold = self._with_labels(examples, model)
        windows = self._encode(rows, tokenizer)
        counts = [len(row.texts) for row in rows]
        prepared = PreparedTexts(
            noun="sentences",
            count=len(rows),
            windows=windows,
            gold=[[None if number == IGNORED else names[number] for number in numbers] for numbers in gold],
            metrics=ENTITIES if is_bio(names) else WORDS,
            read=lambda outputs, mask: outputs.logits,
            assemble=partial(tags_of, windows, counts, names),
            show=lambda predicted: predicted,
            classes_of=lambda predicted: list(chain.from_iterable(predicted)),
        )
        if examples.is_labelled:
            return prepared
        return prepared.taught_by(teacher, lambda predicted: predicted, AGREEMENT)

    def features(
        self, examples: Examples, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
    ) -> list[dict[str, Any]]:
        rows, gold = self._with_labels(examples, model)
        windows = self._encode(rows, tokenizer)
        if not examples.is_labelled:
            return [window.feature() for window in windows]
        labels = (_token_labels(window, gold[window.sentence]) for window in windows)
        return [
            window.feature(labels=of_tokens)
            for window, of_tokens in zip(windows, labels, strict=True)
            if (of_tokens != IGNORED).any()  # else there is nothing to learn from it
        ]

    def _with_labels(
        self, examples: Examples, model: PreTrainedModel
    ) -> tuple[Sequence[Example], list[list[int]]]:
        """The rows, and the numbers of their words' labels, IGNORED for a word without one; without labels,
        none."""
        if not examples.is_labelled:
            return examples.rows, []
        labels, rows, numbers = Labels.of(model.config), [], []
        with self.skipping_bad() as skipped:
            for row in examples.rows:
                with skipping(skipped):
                    numbers.append([
                        IGNORED if value == IGNORED else labels.number(value, row.where, examples.names)
                        for value in row.label
                    ])  # fmt: skip
                    rows.append(row)
        labelled = some(replace(examples, rows=tuple(rows)), skipped)
        labels_seen = {number for of_row in numbers for number in of_row} - {IGNORED}
        if len(labels_seen) < 2:
            raise FormatError(_one_label(labelled, labels.names[min(labels_seen)]))
        return rows, numbers

    def _encode(self, rows: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> list[Sentence]:
        sentences = [row.texts for row in rows]
        return encode_words(tokenizer, sentences, self.options.max_length, self.options.stride)


def _one_label(examples: Examples, label: str) -> str:
    return (
        f"{examples.where}: the words of all {len(examples):,} rows have the label {label!r}: two labels are "
        "needed"
    )


def _label(value: Any, where: str) -> str | int:
    """A word's label: a class, or IGNORED for a word without one, as in data that were made for
    transformers."""
    return IGNORED if type(value) is int and value == IGNORED else read_class(value, where)


def _words(row: Any, column: str, where: str) -> tuple[str, ...]:
    """The row's words; FormatError for anything else than a list of texts of which one is seen."""
    words = get_field(row, column, list, where)
    if not all(isinstance(word, str) for word in words):
        raise FormatError(f"{where}: {column!r} holds something else than texts")
    if not any(word.strip() for word in words):
        raise FormatError(f"{where}: {column!r} is empty")
    return tuple(words)


def _token_labels(window: Sentence, labels: Sequence[int]) -> NDArray[np.int64]:
    """(tokens,): each word's label, where it has one, at its first token, IGNORED elsewhere."""
    targets = np.full(len(window), IGNORED, np.int64)
    targets[window.tokens] = np.asarray(labels, np.int64)[window.words]
    return targets


def tags_of(
    windows: Sequence[Sentence], counts: Sequence[int], names: Sequence[str], logits: Sequence[Any]
) -> list[list[str]]:
    """The label of each word of each sentence. counts: (sentences,) words. logits: (tokens, labels) of each
    window. A word without a token is OUTSIDE, or has the first label where there is none of that name."""
    nothing = OUTSIDE if OUTSIDE in names else names[0]
    tags = [[nothing] * count for count in counts]
    for window, scores in zip(windows, logits, strict=True):
        best = np.asarray(scores).argmax(-1)
        for word, token in zip(window.words.tolist(), window.tokens.tolist(), strict=True):
            tags[window.sentence][word] = names[best[token]]
    return tags


def is_bio(names: Sequence[str]) -> bool:
    """Whether these labels mark the beginnings and insides of entities."""
    return all(name == OUTSIDE or name[:2] in ("B-", "I-") for name in names) and OUTSIDE in names


# -- metrics: gold and predicted hold a list of labels for each sentence, gold None for a word without one


def _judged(gold: Any, predicted: Any) -> Iterator[tuple[list[str], list[str]]]:
    """For each sentence the gold and the predicted labels of the words that have a label."""
    for true, chosen in zip(gold, predicted, strict=True):
        pairs = [pair for pair in zip(true, chosen, strict=True) if pair[0] is not None]
        yield [label for label, _ in pairs], [label for _, label in pairs]


@dataclass(frozen=True)
class EntityScore:
    """Precision, recall or F1 of entities, each right where its words and its type are; as seqeval counts
    them."""

    score: Score
    kind: str

    def value(self, gold: Any, predicted: Any) -> float:
        from seqeval import metrics

        metric = getattr(metrics, f"{self.kind}_score")
        true, chosen = zip(*_judged(gold, predicted), strict=True)
        return 100 * float(metric(list(true), list(chosen), zero_division=0))

    def statistics(self, gold: Any, predicted: Any) -> FloatArray:
        return _entity_counts(gold, predicted)

    def resampled(self, statistics: FloatArray, draws: IntArray) -> FloatArray:
        right, chosen, true = sums(statistics, draws).T
        below = {"precision": chosen, "recall": true, "f1": (chosen + true) / 2}[self.kind]
        return 100 * np.divide(right, below, out=np.zeros_like(right), where=below > 0)


def _entity_counts(gold: Any, predicted: Any) -> FloatArray:
    """(sentences, 3): entities that are right, that were chosen, and that there are."""
    from seqeval.metrics.sequence_labeling import get_entities

    counts = []
    for right, chosen in _judged(gold, predicted):
        true, predicted_entities = set(get_entities(right)), set(get_entities(chosen))
        counts.append((len(true & predicted_entities), len(predicted_entities), len(true)))
    return np.array(counts, np.float64)


@dataclass(frozen=True)
class WordAccuracy:
    """The share of the words that have the right label."""

    score: Score

    def value(self, gold: Any, predicted: Any) -> float:
        right, words = _word_counts(gold, predicted).sum(0)
        return 100 * float(right / words)

    def statistics(self, gold: Any, predicted: Any) -> FloatArray:
        return _word_counts(gold, predicted)

    def resampled(self, statistics: FloatArray, draws: IntArray) -> FloatArray:
        right, words = sums(statistics, draws).T
        return 100 * right / words


def _word_counts(gold: Any, predicted: Any) -> FloatArray:
    """(sentences, 2): words that have the right label, and words."""
    counts = [(sum(map(str.__eq__, a, b)), len(a)) for a, b in _judged(gold, predicted)]
    return np.array(counts, np.float64)


ENTITIES: tuple[Metric, ...] = (
    EntityScore(Score("entity_f1", "entity F1"), "f1"),
    EntityScore(Score("entity_precision", "precision", has_loss=False), "precision"),
    EntityScore(Score("entity_recall", "recall", has_loss=False), "recall"),
)
WORDS: tuple[Metric, ...] = (WordAccuracy(Score("accuracy", "accuracy of words")),)
# Of texts without labels, beside the teacher.
AGREEMENT: tuple[Metric, ...] = (WordAccuracy(Score("agreement", "same label of words as the teacher")),)
