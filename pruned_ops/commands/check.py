"""`pruned-ops check`: whether the optimised model says what the saved one says, on the user's own text.

The saved model runs padded, in plain torch. It, the optimised model and every backend are held against the
saved model in fp64, at real tokens. An error of a few times the saved model's own rounding error is rounding;
more is a fault.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pruned_ops.checkpoints.loading import load_folder, load_tokenizer
from pruned_ops.models.inputs import longest_sequence
from pruned_ops.ops.registry import BACKENDS, REFERENCE, BackendError, record, use_backend
from pruned_ops.qa.decoding import Logits, decode
from pruned_ops.qa.logits import batch_logits
from pruned_ops.qa.questions import Question, answer_scores, in_arrival_order, read_questions
from pruned_ops.qa.windows import Window, windows
from pruned_ops.runtime.optimize import optimized

SAVED, OPTIMISED = "saved", "optimised"
BATCH_SIZE, MAX_LENGTH = 8, 384
# An op of a backend may err twice as much as plain torch does, plus SLACK. The errors of a model's ops add
# up, in each backend in another way: twice that is allowed. What is wrong is off by hundreds of times it.
TIMES, SLACK = 4, 1e-5
# What is checked where no text is given: lengths that differ, so that batches are padded.
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
    """What is run: windows in the order of their questions. name: what it is called on the screen."""

    name: str
    questions: list[Question]
    windows: list[Window]

    @property
    def is_scored(self) -> bool:
        """Whether the right answers are known to every question."""
        return all(one.answers is not None for one in self.questions)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.windows))


@dataclass(frozen=True)
class Finding:
    """How one way of running the model did.

    error: its largest from the fp64 model's logits. difference: its largest from the saved model's. f1: in
    percent, where the right answers are known. changed: questions answered otherwise than by the saved model.
    ran: op -> the backends that ran it.
    """

    name: str
    error: float
    difference: float
    f1: float | None
    changed: int
    ran: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The saved model's finding first. refused: way -> why it could not run; allowed: the largest error that
    is rounding."""

    findings: tuple[Finding, ...]
    refused: Mapping[str, str]
    allowed: float

    @property
    def faulty(self) -> list[str]:
        """The ways that err by more; a NaN is no small error."""
        return [one.name for one in self.findings[1:] if not one.error <= self.allowed]


