"""Natural Questions as a task of the pruning job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from pruned_ops import PrunedBertForNaturalQuestions
from pruned_ops.checkpoints.loading import load_model, load_to_fine_tune
from pruned_ops.models.natural_questions import (
    is_natural_questions,
    load_natural_questions,
    with_answer_types,
)
from pruned_ops.qa.questions import arrival_lengths
from pruned_ops.runtime.optimize import optimized
from pruned_trainer.distributed import shared
from pruned_trainer.tasks.faults import DataFaults, Skipped, skipping
from pruned_trainer.tasks.natural_questions.documents import (
    Document,
    NqFormatError,
    nq_files,
    read_documents,
)
from pruned_trainer.tasks.natural_questions.metrics import (
    MIN_ANNOTATORS,
    AnswerStats,
    best_f1_loss_interval,
    f1_loss_interval,
    kind_metrics,
    mean_threshold,
    parse_predictions,
    score_answers,
)
from pruned_trainer.tasks.natural_questions.predictions import decode_documents, predictions_json
from pruned_trainer.tasks.natural_questions.windows import (
    ArrowWindows,
    NqWindow,
    cut_document,
    is_held_out,
    located,
    training_windows,
    with_markers,
)
from pruned_trainer.tasks.options import NULL_RATE
from pruned_trainer.tasks.task import HELD_OUT, Score, model_logits

LONG, SHORT = "long_score_threshold", "short_score_threshold"
SCORES = (
    Score("long_f1", "long F1"),
    Score("short_f1", "short F1"),
    Score("long_best_f1", "long F1, best threshold"),
    Score("short_best_f1", "short F1, best threshold"),
)


@dataclass(frozen=True)
class NqFiles:
    """The examples of files, which are read each time they are used.

    fraction: the share of documents that is held out (0: none). held_out: whether these examples are that
    share, or the others.
    """

    files: tuple[Path, ...]
    fraction: float = 0.0
    held_out: bool = False


@dataclass(frozen=True, eq=False)
class NqResult:
    """What a model reaches on a file: its predictions, and the statistics of long and short answers.

    predictions: the official prediction file's content. thresholds: those of LONG and SHORT.
    """

    predictions: dict[str, Any]
    long: AnswerStats
    short: AnswerStats
    thresholds: tuple[float, float]

    def scores(self) -> dict[str, Any]:
        """long_f1 and short_f1 at the thresholds, and long_best_f1 and short_best_f1 at those that are best
        on these documents, as the official evaluator has them, in percent; metrics: the official keys, as
        fractions."""
        metrics = {**kind_metrics(self.long, "long-"), **kind_metrics(self.short, "short-")}
        return {
            "long_f1": 100 * self.long.f1_at(self.thresholds[0]),
            "short_f1": 100 * self.short.f1_at(self.thresholds[1]),
            "long_best_f1": 100 * metrics["long-best-threshold-f1"],
            "short_best_f1": 100 * metrics["short-best-threshold-f1"],
            "metrics": metrics,
        }

    def losses(self, pruned: NqResult) -> dict[str, Any]:
        """Points lost from this to the pruned model, with 95% bootstrap intervals over the documents."""
        losses: dict[str, Any] = {}
        own_scores, pruned_scores = self.scores(), pruned.scores()
        for number, kind in enumerate(("long", "short")):
            counts = [getattr(result, kind).counts_at(result.thresholds[number]) for result in (self, pruned)]
            losses[f"{kind}_f1_loss"] = own_scores[f"{kind}_f1"] - pruned_scores[f"{kind}_f1"]
            losses[f"{kind}_f1_loss_interval"] = f1_loss_interval(*counts)
            key, both = f"{kind}_best_f1", [getattr(result, kind) for result in (self, pruned)]
            losses[f"{key}_loss"] = own_scores[key] - pruned_scores[key]
            losses[f"{key}_loss_interval"] = best_f1_loss_interval(*both)
        return losses


@dataclass(frozen=True)
class Pages:
    """Documents, without their text, with their windows, which are cut once and used for every model.

    annotators: how many must give an answer before a document counts as having one; 1 where every document
    has one annotator only, as in training files.
    """

    documents: Sequence[Document]
    windows: Sequence[NqWindow]
    annotators: int

    noun, score_lines, metric_digits = "questions", SCORES, 4

    def __len__(self) -> int:
        return len(self.documents)

    def arrival_lengths(self) -> list[int]:
        """The windows' lengths in tokens, in arrival order."""
        by_document: list[list[int]] = [[] for _ in self.documents]
        for window in self.windows:
            by_document[window.document].append(len(window))
        return arrival_lengths(by_document)

    def best_thresholds(self, model: PreTrainedModel) -> dict[str, float]:
        """The thresholds under which long and short F1 of `model` are best here, the mean over resamples of
        the documents, by their fields' names."""
        result = self.evaluate(model, {LONG: 0.0, SHORT: 0.0})
        return {LONG: mean_threshold(result.long), SHORT: mean_threshold(result.short)}

    def best_fields(self, model: PreTrainedModel) -> dict[str, Any]:
        """The best thresholds: nothing else is chosen on these documents."""
        return dict(self.best_thresholds(model))

    def evaluate(self, model: PreTrainedModel, thresholds: Mapping[str, float]) -> NqResult:
        """The result of `model`, which runs packed meanwhile, on all processes."""
        with optimized(model):
            logits = shared(partial(model_logits, model, 32), self.windows)
        answers = decode_documents(self.windows, logits, len(self.documents))
        predictions = predictions_json(self.documents, answers)
        gold = {document.id: document.labels for document in self.documents}
        long, short = score_answers(gold, parse_predictions(predictions), self.annotators)
        return NqResult(predictions, long, short, (thresholds[LONG], thresholds[SHORT]))


