"""`pruned-ops ask`: questions from the command line or as JSON lines, answers as JSON lines."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pruned_ops.command_line import add_device, add_dtype, check_counts, dtype_of
from pruned_ops.files import check_writable, parse_json, read_text

if TYPE_CHECKING:
    from pruned_ops.qa.answerer import QuestionAnswerer

# In a JSON string these quotes would be escaped. A line of another data set may have paragraphs, too, beside
# its question and its context, but not in its data.
_SQUAD = re.compile(rb'"data"\s*:\s*\[.*?"paragraphs"\s*:\s*\[', re.DOTALL)


def add_command(commands: Any) -> None:
    """Add the command and its options to the parser's commands."""
    parser = commands.add_parser(
        "ask",
        help="answer questions out of texts",
        description="Answer --question out of --context-file, or the JSON lines of --questions, each with a "
        "question, a context and, where you like, an id. The answers are JSON lines in the same order: "
        'line (where the question stood), id, answer ("" for none), score, start and end in characters of '
        "the context; with --top-k a list of such answers.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a checkpoint with its tokenizer")
    questions = parser.add_argument_group("questions")
    source = questions.add_mutually_exclusive_group(required=True)
    source.add_argument("--question", nargs="+", metavar="TEXT", help="questions to ask of --context-file")
    source.add_argument(
        "--questions", type=os.path.expanduser, metavar="FILE", help="JSON lines; - for standard input"
    )
    questions.add_argument("--context-file", type=Path, metavar="FILE", help="the text, in UTF-8")
    questions.add_argument(
        "--skip-bad", action="store_true", help="name, skip and count lines that cannot be asked"
    )
    answers = parser.add_argument_group("answers")
    answers.add_argument(
        "--always-answer", action="store_true", help='give the best span, "" only where there is none'
    )
    answers.add_argument(
        "--top-k", type=int, metavar="N", help="give a list of at most N answers to each question"
    )
    answers.add_argument(
        "--out", type=Path, metavar="FILE", help="where the answers go (default: standard output)"
    )
    answers.add_argument("--overwrite", action="store_true", help="replace the file --out")
    running = parser.add_argument_group("how the model runs")
    add_dtype(running, "dtype of the linear layers on a CPU, of all of a model on a GPU", float16=True)
    add_device(running)


def run(arguments: argparse.Namespace) -> None:
    """Answer every question. On an error or Ctrl-C the answers before it are written."""
    check_arguments(arguments)
    with ExitStack() as stack:
        if arguments.question is not None:
            lines = _as_lines(arguments.question, arguments.context_file)
        elif arguments.questions == "-":
            lines = iter(_standard_input())
        else:
            lines = iter(stack.enter_context(open(arguments.questions, "rb")))
        answerer = _load(arguments.folder, arguments)
        out: IO[bytes]
        if arguments.out is None:
            out = sys.stdout.buffer
        else:
            out = stack.enter_context(open(arguments.out, "wb"))
        source = "" if arguments.questions in (None, "-") else f"{arguments.questions}: "
        skipped = answer_lines(
            answerer, lines, out, arguments.top_k, arguments.skip_bad, source, not arguments.always_answer
        )
    if skipped:
        print(f"{skipped} bad line{'s' if skipped > 1 else ''} skipped", file=sys.stderr)


def check_arguments(arguments: argparse.Namespace) -> None:
    """OSError or ValueError for what can be known to fail before the model is loaded."""
    from pruned_ops.checkpoints.loading import checkpoint_folder

    checkpoint_folder(arguments.folder)
    if (arguments.question is not None) != (arguments.context_file is not None):
        raise ValueError("--question goes with --context-file; --questions has its contexts in it")
    check_counts(arguments, "top_k")
    _check_files(arguments.context_file or arguments.questions, arguments.out, arguments.overwrite)


