"""SQuAD as a task of the pruning job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import AutoModelForQuestionAnswering, PreTrainedModel, PreTrainedTokenizerFast

from pruned_ops import PrunedBertForNaturalQuestions
from pruned_ops.qa.decoding import Decoded, decode
from pruned_ops.qa.questions import arrival_lengths
from pruned_ops.qa.windows import Window, span_tokens, windows
from pruned_ops.runtime.optimize import optimized
from pruned_trainer.distributed import is_main, shared
from pruned_trainer.tasks.squad.examples import Example, split_articles
from pruned_trainer.tasks.squad.scoring import (
    EvaluationResult,
    best_null_threshold,
    evaluate,
    fit_calibration,
)
from pruned_trainer.tasks.squad.sources import read_examples
from pruned_trainer.tasks.task import model_logits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pruned_trainer.tasks.squad.examples import Example


def training_features(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int = 384,
    stride: int = 128,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """One dictionary per window: input_ids, token_type_ids, attention_mask, start_positions, end_positions.

    The first three are (tokens,) int32 arrays without padding; a padding collator takes them as they are.
    The positions are those of the first and last token of the example's first answer; of the CLS token
    where the question has no answer, or the window does not hold it whole.
    """
    questions = [example.question for example in examples]
    contexts = [example.context for example in examples]
    cut = windows(tokenizer, questions, contexts, max_length, stride, progress=progress)
    return [_feature(window, examples[window.question_index]) for window in cut]


def _feature(window: Window, example: Example) -> dict[str, Any]:
    start, end = _answer_tokens(window, example)
    return {
        "input_ids": window.input_ids,
        "token_type_ids": window.token_type_ids,
        "attention_mask": np.ones_like(window.input_ids),
        "start_positions": start,
        "end_positions": end,
    }


def _answer_tokens(window: Window, example: Example) -> tuple[int, int]:
    """First and last token of the first answer; the CLS token, twice, where the window lacks part of it."""
    found = None
    if example.answers and not example.is_impossible:
        text, start = example.answers[0]
        found = span_tokens(window, start + len(text) - len(text.lstrip()), start + len(text.rstrip()))
    return found or (window.cls_index, window.cls_index)


THRESHOLD = "null_score_threshold"


@dataclass(frozen=True)
class Questions:
    """Examples with their windows: cut once, used for every model."""

    examples: Sequence[Example]
    windows: Sequence[Window]

    @classmethod
    def cut(
        cls, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, max_length: int, stride: int
    ) -> Questions:
        questions, contexts = [e.question for e in examples], [e.context for e in examples]
        cut = windows(tokenizer, questions, contexts, max_length, stride, progress=is_main())
        return cls(examples, cut)

    def __len__(self) -> int:
        return len(self.examples)

    def arrival_lengths(self) -> list[int]:
        """Window lengths in arrival order, in tokens."""
        by_question: list[list[int]] = [[] for _ in self.examples]
        for window in self.windows:
            by_question[window.question_index].append(len(window))
        return arrival_lengths(by_question)

    def decoded(self, model: PreTrainedModel, batch_size: int = 32) -> list[Decoded]:
        """Every question's best spans and null score by `model`, which runs packed meanwhile, on all
        processes."""
        with optimized(model):
            logits = shared(partial(model_logits, model, batch_size), self.windows)
        return decode(self.windows, logits, [e.context for e in self.examples])

    def best_thresholds(self, model: PreTrainedModel) -> dict[str, float]:
        return {THRESHOLD: best_null_threshold(self.examples, self.decoded(model))}

    def best_fields(self, model: PreTrainedModel) -> dict[str, Any]:
        """The threshold, and how far the model's scores can be believed at it."""
        decoded = self.decoded(model)
        threshold = best_null_threshold(self.examples, decoded)
        calibration = fit_calibration(self.examples, decoded, threshold)
        return {THRESHOLD: threshold, "score_calibration": calibration.to_json()}

    def evaluate(self, model: PreTrainedModel, thresholds: Mapping[str, float]) -> EvaluationResult:
        return evaluate(self.examples, self.decoded(model), thresholds[THRESHOLD])


@dataclass(frozen=True)
class SquadTask:
    """max_length, stride: of windows, in tokens. seed: of the articles that are held out."""

    max_length: int = 384
    stride: int = 128
    seed: int = 0

    thresholds = (THRESHOLD,)

    def start_model(self, source: str) -> PreTrainedModel:
        return AutoModelForQuestionAnswering.from_pretrained(source)

    def check_model(self, model: PreTrainedModel) -> None:
        if isinstance(model, PrunedBertForNaturalQuestions):
            raise ValueError("the model has answer types: it is for --task natural_questions, not squad")

    def read(self, source: Path | str, split: str) -> Sequence[Example]:
        return read_examples(source, split)

    def read_training(
        self, source: Path, has_validation: bool
    ) -> tuple[Sequence[Example], Sequence[Example] | None]:
        """Without a validation file 5% of the training articles serve."""
        train = read_examples(source, "train")
        return (train, None) if has_validation else split_articles(train, seed=self.seed)

    def describe(self, examples: Sequence[Example]) -> str:
        return f"{len(examples)} questions"

    def prepare(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> Questions:
        return Questions.cut(examples, tokenizer, self.max_length, self.stride)

    def features(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast
    ) -> list[dict[str, Any]]:
        return training_features(examples, tokenizer, self.max_length, self.stride, progress=is_main())
