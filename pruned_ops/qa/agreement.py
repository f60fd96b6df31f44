"""Whether every way of running a model says what the saved model says; `pruned-ops check`.

The saved model runs padded, in plain torch. It, the optimised model and every backend are held against the
saved model in fp64, at real tokens. An error of a few times the saved model's own rounding error is rounding;
more is a fault.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pruned_ops.models.inputs import longest_sequence, padding_id
from pruned_ops.models.int8_checkpoints import dequantised
from pruned_ops.ops.registry import BackendError, record, use_backend
from pruned_ops.qa.decoding import Logits, decode
from pruned_ops.qa.logits import batch_logits
from pruned_ops.qa.questions import Question, answer_scores
from pruned_ops.qa.windows import RefusedQuestion, Window, window_sizes, windows
from pruned_ops.runtime.batch_runner import padded
from pruned_ops.runtime.int8_choice import TOLERANCE, relative_error
from pruned_ops.runtime.known_heads import gives_answers, gives_labels
from pruned_ops.runtime.optimize import optimized

SAVED, OPTIMISED = "saved", "optimised"
NARROW = ("bfloat16", "int8")  # the dtypes of `optimize` that are no rounding of fp32
BATCH_SIZE = 8
# An op of a backend may err twice as much as plain torch does, plus SLACK. The errors of a model's ops add
# up, in each backend in another way: twice that is allowed. A fault is hundreds of times as large.
TIMES, SLACK = 4, 1e-5
# The texts where none are given. Their lengths differ, so that batches are padded.
SAMPLE = (
    Question("Who wrote the first program?", "Ada Lovelace wrote it."),
    Question(
        "Which river flows through the town?",
        "The town lies on both banks of the Avon, a slow river with willows along it. Its market has been "
        "held on Thursdays since 1284, and on that day the two bridges are closed to carts.",
    ),
    Question("When did the library open?", "It opened in 1905 (the reading room in 1911)."),
    Question(
        "What is pruned from the model?",
        "A transformer has more attention heads than it needs, and its feed-forward layers are wider than "
        "they have to be. Pruning finds out which of them hardly change what the model says, and takes them "
        "out of the weights for good. What is left is an ordinary model with smaller matrices: it needs less "
        "memory and less time, and it is trained on for a while so that it gets back what it lost. How much "
        "can go depends on the task; on reading comprehension about half of the work can often be saved.",
    ),
)


@dataclass(frozen=True)
class Material:
    """The windows that are run, in the order of their questions. name: what the user reads of them."""

    name: str
    questions: list[Question]
    windows: list[Window]

    @property
    def is_scored(self) -> bool:
        """Whether the right answers are known to every question."""
        return all(question.answers is not None for question in self.questions)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.windows))


@dataclass(frozen=True)
class Finding:
    """How one way of running the model did.

    error: the largest difference from the fp64 model's outputs. difference: the largest from the saved
    model's. relative: all differences together, relative to how much the saved model's outputs vary. f1: in
    percent, where the right answers are known. changed: how many questions got another answer than from the
    saved model, or how many windows another label; None where the model says neither. ran: op -> the backends
    that ran it, with how often.
    """

    name: str
    error: float
    difference: float
    relative: float
    f1: float | None
    changed: int | None
    ran: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The findings, the saved model's first. refused: the ways that could not run, with the reasons. allowed:
    the largest error that counts as rounding. tolerance: the largest `relative` of NARROW ones. same_weights:
    of a model that was loaded from int8 weights, whether what the kernels read is what was loaded, bit for
    bit; None for any other."""

    findings: tuple[Finding, ...]
    refused: Mapping[str, str]
    allowed: float
    tolerance: float = TOLERANCE
    same_weights: bool | None = None

    @property
    def faulty(self) -> list[str]:
        """The ways that err by more. A NaN counts as more."""
        return [finding.name for finding in self.findings[1:] if not self._passes(finding)]

    def _passes(self, finding: Finding) -> bool:
        if finding.name in NARROW:
            return finding.relative <= self.tolerance
        return finding.error <= self.allowed


def cut_material(
    tokenizer: Any, config: Any, name: str, questions: list[Question], skipped: list[str] | None = None
) -> Material:
    """The questions' windows, cut as the trainer's evaluation cuts them. skipped: collects what is wrong with
    each question that cannot be cut, which is then left out."""
    texts = [question.question for question in questions]
    contexts = [question.context for question in questions]
    refused: list[RefusedQuestion] = []
    collected = None if skipped is None else refused
    sizes = window_sizes(longest_sequence(config))
    cut = windows(tokenizer, texts, contexts, *sizes, refused=collected)
    if skipped is None or not refused:
        return Material(name, questions, cut)
    skipped += [str(error) for error in refused]
    bad = {error.index for error in refused}
    left = [question for index, question in enumerate(questions) if index not in bad]
    if not left:
        raise ValueError(f"{name}: no question can be asked; {refused[0]}")
    return cut_material(tokenizer, config, name, left)


