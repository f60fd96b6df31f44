"""SQuAD as a task of the pruning job: features to train on, and questions to judge models on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pruned_ops import PrunedBertForNaturalQuestions
from pruned_ops.checkpoints.loading import load_model, load_to_fine_tune
from pruned_ops.qa.decoding import Decoded, decode
from pruned_ops.qa.questions import arrival_lengths
from pruned_ops.qa.windows import RefusedQuestion, Window, span_tokens, windows
from pruned_ops.runtime.optimize import optimized
from pruned_trainer.distributed import is_main, shared
from pruned_trainer.tasks.faults import DataFaults, Skipped
from pruned_trainer.tasks.squad.examples import Example, SquadFormatError, split_articles
from pruned_trainer.tasks.squad.metrics import (
    SCORES,
    EvaluationResult,
    best_null_threshold,
    evaluate,
    fit_calibration,
)
from pruned_trainer.tasks.squad.sources import read_examples
from pruned_trainer.tasks.task import model_logits

# The config's field that holds the null threshold.
THRESHOLD = "null_score_threshold"


def training_features(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int = 384,
    stride: int = 128,
    progress: bool = False,
    skipped: Skipped | None = None,
) -> list[dict[str, Any]]:
    """One dictionary per window: input_ids, token_type_ids, attention_mask, start_positions, end_positions.

    The first three are (tokens,) int32 arrays without padding; a padding collator takes them as they are.
    The positions are those of the first and last token of the example's first answer, or of the CLS token
    where the question has no answer or the window does not hold all of it. skipped: collects the faults of
    questions that leave no room for their context; without it such a question is a SquadFormatError.
    """
    examples, example_windows = _cut(examples, tokenizer, max_length, stride, progress, skipped)
    return [_feature(window, examples[window.question_index]) for window in example_windows]


def _cut(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    stride: int,
    progress: bool,
    skipped: Skipped | None,
) -> tuple[Sequence[Example], list[Window]]:
    """The examples that can be cut, and their windows."""
    questions = [example.question for example in examples]
    contexts = [example.context for example in examples]
    refused: list[RefusedQuestion] = []
    cut = windows(tokenizer, questions, contexts, max_length, stride, progress=progress, refused=refused)
    if not refused:
        return examples, cut
    faults = [f"question {examples[error.index].id!r} {error.reason}" for error in refused]
    if skipped is None:
        raise SquadFormatError(faults[0])
    skipped.faults += faults
    left_out = {error.index for error in refused}
    kept = [index for index in range(len(examples)) if index not in left_out]
    if not kept:
        raise SquadFormatError(f"no question leaves room for its context; the first: {faults[0]}")
    new_index = {index: number for number, index in enumerate(kept)}
    cut = [replace(window, question_index=new_index[window.question_index]) for window in cut]
    return [examples[index] for index in kept], cut


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
    tokens = None
    if example.answers and not example.is_impossible:
        text, start = example.answers[0]
        tokens = span_tokens(window, start + len(text) - len(text.lstrip()), start + len(text.rstrip()))
    return tokens or (window.cls_index, window.cls_index)


@dataclass(frozen=True)
class Questions:
    """Examples with their windows, which are cut once and used for every model."""

    examples: Sequence[Example]
    windows: Sequence[Window]

    noun, score_lines, metric_digits = "questions", SCORES, 2

    @classmethod
    def cut(
        cls,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerFast,
        max_length: int,
        stride: int,
        skipped: Skipped | None = None,
    ) -> Questions:
        """The examples, cut into windows. max_length, stride: in tokens, as `windows` takes them. skipped: as
        for `training_features`."""
        return cls(*_cut(examples, tokenizer, max_length, stride, is_main(), skipped))

    def __len__(self) -> int:
        return len(self.examples)

    def arrival_lengths(self) -> list[int]:
        """The windows' lengths in tokens, in arrival order."""
        by_question: list[list[int]] = [[] for _ in self.examples]
        for window in self.windows:
            by_question[window.question_index].append(len(window))
        return arrival_lengths(by_question)

    def decoded(self, model: PreTrainedModel, batch_size: int = 32) -> list[Decoded]:
        """Each question's best spans and null score by `model`, which runs packed meanwhile, on all
        processes."""
        with optimized(model):
            logits = shared(partial(model_logits, model, batch_size), self.windows)
        return decode(self.windows, logits, [example.context for example in self.examples])

    def best_thresholds(self, model: PreTrainedModel) -> dict[str, float]:
        """The null threshold under which `model` scores best here, by its field in the config."""
        return {THRESHOLD: best_null_threshold(self.examples, self.decoded(model))}

    def best_fields(self, model: PreTrainedModel) -> dict[str, Any]:
        """The best null threshold, and the calibration of the model's scores at it."""
        decoded = self.decoded(model)
        threshold = best_null_threshold(self.examples, decoded)
        calibration = fit_calibration(self.examples, decoded, threshold)
        return {THRESHOLD: threshold, "score_calibration": calibration.to_json()}

    def evaluate(self, model: PreTrainedModel, thresholds: Mapping[str, float]) -> EvaluationResult:
        """The scores of `model` at these thresholds."""
        return evaluate(self.examples, self.decoded(model), thresholds[THRESHOLD])


