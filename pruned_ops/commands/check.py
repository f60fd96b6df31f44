"""`pruned-ops check`: whether the optimised model says what the saved one says, on the user's own text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruned_ops.command_line import add_device, add_dtype, check_counts, dtype_of, say_skipped
from pruned_ops.files import read_text

if TYPE_CHECKING:
    from pruned_ops.qa.agreement import Finding, Report
    from pruned_ops.qa.questions import Question

# How many of a file's questions are asked, where nothing is said.
LIMIT = 200


def add_command(commands: Any) -> None:
    """Add the command and its options to the parser's commands."""
    parser = commands.add_parser(
        "check",
        help="compare the optimised model with the saved one on your own text",
        description="Run the saved model (padded, plain torch), the optimised one and each backend on the "
        "same text, in fp32, and compare their outputs at real tokens; with right answers in --questions, F1 "
        "too. The exit status is 1 where one errs by more than rounding, --dtype by more than --tolerance. A "
        "checkpoint of int8 weights is held against these weights in fp32, and runs in int8, too.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a checkpoint with its tokenizer")
    texts = parser.add_argument_group("text")
    text = texts.add_mutually_exclusive_group()
    text.add_argument("--questions", type=Path, metavar="FILE", help="SQuAD-format JSON, or .jsonl")
    text.add_argument(
        "--text-file", type=Path, metavar="FILE", help="text in UTF-8 (default: a short sample)"
    )
    texts.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help=f"how many of --questions are asked, at most (default: {LIMIT})",
    )
    texts.add_argument(
        "--skip-bad", action="store_true", help="skip and count questions that cannot be read or cut"
    )
    running = parser.add_argument_group("what is compared")
    add_dtype(running, "run the optimised model with its linear layers in this dtype too, on a CPU")
    running.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="how far --dtype's outputs may be off, as a share of how much the saved model's vary (L2 norm; "
        "default: 0.15)",
    )
    running.add_argument(
        "--backends",
        nargs="+",
        metavar="NAME",
        help="these backends must run (default: those that can here, Triton's interpreter left out)",
    )
    add_device(running)


def run(arguments: argparse.Namespace) -> int:
    """Check the model and print what came out; the exit status is 1 where something errs by more than
    rounding."""
    from pruned_ops.checkpoints.loading import is_quantised, load_folder, load_tokenizer
    from pruned_ops.qa.agreement import BATCH_SIZE, TOLERANCE, check, cut_material

    check_counts(arguments, "limit")
    if arguments.questions is None and (arguments.limit is not None or arguments.skip_bad):
        raise ValueError("--limit and --skip-bad go with --questions")
    tolerance = TOLERANCE if arguments.tolerance is None else arguments.tolerance
    if arguments.tolerance is not None and dtype_of(arguments) is None and not is_quantised(arguments.folder):
        raise ValueError("--tolerance goes with --dtype, or with a checkpoint of int8 weights")
    if not tolerance >= 0:
        raise ValueError(f"--tolerance is {tolerance}; 0 or more is needed")
    backends = _backends(arguments.backends)
    skipped: list[str] | None = [] if arguments.skip_bad else None
    name, questions = _questions(arguments, skipped)
    model = load_folder(arguments.folder, arguments.device, takes_int8=True)
    tokenizer = load_tokenizer(str(arguments.folder))
    material = cut_material(tokenizer, model.config, name, questions, skipped)
    say_skipped(skipped)
    must_run = arguments.backends is not None
    report = check(model, material, backends, must_run, dtype_of(arguments), tolerance)
    count = len(material.windows)
    print(
        f"{arguments.folder}: {type(model).__name__} on {model.device}, {material.name}: "
        f"{count} window{'s' if count > 1 else ''} of {material.tokens:,} tokens, in batches of {BATCH_SIZE} "
        "padded to their longest"
    )
    show(report)
    return 1 if report.faulty or report.same_weights is False else 0