@dataclass(frozen=True)
class NaturalQuestionsTask:
    """Natural Questions with its options.

    max_length, stride: of windows, in tokens; neighbours share stride tokens (the paper gives the step
    instead). seed: of all draws. null_rate: the share of windows without an answer that is trained on.
    num_proc: processes that read and tokenise training files. skip_bad: leave out bad lines, and count them
    in `faults`.
    """

    max_length: int = 384
    stride: int = 128
    seed: int = 0
    null_rate: float = NULL_RATE
    num_proc: int = 1
    skip_bad: bool = False
    faults: DataFaults = field(default_factory=DataFaults, init=False, compare=False, repr=False)

    thresholds = (LONG, SHORT)

    def start_model(self, source: str, examples: NqFiles) -> PreTrainedModel:
        if is_natural_questions(AutoConfig.from_pretrained(source, trust_remote_code=False)):
            return load_natural_questions(source).float()
        return with_answer_types(load_to_fine_tune(source))

    def load_model(self, source: str, takes_int8: bool = False) -> PreTrainedModel:
        model = load_model(source, takes_int8)
        self.check_model(model)
        return model

    def check_model(self, model: PreTrainedModel) -> None:
        if not isinstance(model, PrunedBertForNaturalQuestions):
            raise ValueError(
                "the model has no answer types, which Natural Questions needs: make one with "
                "pruned-trainer finetune --task natural_questions"
            )

    def read(self, source: Path | str, split: str) -> NqFiles:
        return NqFiles(tuple(nq_files(source)))

    def read_training(self, source: Path, has_validation: bool) -> tuple[NqFiles, NqFiles | None]:
        """The training examples; without a validation file, 5% of the documents are held out."""
        files = tuple(nq_files(source))
        if has_validation:
            return NqFiles(files), None
        return NqFiles(files, HELD_OUT), NqFiles(files, HELD_OUT, held_out=True)

    def read_texts(self, source: Path, has_validation: bool) -> tuple[Any, Any]:
        raise ValueError(
            "natural_questions has no form without answers: --texts is for the tasks on rows of texts"
        )

    def to_choose_on(self, examples: NqFiles) -> NqFiles:
        """All of them."""
        return examples

    def describe(self, examples: NqFiles) -> str:
        names = ", ".join(path.name for path in examples.files)
        share = examples.fraction if examples.held_out else 1 - examples.fraction
        return f"{share:.0%} of {names}" if examples.fraction else names

    def prepare(
        self,
        examples: NqFiles,
        tokenizer: PreTrainedTokenizerFast,
        model: PreTrainedModel | None = None,
        teacher: PreTrainedModel | None = None,
    ) -> Pages:
        tokenizer, skipped = with_markers(tokenizer), Skipped() if self.skip_bad else None
        documents: list[Document] = []
        windows: list[NqWindow] = []
        for document in read_documents(examples.files, skipped):
            if is_held_out(document, examples.fraction, self.seed) == examples.held_out:
                with skipping(skipped):
                    page, cut_windows = cut_document(document, tokenizer, self.max_length, self.stride)
                    windows += [located(window, page, len(documents)) for window in cut_windows]
                    documents.append(document.without_text())
        self.faults.add(skipped)
        if examples.held_out and not documents:
            raise NqFormatError(
                f"{examples.files[0]}: the draw holds out {examples.fraction:.0%} of the documents, and none "
                "of so few: give a validation file"
            )
        annotators = max((len(document.labels) for document in documents), default=0)
        if not annotators:
            raise NqFormatError(f"{examples.files[0]}: no document has an annotation to score by")
        return Pages(documents, windows, min(annotators, MIN_ANNOTATORS))

    def features(
        self, examples: NqFiles, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel | None = None
    ) -> ArrowWindows:
        windows = training_windows(
            examples.files, with_markers(tokenizer), self.max_length, self.stride, self.null_rate, self.seed,
            self.num_proc, self.skip_bad, examples.fraction,
        )  # fmt: skip
        self.faults.add(windows.skipped)
        return windows

    def to_fine_tune(
        self, examples: NqFiles, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
    ) -> tuple[nn.Module, ArrowWindows]:
        return model, self.features(examples, tokenizer, model)