@dataclass(frozen=True)
class SquadTask:
    """SQuAD with its options.

    max_length, stride: of windows, in tokens. seed: of the held-out articles. skip_bad: leave out questions
    that cannot be read or asked, and count them in `faults`, beside the answers that were put right.
    """

    max_length: int = 384
    stride: int = 128
    seed: int = 0
    skip_bad: bool = False
    faults: DataFaults = field(default_factory=DataFaults, init=False, compare=False, repr=False)

    thresholds = (THRESHOLD,)

    def start_model(self, source: str, examples: Sequence[Example]) -> PreTrainedModel:
        return load_to_fine_tune(source)

    def load_model(self, source: str, takes_int8: bool = False) -> PreTrainedModel:
        model = load_model(source, takes_int8)
        self.check_model(model)
        return model

    def check_model(self, model: PreTrainedModel) -> None:
        if isinstance(model, PrunedBertForNaturalQuestions):
            raise ValueError("the model has answer types: it is for --task natural_questions, not squad")

    def read(self, source: Path | str, split: str) -> Sequence[Example]:
        skipped, repaired = self._skipped(), list[str]()
        examples = read_examples(source, split, skipped, repaired, "; --task reads the rows of other tasks")
        self.faults.add(skipped, repaired)
        return examples

    def _skipped(self) -> Skipped | None:
        return Skipped() if self.skip_bad else None

    def read_training(
        self, source: Path, has_validation: bool
    ) -> tuple[Sequence[Example], Sequence[Example] | None]:
        """The training examples; without a validation file, 5% of them are held out, by whole articles."""
        train = self.read(source, "train")
        return (train, None) if has_validation else split_articles(train, seed=self.seed)

    def read_texts(self, source: Path, has_validation: bool) -> tuple[Any, Any]:
        raise ValueError(
            "squad has no form without answers: --texts is for the tasks on rows of texts (--task)"
        )

    def to_choose_on(self, examples: Sequence[Example]) -> Sequence[Example]:
        """All of them."""
        return examples

    def describe(self, examples: Sequence[Example]) -> str:
        return f"{len(examples)} questions"

    def prepare(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerFast,
        model: PreTrainedModel | None = None,
        teacher: PreTrainedModel | None = None,
    ) -> Questions:
        skipped = self._skipped()
        questions = Questions.cut(examples, tokenizer, self.max_length, self.stride, skipped)
        self.faults.add(skipped)
        return questions

    def features(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerFast,
        model: PreTrainedModel | None = None,
    ) -> list[dict[str, Any]]:
        skipped = self._skipped()
        features = training_features(
            examples, tokenizer, self.max_length, self.stride, progress=is_main(), skipped=skipped
        )
        self.faults.add(skipped)
        return features

    def to_fine_tune(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
    ) -> tuple[nn.Module, list[dict[str, Any]]]:
        return model, self.features(examples, tokenizer, model)
