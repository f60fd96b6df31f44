"""`pruned-ops ask`: questions from the command line or as JSON lines, answers as JSON lines."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pruned_ops.qa.decoding import Answer
from pruned_ops.qa.windows import RefusedQuestion

if TYPE_CHECKING:
    from pruned_ops.qa.answerer import QuestionAnswerer

# What a shell reports of a program that wrote to a pipe that nobody reads any more.
BROKEN_PIPE = 128 + 13


def add_command(commands: Any) -> None:
    """The command's arguments."""
    one = commands.add_parser(
        "ask",
        help="answer questions out of texts",
        description="Answer --question out of --context-file, or the JSON lines of --questions, each with a "
        "question, a context and, where you like, an id. The answers are JSON lines in the same order: "
        'line (where the question stood), id, answer ("" for none), score, start and end in characters of '
        "the context; with --top-k a list of such answers.",
    )
    one.set_defaults(run=ask)
    one.add_argument("folder", type=Path, metavar="DIR", help="folder of a checkpoint with its tokenizer")
    asked = one.add_mutually_exclusive_group(required=True)
    asked.add_argument("--question", nargs="+", help="what to ask of --context-file")
    asked.add_argument("--questions", metavar="FILE", help="JSON lines; - for standard input")
    asked.add_argument("--serve", action="store_true", help="open a page to ask in, on this machine")
    one.add_argument("--context-file", type=Path, help="the text, in UTF-8")
    one.add_argument(
        "--beside", type=Path, metavar="DIR", help="with --serve: another checkpoint, say the dense one"
    )
    one.add_argument(
        "--host", default="127.0.0.1", help="with --serve: who may come (default: this machine alone)"
    )
    one.add_argument("--port", type=int, default=8000, help="with --serve (default: 8000)")
    one.add_argument("--out", type=Path, help="where the answers go (default: standard output)")
    one.add_argument("--overwrite", action="store_true", help="replace the file --out")
    one.add_argument("--top-k", type=int, help="so many answers at most to each question")
    one.add_argument(
        "--always-answer", action="store_true", help='give the best span, "" only where there is none'
    )
    one.add_argument("--device", help="where the model runs (default: a GPU where there is one)")
    one.add_argument("--dtype", choices=["int8"], help="run the linears in int8, on a CPU with AVX-512 VNNI")
    one.add_argument(
        "--skip-bad", action="store_true", help="name, skip and count lines that cannot be asked"
    )


def ask(arguments: argparse.Namespace) -> None:
    """Answer everything that can be; what was answered before an error or Ctrl-C is written."""
    check_arguments(arguments)
    if arguments.serve:
        from pruned_ops.commands.serve import serve

        folders = [one for one in (arguments.beside, arguments.folder) if one is not None]
        serve({str(one): _load(one, arguments) for one in folders}, arguments.host, arguments.port)
        return
    with ExitStack() as stack:
        if arguments.question is not None:
            lines: Iterator[bytes] = _as_lines(arguments.question, arguments.context_file)
        elif arguments.questions == "-":
            lines = iter(sys.stdin.buffer)
        else:
            lines = iter(stack.enter_context(open(arguments.questions, "rb")))
        answerer = _load(arguments.folder, arguments)
        if arguments.out is None:
            out: IO[bytes] = sys.stdout.buffer
        else:
            out = stack.enter_context(open(arguments.out, "wb"))
        try:
            skipped = answer_lines(answerer, lines, out, arguments.top_k, arguments.skip_bad)
        except BrokenPipeError:
            # Nobody reads on: no error. What is left in the buffer must not be written when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(BROKEN_PIPE)
    if skipped:
        print(f"{skipped} bad line{'s' if skipped > 1 else ''} skipped", file=sys.stderr)


