"""Natural Questions as a task of the pruning job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForQuestionAnswering, PreTrainedModel, PreTrainedTokenizerFast

from pruned_ops import PrunedBertForNaturalQuestions
from pruned_ops.models.heads import is_natural_questions, load_natural_questions, with_answer_types
from pruned_ops.qa.questions import arrival_lengths
from pruned_ops.runtime.optimize import optimized
from pruned_trainer.distributed import is_main, shared
from pruned_trainer.tasks.natural_questions.documents import (
    Document,
    NqFormatError,
    Skipped,
    nq_files,
    read_documents,
)
from pruned_trainer.tasks.natural_questions.metrics import (
    MIN_ANNOTATORS,
    AnswerStats,
    best_threshold,
    f1_loss_interval,
    kind_metrics,
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
from pruned_trainer.tasks.task import model_logits

LONG, SHORT = "long_score_threshold", "short_score_threshold"
# Of the windows without an answer: the share that the paper's own code trains on.
NULL_RATE = 0.02
# Of the training documents, where no validation file is given.
HELD_OUT = 0.05


@dataclass(frozen=True)
class NqFiles:
    """Files that are read when they are cut. fraction: the share of documents that is held out (0: none);
    held_out: whether these examples are that share, or the others."""

    files: tuple[Path, ...]
    fraction: float = 0.0
    held_out: bool = False


@dataclass(frozen=True, eq=False)
class NqResult:
    """What a model reaches: the official prediction file's content, and statistics of long and short answers.
    metrics: the official evaluator's keys (fractions). thresholds: LONG's and SHORT's."""

    predictions: dict[str, Any]
    long: AnswerStats
    short: AnswerStats
    thresholds: tuple[float, float]

    def scores(self) -> dict[str, Any]:
        """long_f1, short_f1: at the thresholds, in percent."""
        return {
            "long_f1": 100 * self.long.f1_at(self.thresholds[0]),
            "short_f1": 100 * self.short.f1_at(self.thresholds[1]),
            "metrics": {**kind_metrics(self.long, "long-"), **kind_metrics(self.short, "short-")},
        }

    def losses(self, pruned: NqResult) -> dict[str, Any]:
        found: dict[str, Any] = {}
        mine, others = self.scores(), pruned.scores()
        for number, kind in enumerate(("long", "short")):
            counts = [getattr(one, kind).counts_at(one.thresholds[number]) for one in (self, pruned)]
            found[f"{kind}_f1_loss"] = mine[f"{kind}_f1"] - others[f"{kind}_f1"]
            found[f"{kind}_f1_loss_interval"] = f1_loss_interval(*counts)
        return found


@dataclass(frozen=True)
class Pages:
    """Documents (without their text) with their windows: cut once, in memory, used for every model.

    annotators: how many must give an answer; 1 where every document has one only, as in training files.
    """

    documents: Sequence[Document]
    windows: Sequence[NqWindow]
    annotators: int

    def __len__(self) -> int:
        return len(self.documents)

    def arrival_lengths(self) -> list[int]:
        """Window lengths in arrival order, in tokens."""
        by_document: list[list[int]] = [[] for _ in self.documents]
        for window in self.windows:
            by_document[window.document].append(len(window))
        return arrival_lengths(by_document)

    def best_thresholds(self, model: PreTrainedModel) -> dict[str, float]:
        result = self.evaluate(model, {LONG: 0.0, SHORT: 0.0})
        return {LONG: best_threshold(result.long), SHORT: best_threshold(result.short)}

    def best_fields(self, model: PreTrainedModel) -> dict[str, Any]:
        return {**self.best_thresholds(model)}

    def evaluate(self, model: PreTrainedModel, thresholds: Mapping[str, float]) -> NqResult:
        with optimized(model):
            logits = shared(partial(model_logits, model, 32), self.windows)
        answers = decode_documents(self.windows, logits, len(self.documents))
        predictions = predictions_json(self.documents, answers)
        gold = {document.id: document.labels for document in self.documents}
        long, short = score_answers(gold, parse_predictions(predictions), self.annotators)
        return NqResult(predictions, long, short, (thresholds[LONG], thresholds[SHORT]))


@dataclass(frozen=True)
class NaturalQuestionsTask:
    """max_length, stride: of windows, in tokens; stride is what neighbours share (the paper gives the step).
    null_rate: the share of windows without an answer that is trained on. num_proc: processes that read and
    tokenise training files. skip_bad: leave out bad lines, and count them. seed: of what is drawn."""

    max_length: int = 384
    stride: int = 128
    seed: int = 0
    null_rate: float = NULL_RATE
    num_proc: int = 1
    skip_bad: bool = False

    thresholds = (LONG, SHORT)

    def start_model(self, source: str) -> PreTrainedModel:
        if is_natural_questions(AutoConfig.from_pretrained(source)):
            return load_natural_questions(source)
        return with_answer_types(AutoModelForQuestionAnswering.from_pretrained(source))

    def check_model(self, model: PreTrainedModel) -> None:
        if not isinstance(model, PrunedBertForNaturalQuestions):
            raise ValueError(
                "the model has no answer types, which Natural Questions needs: make one with "
                "pruned-trainer finetune --task natural_questions"
            )

    def read(self, source: Path | str, split: str) -> NqFiles:
        return NqFiles(tuple(nq_files(source)))

    def read_training(self, source: Path, has_validation: bool) -> tuple[NqFiles, NqFiles | None]:
        """Without a validation file 5% of the training documents serve."""
        files = tuple(nq_files(source))
        if has_validation:
            return NqFiles(files), None
        return NqFiles(files, HELD_OUT), NqFiles(files, HELD_OUT, held_out=True)

    def describe(self, examples: NqFiles) -> str:
        share = f"{examples.fraction if examples.held_out else 1 - examples.fraction:.0%} of "
        return f"{share if examples.fraction else ''}{', '.join(path.name for path in examples.files)}"

    def prepare(self, examples: NqFiles, tokenizer: PreTrainedTokenizerFast) -> Pages:
        tokenizer, skipped = with_markers(tokenizer), Skipped() if self.skip_bad else None
        documents: list[Document] = []
        windows: list[NqWindow] = []
        for document in read_documents(examples.files, skipped):
            if is_held_out(document, examples.fraction, self.seed) == examples.held_out:
                page, found = cut_document(document, tokenizer, self.max_length, self.stride)
                windows += [located(window, page, len(documents)) for window in found]
                documents.append(document.without_text())
        if not examples.held_out:  # else the training's reader, who meets the same lines, says it
            report_skipped(skipped)
        most = max((len(document.labels) for document in documents), default=0)
        if not most:
            raise NqFormatError(f"{examples.files[0]}: no document has an annotation to score by")
        return Pages(documents, windows, min(most, MIN_ANNOTATORS))

    def features(self, examples: NqFiles, tokenizer: PreTrainedTokenizerFast) -> ArrowWindows:
        found = training_windows(
            examples.files, with_markers(tokenizer), self.max_length, self.stride, self.null_rate, self.seed,
            self.num_proc, self.skip_bad, examples.fraction,
        )  # fmt: skip
        report_skipped(found.skipped)
        return found


def report_skipped(skipped: Skipped | None) -> None:
    """Say how many lines were left out, and why the first one was."""
    if skipped and is_main():
        print(f"-- bad lines skipped: {len(skipped)}; the first: {skipped.faults[0]}", flush=True)