def add_command(commands: Any) -> None:
    """The command's arguments."""
    one = commands.add_parser(
        "check",
        help="compare the optimised model with the saved one on your own text",
        description="Run the saved model (padded, plain torch), the optimised one and each backend on the "
        "same text, and compare their logits at real tokens; with right answers in --questions, F1 too. The "
        "exit status is 1 where one errs by more than rounding.",
    )
    one.set_defaults(run=run)
    one.add_argument("folder", type=Path, metavar="DIR", help="folder of a checkpoint with its tokenizer")
    text = one.add_mutually_exclusive_group()
    text.add_argument("--text-file", type=Path, help="text in UTF-8 (default: a short sample)")
    text.add_argument("--questions", type=Path, metavar="FILE", help="SQuAD-format JSON, or .jsonl")
    one.add_argument("--limit", type=int, default=200, help="so many questions at most (default: 200)")
    one.add_argument(
        "--backends",
        nargs="+",
        metavar="NAME",
        help="these backends must run (default: those that can here, Triton's interpreter left out)",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    one.add_argument("--device", default=device, help=f"where the model runs, in fp32 (here: {device})")


def run(arguments: argparse.Namespace) -> int:
    """Check, show, and the exit status: 1 where something differs by more than rounding."""
    if arguments.limit < 1:
        raise ValueError(f"--limit is {arguments.limit}; at least 1 is needed")
    backends = _backends(arguments.backends)
    questions = _questions(arguments)
    model = load_folder(arguments.folder, arguments.device)
    material = cut(load_tokenizer(str(arguments.folder)), model.config, *questions)
    report = check(model, material, backends, must_run=arguments.backends is not None)
    print(
        f"{arguments.folder}: {type(model).__name__} on {model.device}, {material.name}: "
        f"{len(material.windows)} windows of {material.tokens:,} tokens, in batches of {BATCH_SIZE} padded "
        "to their longest"
    )
    show(report, material)
    return 1 if report.faulty else 0


def _backends(asked: Sequence[str] | None) -> list[str]:
    """The names of what is to run; ValueError for one that was asked for and cannot."""
    if asked is None:
        ready = [one.name for one in BACKENDS.values() if one.missing is None and not one.on_demand]
        return [REFERENCE, *ready]
    for name in asked:
        if name != REFERENCE and name not in BACKENDS:
            raise ValueError(f"there is no backend {name!r}; there are {', '.join([REFERENCE, *BACKENDS])}")
        missing = BACKENDS[name].missing if name in BACKENDS else None
        if missing is not None:
            raise ValueError(f"backend {name!r} is not available: {missing}")
    return list(dict.fromkeys(asked))


def _questions(arguments: argparse.Namespace) -> tuple[str, list[Question]]:
    """What it is called, and what is asked of which text: of a text alone, nothing."""
    if arguments.text_file is not None:
        try:
            text = arguments.text_file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{arguments.text_file} is no UTF-8 text: {error}") from error
        if not text.strip():
            raise ValueError(f"{arguments.text_file} is empty: there is nothing to check on")
        return str(arguments.text_file), [Question("", text)]
    if arguments.questions is None:
        return "the built-in sample", list(SAMPLE)
    found = read_questions(arguments.questions)
    chosen = in_arrival_order(found, arguments.limit)
    which = f"{len(chosen)} of {len(found):,}" if len(chosen) < len(found) else f"all {len(found):,}"
    return f"{which} questions of {arguments.questions}", chosen


def cut(tokenizer: Any, config: Any, name: str, questions: list[Question]) -> Material:
    """The questions' windows, as the trainer's evaluation cuts them."""
    max_length = min(MAX_LENGTH, longest_sequence(config))
    asked, contexts = [one.question for one in questions], [one.context for one in questions]
    return Material(name, questions, windows(tokenizer, asked, contexts, max_length, max_length // 3))


def check(model: Any, material: Material, backends: Sequence[str], must_run: bool = False) -> Report:
    """Run `model`, a saved one, in every way; it is as before afterwards.

    must_run: a backend that refuses is an error (ValueError), not a line of the report.
    """
    saved, _ = logits_of(model, material)
    truth, _ = logits_of(copy.deepcopy(model).double(), material)
    own_error = _largest(saved, truth)
    said = _answers(model.config, material, saved)
    findings, refused = [Finding(SAVED, own_error, 0.0, _f1(said, material), 0)], {}
    for name in (OPTIMISED, *backends):
        try:
            with ExitStack() as stack:
                if name != OPTIMISED:
                    stack.enter_context(use_backend(name))
                found, ran = logits_of(stack.enter_context(optimized(model)), material)
        except BackendError as reason:
            if must_run:
                raise ValueError(str(reason)) from reason
            refused[name] = str(reason)
            continue
        error, difference = _largest(found, truth), _largest(found, saved)
        if np.isfinite(error):
            answers = _answers(model.config, material, found)
            changed = sum(one != other for one, other in zip(answers, said, strict=True))
            findings.append(Finding(name, error, difference, _f1(answers, material), changed, ran))
        else:  # there is no answer in such logits
            findings.append(Finding(name, error, difference, None, len(said), ran))
    return Report(tuple(findings), refused, TIMES * own_error + SLACK)


def logits_of(model: Any, material: Material) -> tuple[list[Logits], dict[str, dict[str, int]]]:
    """Every window's logits, without padding, and which backend ran each op how often."""
    found: list[Logits] = []
    with torch.inference_mode(), record() as ran:
        for first in range(0, len(material.windows), BATCH_SIZE):
            batch = material.windows[first : first + BATCH_SIZE]
            found += batch_logits(model, batch, model.config.pad_token_id, model.device)
    return found, {op: dict(counts) for op, counts in ran.items()}


def _largest(found: list[Logits], expected: list[Logits]) -> float:
    """The largest difference of two runs' logits; NaN where there is one."""
    pairs: Iterator[Any] = (
        pair for one, other in zip(found, expected, strict=True) for pair in zip(one, other, strict=True)
    )
    return float(np.max([np.abs(a.astype(np.float64) - b).max() for a, b in pairs]))


def _answers(config: Any, material: Material, logits: list[Logits]) -> list[str]:
    """What is said to each question, at the checkpoint's own threshold."""
    contexts = [one.context for one in material.questions]
    spans: list[Logits] = [(one[0], one[1]) for one in logits]
    threshold = getattr(config, "null_score_threshold", 0.0)
    return [one.answer(threshold).answer for one in decode(material.windows, spans, contexts)]


def _f1(answers: list[str], material: Material) -> float | None:
    if not material.is_scored:
        return None
    pairs = zip(answers, material.questions, strict=True)
    return statistics.fmean(answer_scores(said, one.answers or ())[1] for said, one in pairs)


def show(report: Report, material: Material) -> None:
    """The numbers, which backend ran each op, and the verdict."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("", no_wrap=True)
    for name in ("error against fp64", "from saved", "F1", "answers changed"):
        table.add_column(name, justify="right")
    for one in report.findings:
        f1 = "-" if one.f1 is None else f"{one.f1:.2f}"
        compared = (f"{one.difference:.1e}", f1, str(one.changed)) if one.name != SAVED else ("-", f1, "-")
        table.add_row(one.name, f"{one.error:.1e}", *compared)
    Console().print(table)
    for one in report.findings[1:]:
        ran = ", ".join(f"{op}: {' and '.join(sorted(counts))}" for op, counts in one.ran.items())
        print(f"{one.name} ran {ran}")
    for name, reason in report.refused.items():
        print(f"{name} did not run: {reason}")
    rule = f"{report.allowed:.1e}, {TIMES} times the saved model's own rounding error plus {SLACK:g}"
    if report.faulty:
        print(f"FAILED: {', '.join(report.faulty)} err by more than {rule}")
    else:
        print(f"passed: every error is at most {rule}")