def check_arguments(arguments: argparse.Namespace) -> None:
    """OSError or ValueError for what can be known to fail before the model is loaded."""
    for folder in (arguments.folder, arguments.beside):
        if folder is not None and not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds no config.json; DIR is a checkpoint's folder")
    if arguments.serve:
        if arguments.context_file or arguments.out or arguments.top_k or arguments.skip_bad:
            raise ValueError("--serve takes its questions and texts from the page, and answers there")
        return
    if arguments.beside is not None:
        raise ValueError("--beside goes with --serve")
    if (arguments.question is not None) != (arguments.context_file is not None):
        raise ValueError("--question goes with --context-file; --questions has its contexts in it")
    if arguments.top_k is not None and arguments.top_k < 1:
        raise ValueError(f"--top-k is {arguments.top_k}; at least 1 is needed")
    source = arguments.context_file or arguments.questions
    if source != "-" and (Path(source).is_dir() or not Path(source).exists()):
        raise FileNotFoundError(f"there is no file {source}")
    out: Path | None = arguments.out
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise FileNotFoundError(f"{out} cannot be written: --out names a file in a folder that is there")
    if out is not None and out.exists():
        if source != "-" and out.samefile(source):
            raise FileExistsError(f"{out} is what is read; give another --out")
        if not arguments.overwrite:
            raise FileExistsError(f"{out} exists; --overwrite replaces it")


def _as_lines(questions: list[str], path: Path) -> Iterator[bytes]:
    try:
        context = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error
    return (json.dumps({"question": question, "context": context}).encode() for question in questions)


def _load(folder: Path, arguments: argparse.Namespace) -> QuestionAnswerer:
    from transformers.utils import logging

    from pruned_ops.qa.answerer import QuestionAnswerer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    threshold = float("inf") if arguments.always_answer else None
    return QuestionAnswerer(
        folder, device=arguments.device, dtype=arguments.dtype, null_score_threshold=threshold
    )


def answer_lines(
    answerer: QuestionAnswerer,
    lines: Iterator[bytes],
    out: IO[bytes],
    top_k: int | None = None,
    skip_bad: bool = False,
) -> int:
    """Write an answer for each line, as soon as it is known; the number of bad lines that were skipped.

    Errors: ValueError that names the first bad line, once the answers before it are written.
    """
    reader = _Reader(lines, skip_bad)
    # The bar would be torn by answers on the same terminal.
    progress = sys.stderr.isatty() and not out.isatty()
    for found in answerer.stream(reader, top_k, progress=progress, keep_refused=True):
        number, record = reader.asked.popleft()
        if isinstance(found, RefusedQuestion):
            reader.bad(number, f"the question {found.reason}")
            continue
        said = asdict(found) if isinstance(found, Answer) else {"answers": [asdict(one) for one in found]}
        name = {"id": record["id"]} if "id" in record else {}
        text = json.dumps({"line": number, **name, **said}, ensure_ascii=False)
        # An id may hold half a surrogate pair, which JSON can say and UTF-8 cannot.
        out.write(text.encode(errors="backslashreplace") + b"\n")
        out.flush()
    return reader.skipped


class _Reader:
    """The records in lines; which ones are under way."""

    def __init__(self, lines: Iterator[bytes], skip_bad: bool) -> None:
        self._lines, self._skip_bad = lines, skip_bad
        self.asked: deque[tuple[int, dict[str, Any]]] = deque()
        self.skipped = 0

    def __iter__(self) -> Iterator[Any]:
        for number, line in enumerate(self._lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if not isinstance(record, dict):
                    raise ValueError(f"it is a {type(record).__name__}, not an object")
            except (ValueError, RecursionError) as error:
                self.bad(number, f"no JSON object with a question and a context: {error}")
                continue
            self.asked.append((number, {"id": record["id"]} if "id" in record else {}))
            yield record

    def bad(self, number: int, reason: str) -> None:
        """Count a line that cannot be asked; ValueError that names it where it is not to be skipped."""
        if not self._skip_bad:
            raise ValueError(f"line {number}: {reason}")
        self.skipped += 1
        print(f"line {number} skipped: {reason}", file=sys.stderr)