def check(
    model: Any,
    material: Material,
    backends: Sequence[str],
    must_run: bool = False,
    dtype: str | None = None,
    tolerance: float = TOLERANCE,
) -> Report:
    """Run `model`, a saved one, in every way; it is as before afterwards.

    must_run: a backend that refuses is an error (ValueError), not a line of the report. dtype: run the
    optimised model with all linears in this one, too (see `optimize`). A model that was loaded from int8
    weights is held against these weights in fp32, and runs in int8, too. Errors: ValueError where it cannot.
    """
    loaded, model, same_weights = model, dequantised(model), None
    if loaded is not model:
        if dtype not in (None, "int8"):
            raise ValueError(f"the model's weights are stored in int8: it runs in int8, and not in {dtype}")
        dtype, same_weights = "int8", _keeps_weights(loaded)
    saved, _ = logits_of(model, material)
    truth, _ = logits_of(copy.deepcopy(model).double(), material)
    own_error = _largest(saved, truth)
    answers = _said(model, material, saved)
    findings, refused = [Finding(SAVED, own_error, 0.0, 0.0, _f1(model, answers, material), 0)], {}
    for name in (OPTIMISED, *backends, *([] if dtype is None else [dtype])):
        try:
            with ExitStack() as stack:
                if name in backends:
                    stack.enter_context(use_backend(name))
                narrow = name == dtype
                fast = stack.enter_context(optimized(loaded if narrow else model, dtype if narrow else None))
                logits, ran = logits_of(fast, material)
        except BackendError as reason:
            if must_run:
                raise ValueError(str(reason)) from reason
            refused[name] = str(reason)
            continue
        error, difference = _largest(logits, truth), _largest(logits, saved)
        f1, changed = None, None if answers is None else len(answers)
        # Nothing can be read from outputs that are not finite.
        fast_answers = _said(model, material, logits) if np.isfinite(error) else None
        if answers is not None and fast_answers is not None:
            f1 = _f1(model, fast_answers, material)
            changed = sum(
                answer != fast_answer for answer, fast_answer in zip(answers, fast_answers, strict=True)
            )
        findings.append(
            Finding(name, error, difference, _relative(logits, saved, gives_answers(model)), f1, changed, ran)
        )
    return Report(tuple(findings), refused, TIMES * own_error + SLACK, tolerance, same_weights)


def _keeps_weights(model: Any) -> bool:
    """Whether a model has the same weights, bit for bit, when kernels have laid them out."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with optimized(model) as fast:
        after = fast.state_dict()
        return all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def logits_of(model: Any, material: Material) -> tuple[list[Logits], dict[str, dict[str, int]]]:
    """Every window's logits, or what else the model gives, without padding, and how often which backend ran
    each op."""
    logits: list[Logits] = []
    with torch.inference_mode(), record() as ran:
        for first in range(0, len(material.windows), BATCH_SIZE):
            batch = material.windows[first : first + BATCH_SIZE]
            if gives_answers(model):
                logits += batch_logits(model, batch, padding_id(model.config), model.device)
            else:
                logits += _batch_outputs(model, batch)
    return logits, {op: dict(counts) for op, counts in ran.items()}


def _batch_outputs(model: Any, batch: Sequence[Window]) -> Iterator[Any]:
    """The outputs of a model without answers, for each window: of a text as they are, of its tokens without
    padding."""
    inputs = padded(batch, padding_id(model.config)).items()
    output = model(**{name: tensor.to(model.device) for name, tensor in inputs})
    named = {
        name: tensor.cpu().numpy() for name, tensor in output.items() if isinstance(tensor, torch.Tensor)
    }
    for row, window in enumerate(batch):
        yield tuple(array[row, : len(window)] if array.ndim == 3 else array[row] for array in named.values())


def _largest(logits: list[Logits], expected: list[Logits]) -> float:
    """The largest difference of two runs' logits; NaN where there is one."""
    differences = [
        np.abs(array.astype(np.float64) - expected_array).max()
        for window, expected_window in zip(logits, expected, strict=True)
        for array, expected_array in zip(window, expected_window, strict=True)
    ]
    return float(np.max(differences))


def _said(model: Any, material: Material, logits: list[Logits]) -> list[str] | None:
    """Return the answer to each question, or the labels of each window; None for a model that gives
    neither."""
    if gives_answers(model):
        return _answers(model.config, material, logits)
    if not gives_labels(model) or model.config.num_labels < 2:
        return None
    return [str(window[0].argmax(-1).tolist()) for window in logits]


def _relative(logits: list[Logits], expected: list[Logits], have_spans: bool) -> float:
    """How far two runs' logits are apart, as `optimize` judges int8 (see `relative_error`). have_spans:
    whether the first two outputs are scores of a start and an end, a number for each token."""

    def rows(run: list[Logits]) -> list[Tensor]:
        """Each output of all windows, a row for each token, or for each window."""
        outputs = []
        for place, arrays in enumerate(zip(*run, strict=True)):
            of_tokens = arrays[0].ndim > 1 or (have_spans and place < 2)
            rows = [array.reshape(len(array) if of_tokens else 1, -1) for array in arrays]
            outputs.append(torch.from_numpy(np.concatenate(rows).astype(np.float64)))
        return outputs

    return relative_error(rows(logits), rows(expected))


def _answers(config: Any, material: Material, logits: list[Logits]) -> list[str]:
    """The answer to each question, at the checkpoint's own threshold."""
    contexts = [question.context for question in material.questions]
    threshold = getattr(config, "null_score_threshold", 0.0)
    return [decoded.answer(threshold).answer for decoded in decode(material.windows, logits, contexts)]


def _f1(model: Any, answers: list[str] | None, material: Material) -> float | None:
    """The mean F1 in percent; None where a right answer is not known, or the model gives none."""
    if answers is None or not material.is_scored or not gives_answers(model):
        return None
    pairs = zip(answers, material.questions, strict=True)
    return statistics.fmean(answer_scores(answer, question.answers or ())[1] for answer, question in pairs)
