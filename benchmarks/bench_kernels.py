"""Whether every kernel is right on real sizes, in fp16 and bf16, and how fast each of its configurations is.

Usage: python benchmarks/bench_kernels.py --out FOLDER [--minutes 3]
A line begins with right, refused, WRONG, FAILED or timed. All lines are in FOLDER/kernels.jsonl at once,
behind one that says when, where and how they were found. Nothing here stops at a failure: a kernel that
crashes, hangs or loses the GPU ends a process, and another goes on with the next. --device cpu is a dry run
on tiny sizes, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from option_types import above
from single_kernels.journal import FAILED, WRONG, Facts, rows_in
from single_kernels.watch import run_watched

# Seconds that an attempt may take, its compilation and the import of torch included. A CPU that does other
# things besides is no failure.
ATTEMPT = {"cuda": 45, "cpu": 360}


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--minutes", type=above(0), default=3.0, help="what is not begun by then is left out by name"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: a dry run")
    parser.add_argument(
        "--only-times",
        action="store_true",
        help="time kernels without comparing them first, the last ones first",
    )
    return parser.parse_args(argv)


def work(
    arguments: argparse.Namespace,
    path: Path,
    end: float,
    tell: Callable[[Facts], None],
    done: Collection[Facts],
) -> None:
    """What the watched process does. It alone imports torch."""
    from single_kernels.worker import check_and_time

    check_and_time(arguments, path, end, tell, done)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status is 1 where a kernel was wrong or failed."""
    arguments = parsed(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path, end = arguments.out / "kernels.jsonl", time.monotonic() + 60 * arguments.minutes
    path.write_text("", "utf-8")
    run_watched(partial(work, arguments, path, end), path, ATTEMPT[arguments.device])
    return int(any(row["verdict"] in (WRONG, FAILED) for row in rows_in(path)))


if __name__ == "__main__":
    sys.exit(main())
