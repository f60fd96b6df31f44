"""QuestionAnswerer: questions and texts in, answers out, for one question or for millions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from os import PathLike
from typing import Any, overload

import torch

from pruned_ops.checkpoints.loading import (
    HALVES,
    cast_and_dtype,
    checked_device,
    default_device,
    load_model,
    load_tokenizer,
)
from pruned_ops.models.configuration import ScoreCalibration
from pruned_ops.models.inputs import longest_sequence
from pruned_ops.models.stock import is_encoder_class
from pruned_ops.qa.answer_stream import AnswerStream, Reading
from pruned_ops.qa.decoding import Answer, Decoded
from pruned_ops.qa.windows import RefusedQuestion, check_cut, check_pairs, window_sizes
from pruned_ops.runtime.arrivals import ForkLock, is_there
from pruned_ops.runtime.batch_runner import TOKENS_ON_A_CPU, TOKENS_ON_A_GPU
from pruned_ops.runtime.optimize import optimize, own_dtype
from pruned_ops.shape import checked_int

# The heads of transformers' own classes that find no answer in a text, by their names.
_OTHER_HEAD = re.compile(
    "For(SequenceClassification|TokenClassification|MaskedLM|MultipleChoice|NextSentencePrediction|"
    "PreTraining|CausalLM)$|LMHeadModel$"
)


class QuestionAnswerer:
    """Answers questions out of texts of any length with an encoder that `optimize` takes, stock or pruned.

    model: a checkpoint's folder or hub name, or a question-answering model. A model that is passed in is
    optimised in place and stays so until `pruned_ops.restore(model)`.
    tokenizer: the fast tokenizer beside the model, or its folder or hub name; needed with a model that is
    passed in.
    device: where the model runs; by default a checkpoint goes to the GPU where there is one, and a model
    passed in stays where it is. dtype: None, or "bfloat16" or "int8" on a CPU (see `optimize`); on a GPU
    "float16" or "bfloat16", in which all of a checkpoint runs then (cast a model that is passed in yourself).
    None leaves a model that is optimised already as it is, say with what a calibration chose.
    max_length, stride: tokens of a window, and tokens that two neighbouring windows of a text share; by
    default 384 (less where the model takes less) and a third of it. max_answer_tokens: tokens of the longest
    answer. null_score_threshold: the answer is "" where the score of "no answer" exceeds the best span's by
    more than this; by default the checkpoint's own, which the trainer chose on validation questions, else 0.
    tokens_per_batch: tokens of a batch, padding included; by default 4,096 on a CPU, and 16,384 on a GPU.

    Scores: the probability that an answer is right, by the checkpoint's `score_calibration`, which the
    trainer fitted on the validation questions with the checkpoint's own threshold. A checkpoint without one
    gives the plain softmax over its 20 best spans and no answer, which nobody has compared with how often
    such answers are right.

    Errors: OSError where there is no checkpoint; ValueError for a checkpoint of another kind, for a model
    that `optimize` does not take, and for settings that the model does not allow.
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
        tokens_per_batch: int | None = None,
    ) -> None:
        if isinstance(tokenizer, (str, PathLike)):
            tokenizer = load_tokenizer(str(tokenizer))
        is_loaded = isinstance(model, (str, PathLike))
        if is_loaded:
            tokenizer = load_tokenizer(str(model)) if tokenizer is None else tokenizer
            model = load_model(str(model), takes_int8=True)
            device = default_device(model) if device is None else device
        elif tokenizer is None:
            raise ValueError(f"a {type(model).__name__} has no tokenizer with it: pass its tokenizer too")
        _check_kind(model)
        config = model.config
        max_length, stride = window_sizes(longest_sequence(config), max_length, stride)
        if device is not None:
            device = checked_device(device)
        if tokens_per_batch is None:  # as for `encode_many`: few rows leave most of a GPU idle
            place = next(model.parameters()).device if device is None else device
            tokens_per_batch = TOKENS_ON_A_GPU if place.type == "cuda" else TOKENS_ON_A_CPU
        self.reading = Reading(max_length, stride, max_answer_tokens, tokens_per_batch=tokens_per_batch)
        _check_reading(self.reading, config, tokenizer)
        if null_score_threshold is None:
            null_score_threshold = getattr(config, "null_score_threshold", 0.0)
        self.null_score_threshold = _checked_threshold(null_score_threshold)
        stored = getattr(config, "score_calibration", None)
        self.calibration = ScoreCalibration() if stored is None else ScoreCalibration.parse(stored)
        if device is not None:
            model = model.to(device)
        if dtype in HALVES and is_loaded:
            cast, dtype = cast_and_dtype(dtype, model.device)
            model = model.to(cast or model.dtype)
        dtype = own_dtype(model) if dtype is None else dtype
        self.model, self.tokenizer = optimize(model, dtype=dtype), tokenizer
        # Held while the tokenizer works: it takes no two callers at once.
        self.lock = ForkLock()

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
        keep_refused: bool = False,
    ) -> list[Any]: ...
    def answer(
        self,
        question: str | Sequence[str],
        context: str | Sequence[str],
        top_k: int | None = None,
        allow_none: bool = True,
        keep_refused: bool = False,
    ) -> Any:
        """The answer to a question out of a context, or a list of answers to lists of the same length.

        One context may go with many questions, and one question with many contexts. top_k: gives in place of
        each answer a list of at most so many, likeliest first. allow_none: whether "" (from 0 to 0) may be
        the answer; without it the answer is the best span, and "" only where the context holds no token.
        keep_refused: gives a RefusedQuestion in the place of an entry that cannot be asked, so that it does
        not cost the others their answers.
        Errors: TypeError for arguments that are neither strings nor lists; RefusedQuestion, a ValueError,
        with the index of an entry that is no text, or of a question that leaves no room for its context.
        """
        questions, contexts = _lists(question, context)
        pairs = list(zip(questions, contexts, strict=True))
        answers = list(self.stream(pairs, top_k, allow_none, progress=False, keep_refused=keep_refused))
        return answers[0] if isinstance(question, str) and isinstance(context, str) else answers

    def stream(
        self,
        records: Iterable[Any],
        top_k: int | None = None,
        allow_none: bool = True,
        progress: bool = True,
        keep_refused: bool = False,
    ) -> Iterator[Any]:
        """The answers to any number of questions, in their order, in memory that does not grow with them.

        records: mappings with `question` and `context` (say a `datasets.Dataset`, or JSON objects), or pairs
        of texts. Some are read ahead (1,600 at most), so answers come in bursts. A generator is read in a
        thread of the stream's own; where its next record is waited for, those before it are answered at once.
        Which windows share a batch depends on when records came then, and with it a score's last bits.
        top_k: gives a list of at most so many Answers for each question, in place of one Answer. progress:
        shows a bar on stderr. keep_refused: gives a RefusedQuestion in the place of a record that cannot be
        asked; without it, the RefusedQuestion is raised after the answers to the records before it. So is an
        error of `records`. A forked child that goes on with its parent's stream gets a RuntimeError.
        """
        if top_k is not None:
            checked_int("top_k", top_k, 1)
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
        self,
        records: Iterable[Any],
        reading: Reading,
        progress: bool = False,
        are_there: bool | None = None,
    ) -> Iterator[Decoded | RefusedQuestion]:
        """Every record's best spans and null score, in logits, of which `stream` chooses the answers.

        are_there: whether no record has to be waited for; by default what `is_there` says of `records`."""
        _check_reading(reading, self.model.config, self.tokenizer)
        are_there = is_there(records) if are_there is None else are_there
        stream = AnswerStream(self.model, self.tokenizer, records, are_there, reading, self.lock)
        if not progress:
            yield from stream
            return
        from tqdm.auto import tqdm  # only for those who ask for a bar

        total = len(records) if isinstance(records, Sized) else None
        with tqdm(total=total, desc="answers", unit=" questions") as bar:
            for decoded in stream:
                yield decoded
                bar.update()


def _check_kind(model: Any) -> None:
    """ValueError for a classifier and other models without start and end logits, before they are changed."""
    name = type(model).__name__
    head = _OTHER_HEAD.search(name)
    if head is not None or any(map(is_encoder_class, type(model).__mro__)):
        raise ValueError(
            f"a {name} gives no start and end logits, of which answers are made; a question-answering model "
            f"is needed (pruned_ops.optimize(model) makes a {name} fast, for its own calls)"
        )


def _check_reading(reading: Reading, config: Any, tokenizer: Any) -> None:
    """ValueError for windows that are too long for the model; `check_cut`'s errors."""
    window_sizes(longest_sequence(config), reading.max_length, reading.stride)
    check_cut(tokenizer, reading.max_length, reading.stride)


def _checked_threshold(value: Any) -> float:
    """The threshold as a float; ValueError for NaN, -inf and anything that is no number."""
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
    check_pairs(question, context)
    return question, context
