"""Texts, or pairs of texts, with a class each, or with a score each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from pruned_ops.checkpoints.loading import load_to_fine_tune
from pruned_trainer.tasks.faults import FormatError, skipping
from pruned_trainer.tasks.texts import metrics
from pruned_trainer.tasks.texts.base import TextTask
from pruned_trainer.tasks.texts.encoding import Encoded, encode
from pruned_trainer.tasks.texts.examples import (
    Example,
    Examples,
    read_class,
    read_labelled,
    read_score,
    some,
)
from pruned_trainer.tasks.texts.labels import Labels
from pruned_trainer.tasks.texts.prepared import PreparedTexts

HEAD = "ForSequenceClassification"
COLUMNS = {"text-classification": ("text",), "pair-classification": ("text_a", "text_b")}
NOUNS = {"text-classification": "texts", "pair-classification": "pairs"}
ONE_LABEL = "single_label_classification"


@dataclass(frozen=True)
class ClassificationTask(TextTask):
    """text-classification and pair-classification: rows with texts and a label, or with `scores` a number."""

    head = HEAD

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the texts."""
        return self.options.text_columns or COLUMNS[self.options.task]

    @property
    def noun(self) -> str:
        """What the examples are called."""
        return NOUNS[self.options.task]

    # -- models ------------------------------------------------------------------------------------------

    def start_model(self, source: str, examples: Examples) -> PreTrainedModel:
        """The checkpoint's own head where its labels are the examples', else a new one; of several labels it
        learns to say one for each text."""
        if self.options.scores is not None:
            return load_to_fine_tune(source, HEAD, num_labels=1, problem_type="regression")
        values = [row.label for row in examples.rows]
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if (config.architectures or [""])[0].endswith(HEAD):
            known = Labels.of(config)
            if config.num_labels > 1 and known.fit(values, examples.names):
                return load_to_fine_tune(source, HEAD, problem_type=ONE_LABEL)
        labels = Labels.found_in(values, examples.names)
        if len(labels.names) < 2:
            raise FormatError(one_class(examples, labels.names[0]))
        return load_to_fine_tune(source, HEAD, **labels.to_config(), problem_type=ONE_LABEL)

    def check_model(self, model: PreTrainedModel, source: str) -> None:
        labels = len(Labels.of(model.config).names)
        if self.options.scores is not None and labels > 1:
            raise ValueError(f"{source} gives {labels} classes: which --scores has no use for")
        if model.config.problem_type == "multi_label_classification" and labels > 1:
            raise ValueError(
                f"{source} gives several labels at once; {self.options.task} has one for each text"
            )
        if labels == 1:  # also where it was trained as a reranker, whose loss takes labels of another shape
            model.config.problem_type = "regression"

    # -- data --------------------------------------------------------------------------------------------

    def read(self, source: Path | str, split: str) -> Examples:
        label = self.options.label_column or "label"
        read_label: Callable[[Any, str], str | int | float] = read_class
        if self.options.scores is not None:
            label, read_label = self.options.scores, read_score
        with self.skipping_bad() as skipped:
            return read_labelled(source, split, self.columns, label, read_label, skipped)

    def describe(self, examples: Examples) -> str:
        return f"{len(examples):,} {self.noun}" + ("" if examples.is_labelled else " without labels")

    def prepare(
        self,
        examples: Examples,
        tokenizer: PreTrainedTokenizerFast,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
    ) -> PreparedTexts:
        names = Labels.of(model.config).names
        scored = len(names) == 1
        rows, gold = self._with_labels(examples, model)
        prepared = PreparedTexts(
            noun=self.noun,
            count=len(rows),
            windows=self._encode(rows, tokenizer),
            gold=np.array(gold),
            metrics=metrics.SCORES if scored else metrics.CLASSES,
            read=lambda outputs, mask: outputs.logits,
            assemble=(lambda logits: np.stack(logits)[:, 0]) if scored else np.stack,
            show=(lambda predicted: predicted.tolist())
            if scored
            else (lambda predicted: named(predicted, names)),
            classes_of=None if scored else (lambda logits: [names[n] for n in logits.argmax(-1)]),
        )
        if examples.is_labelled:
            return prepared
        if scored:
            return prepared.taught_by(teacher, lambda predicted: predicted, metrics.SCORE_AGREEMENT)
        return prepared.taught_by(teacher, lambda predicted: predicted.argmax(-1), metrics.CLASS_AGREEMENT)

    def features(
        self, examples: Examples, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
    ) -> list[dict[str, Any]]:
        rows, labels = self._with_labels(examples, model)
        windows = self._encode(rows, tokenizer)
        if not examples.is_labelled:
            return [window.feature() for window in windows]
        return [window.feature(labels=label) for window, label in zip(windows, labels, strict=True)]

    def _with_labels(
        self, examples: Examples, model: PreTrainedModel
    ) -> tuple[Sequence[Example], list[int] | list[float]]:
        """The rows, and the number of each one's class (or its score); without labels, no numbers."""
        if not examples.is_labelled:
            return examples.rows, []
        if self.options.scores is not None:
            return examples.rows, [float(row.label) for row in examples.rows]
        labels, rows, numbers = Labels.of(model.config), [], []
        if len(labels.names) == 1:
            raise ValueError(
                f"{examples.where}: the model gives one score: say which column has them with --scores"
            )
        with self.skipping_bad() as skipped:
            for row in examples.rows:
                with skipping(skipped):
                    numbers.append(labels.number(row.label, row.where, examples.names))
                    rows.append(row)
        labelled = some(replace(examples, rows=tuple(rows)), skipped)
        if len(set(numbers)) < 2:
            raise FormatError(one_class(labelled, labels.names[numbers[0]]))
        return rows, numbers

    def _encode(self, rows: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
        return encode(tokenizer, [row.texts for row in rows], self.options.max_length)


def one_class(examples: Examples, label: str) -> str:
    """The sentence that refuses examples of which all have one label."""
    return (
        f"{examples.where}: all {len(examples):,} rows have the label {label!r}: a model that always says so "
        "would be right; two labels are needed"
    )


def named(predicted: Any, names: Sequence[str]) -> list[dict[str, Any]]:
    """Each example's likeliest class with its probability, for people."""
    logits = np.asarray(predicted, np.float64)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    best = shares.argmax(-1)
    return [
        {"label": names[number], "probability": round(float(row[number]), 6)}
        for number, row in zip(best.tolist(), shares, strict=True)
    ]
