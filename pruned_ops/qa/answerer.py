"""QuestionAnswerer: questions and texts in, answers out, at any scale."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from os import PathLike
from pathlib import Path
from threading import Lock
from typing import Any, overload

import torch

from pruned_ops.checkpoints.loading import checked_device, load_model, load_tokenizer
from pruned_ops.models.configuration import ScoreCalibration
from pruned_ops.models.inputs import longest_sequence
from pruned_ops.qa.answer_stream import AnswerStream, Reading
from pruned_ops.qa.decoding import Answer, Decoded
from pruned_ops.qa.windows import RefusedQuestion, check_cut
from pruned_ops.runtime.optimize import optimize

# As in Hugging Face's question-answering scripts, and this project's trainer.
_MAX_LENGTH, _STRIDE_PARTS = 384, 3


class QuestionAnswerer:
    """Answers questions out of texts of any length with a BERT or RoBERTa, stock or pruned.

    model: a checkpoint's folder or hub name, or a question-answering model. A model that is passed in is
    optimised in place and stays so: its own weights read as NaN until `pruned_ops.restore(model)`.
    tokenizer: the fast tokenizer beside the model; needed with a model that is passed in.
    device: where the model runs; by default a checkpoint goes to the GPU where there is one, and a model
    passed in stays where it is. dtype: None, or "int8" on a CPU (see `optimize`).
    max_length, stride: tokens of a window, and tokens that two windows of one text share; by default 384
    (less where the model takes less) and a third of it. max_answer_tokens: the longest answer.
    null_score_threshold: "no answer" is said where its score exceeds the best span's by more than this; by
    default the checkpoint's own, which the trainer chose on validation questions, else 0.
    tokens_per_batch: of the model's batches, padding included.

    Scores: the probability that an answer is right, as the checkpoint's `score_calibration` says, which the
    trainer fitted on the same questions, with the checkpoint's own threshold. A checkpoint without one gives
    the plain softmax over its 20 best spans and no answer: how often answers with such a score are right was
    never looked at.

    Errors: OSError where there is no checkpoint; ValueError for one that is none, for a model that `optimize`
    does not take, and for settings that the model does not allow.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        device: torch.device | str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        stride: int | None = None,
        max_answer_tokens: int = 30,
        null_score_threshold: float | None = None,
        tokens_per_batch: int = 4096,
    ) -> None:
        if isinstance(model, (str, PathLike)):
            if Path(model).is_absolute() and not Path(model).is_dir():  # a hub name is never that
                raise FileNotFoundError(f"there is no folder {model}")
            tokenizer = load_tokenizer(str(model)) if tokenizer is None else tokenizer
            model = load_model(str(model))
            device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
        elif tokenizer is None:
            raise ValueError(f"a {type(model).__name__} has no tokenizer with it: pass its tokenizer too")
        config = model.config
        if max_length is None:
            max_length = min(_MAX_LENGTH, longest_sequence(config))
        stride = max_length // _STRIDE_PARTS if stride is None else stride
        self.reading = Reading(max_length, stride, max_answer_tokens, tokens_per_batch=tokens_per_batch)
        _check_reading(self.reading, config, tokenizer)
        if null_score_threshold is None:
            null_score_threshold = getattr(config, "null_score_threshold", 0.0)
        self.null_score_threshold = _checked_threshold(null_score_threshold)
        stored = getattr(config, "score_calibration", None)
        self.calibration = ScoreCalibration() if stored is None else ScoreCalibration.parse(stored)
        if device is not None:
            model = model.to(checked_device(device))
        self.model, self.tokenizer = optimize(model, dtype=dtype), tokenizer
        self.lock = Lock()  # held while the tokenizer works: it takes no two callers at once

    @overload
    def answer(  # type: ignore[overload-overlap]  # a string is a sequence of strings, too
        self, question: str, context: str, top_k: None = None, allow_none: bool = True
    ) -> Answer: ...
    @overload
    def answer(self, question: str, context: str, top_k: int, allow_none: bool = True) -> list[Answer]: ...
    @overload
    def answer(
        self,
        question: Sequence[str],
        context: str | Sequence[str],
        top_k: int | None = None,
        allow_none: bool = True,
    ) -> list[Any]: ...
    def answer(
        self,
        question: str | Sequence[str],
        context: str | Sequence[str],
        top_k: int | None = None,
        allow_none: bool = True,
    ) -> Any:
        """The answer to a question out of a context, or the list of them to lists of the same length.

        One context may go with many questions, one question with many contexts. top_k: a list of as many
        answers at most instead of each answer, likeliest first. allow_none: whether "" (at 0 to 0) may be the
        answer; without it the best span is, and "" only where the context holds no token.
        Errors: TypeError for what is neither a string nor a list; RefusedQuestion, a ValueError, with the
        index of what is no text, or of a question that leaves no room for its context in a window.
        """
        questions, contexts = _lists(question, context)
        found = list(self.stream(zip(questions, contexts, strict=True), top_k, allow_none, progress=False))
        return found[0] if isinstance(question, str) and isinstance(context, str) else found

    def stream(
        self,
        records: Iterable[Any],
        top_k: int | None = None,
        allow_none: bool = True,
        progress: bool = True,
        keep_refused: bool = False,
    ) -> Iterator[Any]:
        """The answers to any number of questions, in their order, in memory that does not grow with them.

        records: mappings with `question` and `context` (a `datasets.Dataset`, what `json.loads` gives), or
        pairs. About a thousand at most are read ahead, so answers come in bursts. progress: a bar on stderr.
        Each answer is an Answer; with top_k, a list of as many at most. keep_refused: a record that cannot be
        asked gives a RefusedQuestion in its place; without it this is raised after the answers before it.
        An error of `records` itself, too, is raised after them.
        """
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k is {top_k!r}; a whole number of at least 1, or None, is needed")
        if isinstance(records, (str, bytes)) or not isinstance(records, Iterable):
            raise TypeError(f"records are a {type(records).__name__}; an iterable of questions is needed")
        return self._answers(records, top_k, allow_none, progress, keep_refused)

    def _answers(
        self, records: Iterable[Any], top_k: int | None, allow_none: bool, progress: bool, keep_refused: bool
    ) -> Iterator[Any]:
        reading = replace(self.reading, n_best=max(self.reading.n_best, top_k or 1))
        for decoded in self.decoded(records, reading, progress):
            if isinstance(decoded, RefusedQuestion):
                if not keep_refused:
                    raise decoded
                yield decoded
                continue
            ranked = decoded.ranked(self.null_score_threshold, self.calibration, allow_none)
            yield ranked[0] if top_k is None else ranked[:top_k]

    def decoded(
        self, records: Iterable[Any], reading: Reading, progress: bool = False
    ) -> Iterator[Decoded | RefusedQuestion]:
        """What `stream` chooses from: every record's best spans and null score, in logits."""
        _check_reading(reading, self.model.config, self.tokenizer)
        stream = AnswerStream(self.model, self.tokenizer, records, reading, self.lock)
        if not progress:
            yield from stream
            return
        from tqdm.auto import tqdm  # only for those who ask for a bar

        total = len(records) if isinstance(records, Sized) else None
        with tqdm(total=total, desc="answers", unit=" questions") as bar:
            for one in stream:
                yield one
                bar.update()


def _check_reading(reading: Reading, config: Any, tokenizer: Any) -> None:
    """ValueError for windows that the model does not take; see `check_cut` for what else."""
    longest = longest_sequence(config)
    if reading.max_length > longest:
        raise ValueError(
            f"windows of {reading.max_length} tokens are too long: the model takes sequences of {longest}"
        )
    check_cut(tokenizer, reading.max_length, reading.stride)


def _checked_threshold(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > float("-inf"):
        raise ValueError(f"null_score_threshold is {value!r}; a number is needed (inf: never no answer)")
    return float(value)


def _lists(question: Any, context: Any) -> tuple[Sequence[str], Sequence[str]]:
    """Both as lists of one length; a single string is repeated."""
    for name, value in (("question", question), ("context", context)):
        if isinstance(value, (bytes, dict)) or not isinstance(value, (str, Sequence)):
            raise TypeError(f"{name} is a {type(value).__name__}; a string, or a list of them, is needed")
    if isinstance(question, str):
        question = [question] * (1 if isinstance(context, str) else len(context))
    if isinstance(context, str):
        context = [context] * len(question)
    if len(question) != len(context):
        raise ValueError(f"{len(question)} questions, but {len(context)} contexts: one context a question")
    return question, context