def _check_files(source: Path | str, out: Path | None, overwrite: bool) -> None:
    """OSError or ValueError where the questions cannot be read from `source` or the answers not be written to
    `out`."""
    if source != "-" and (Path(source).is_dir() or not Path(source).exists()):
        raise FileNotFoundError(f"there is no file {source}")
    if isinstance(source, str) and Path(source).is_file() and _is_squad(Path(source)):
        raise ValueError(
            f"{source} is SQuAD-format JSON; --questions takes JSON lines, each with a question and its "
            "context (`pruned-ops check` and `pruned-trainer evaluate` read SQuAD's format)"
        )
    if out is not None:
        if source != "-" and out.exists() and out.is_file() and out.samefile(source):
            raise FileExistsError(f"{out} is what is read; give another --out")
        check_writable(out, "--out", overwrite)


def _is_squad(path: Path) -> bool:
    """Whether a file begins as SQuAD's JSON does."""
    with path.open("rb") as file:
        return _SQUAD.search(file.read(1 << 16)) is not None


def _as_lines(questions: list[str], path: Path) -> Iterator[bytes]:
    """The questions of the file's text, as JSON lines."""
    context = read_text(path)
    return (json.dumps({"question": question, "context": context}).encode() for question in questions)


def _load(folder: Path, arguments: argparse.Namespace) -> QuestionAnswerer:
    """The checkpoint's model with its tokenizer, as the options say."""
    from pruned_ops.checkpoints.loading import only_errors
    from pruned_ops.qa.answerer import QuestionAnswerer

    only_errors()
    return QuestionAnswerer(folder, device=arguments.device, dtype=dtype_of(arguments))


def answer_lines(
    answerer: QuestionAnswerer,
    lines: Iterator[bytes],
    out: IO[bytes],
    top_k: int | None = None,
    skip_bad: bool = False,
    source: str = "",
    allow_none: bool = True,
) -> int:
    """Write an answer for each line, as soon as it is known; returns how many bad lines were skipped.

    source: what stands before a line's number where one is named. top_k, allow_none: as for
    `QuestionAnswerer.stream`. Errors: ValueError that names the first bad line, once the answers before it
    are written.
    """
    from pruned_ops.qa.windows import RefusedQuestion

    reader, skipped = _Reader(lines), 0
    # The bar would be torn by answers on the same terminal.
    progress = sys.stderr.isatty() and not out.isatty()
    for answer in answerer.stream(reader, top_k, allow_none, progress=progress, keep_refused=True):
        number, name, fault = reader.under_way.popleft()
        if isinstance(answer, RefusedQuestion):
            reason = fault or f"the question {answer.reason}"
            if not skip_bad:
                raise ValueError(f"{source}line {number}: {reason}")
            skipped += 1
            print(f"{source}line {number} skipped: {reason}", file=sys.stderr)
            continue
        fields = asdict(answer) if top_k is None else {"answers": [asdict(each) for each in answer]}
        text = json.dumps({"line": number, **name, **fields}, ensure_ascii=False)
        out.write(text.encode() + b"\n")
        out.flush()
    return skipped


def _standard_input() -> IO[bytes]:
    """Standard input under a file of its own. A thread may still wait in a read of it when the program ends;
    of sys.stdin, which Python closes then, that would be a fatal error."""
    try:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except OSError:  # something that stands in for it, and is no file
        return sys.stdin.buffer


class _Reader:
    """Iterates over the records in lines; None, which is refused, for a line that holds none.

    under_way: for each record that was read and not yet answered, its line, {"id": its id}, or {} where it
    has none, and why the line holds no record."""

    def __init__(self, lines: Iterator[bytes]) -> None:
        self._lines = lines
        self.under_way: deque[tuple[int, dict[str, Any], str | None]] = deque()

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        for number, line in enumerate(self._lines, 1):
            if not line.strip():
                continue
            try:
                record = parse_json(line)
                if not isinstance(record, dict):
                    raise ValueError(f"it is a {type(record).__name__}, not an object")
            except ValueError as error:
                fault = f"no JSON object with a question and a context: {error}"
                self.under_way.append((number, {}, fault))
                yield None
                continue
            self.under_way.append((number, {"id": record["id"]} if "id" in record else {}, None))
            yield record