def _backends(names: Sequence[str] | None) -> list[str]:
    """The names of the backends to run; ValueError for one that was asked for and cannot run here."""
    from pruned_ops.ops.registry import BACKENDS, REFERENCE

    if names is None:
        ready = [name for name, backend in BACKENDS.items() if not (backend.missing or backend.on_demand)]
        return [REFERENCE, *ready]
    for name in names:
        if name != REFERENCE and name not in BACKENDS:
            raise ValueError(f"there is no backend {name!r}; there are {', '.join([REFERENCE, *BACKENDS])}")
        missing = BACKENDS[name].missing if name in BACKENDS else None
        if missing is not None:
            raise ValueError(f"backend {name!r} is not available: {missing}")
    return list(dict.fromkeys(names))


def _questions(arguments: argparse.Namespace, skipped: list[str] | None) -> tuple[str, list[Question]]:
    """The questions to ask, with a name for them. A text alone is given with an empty question."""
    from pruned_ops.qa.agreement import SAMPLE
    from pruned_ops.qa.questions import Question, in_arrival_order, read_questions

    if arguments.text_file is not None:
        text = read_text(arguments.text_file)
        if not text.strip():
            raise ValueError(f"{arguments.text_file} is empty: there is nothing to check on")
        return str(arguments.text_file), [Question("", text)]
    if arguments.questions is None:
        return "the built-in sample", list(SAMPLE)
    questions = read_questions(arguments.questions, skipped)
    chosen = in_arrival_order(questions, LIMIT if arguments.limit is None else arguments.limit)
    total = f"{len(questions):,}"
    which = f"{len(chosen)} of {total}" if len(chosen) < len(questions) else f"all {total}"
    return f"{which} questions of {arguments.questions}", chosen


def show(report: Report) -> None:
    """Print the errors, which backend ran each op, and the verdict."""
    from rich.console import Console
    from rich.table import Table

    from pruned_ops.qa.agreement import NARROW, SLACK, TIMES

    table = Table()
    table.add_column("", no_wrap=True)
    for name in ("error against fp64", "from saved", "F1", "answers or labels changed"):
        table.add_column(name, justify="right")
    saved, *others = report.findings
    narrow = others[-1] if others[-1].name in NARROW else None
    table.add_row(saved.name, f"{saved.error:.1e}", "-", _score(saved.f1), "-")
    for finding in others:
        changed = "-" if finding.changed is None else str(finding.changed)
        compared = (f"{finding.difference:.1e}", _score(finding.f1), changed)
        table.add_row(finding.name, f"{finding.error:.1e}", *compared)
    Console().print(table)
    for finding in others:
        ran = ", ".join(f"{op}: {' and '.join(sorted(counts))}" for op, counts in finding.ran.items())
        print(f"{finding.name} ran {ran}")
    for name, reason in report.refused.items():
        print(f"{name} did not run: {reason}")
    rule = f"{report.allowed:.1e}, {TIMES} times the saved model's own rounding error plus {SLACK:g}"
    faulty = [name for name in report.faulty if name not in NARROW]
    if faulty:
        print(f"FAILED: {', '.join(faulty)} err by more than {rule}")
    else:
        print(f"passed: every error {f'but that of {narrow.name} ' if narrow else ''}is at most {rule}")
    if report.same_weights is not None:
        print(
            "passed: the int8 weights that run are those of the file, bit for bit"
            if report.same_weights
            else "FAILED: the int8 weights that run are not those of the file"
        )
    if narrow is not None:
        _show_narrow(narrow, report.tolerance, narrow.name in report.faulty)


def _show_narrow(finding: Finding, tolerance: float, is_faulty: bool) -> None:
    """Print how far a narrow dtype is off, and what helps where that is too far."""
    statement = f"{finding.name} is off by {finding.relative:.4f} of what the saved model's outputs vary by"
    if is_faulty:
        way_out = "run it in float32"
        if finding.name == "int8":
            way_out = (
                "with calibration=batches of your text pruned_ops.optimize leaves in fp32 what hurts most"
            )
        print(f"FAILED: {statement}, more than the tolerance of {tolerance:g}: {way_out}")
    else:
        print(f"passed: {statement}, within the tolerance of {tolerance:g}")


def _score(f1: float | None) -> str:
    return "-" if f1 is None else f"{f1:.2f}"
