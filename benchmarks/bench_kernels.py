"""Whether every kernel is right on real sizes, in fp16 and bf16, and how fast each of its configurations is.

Usage: python benchmarks/bench_kernels.py --out FOLDER [--minutes 3]
A line begins with right, refused, WRONG, FAILED or timed. All lines are in FOLDER/kernels.jsonl at once,
behind one that says when, where and how they were found. Nothing here stops at a failure. --device cpu is a
dry run on tiny sizes, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from kernels.cases import Place
from kernels.journal import FAILED, WRONG, Journal
from kernels.right import check_all
from kernels.sweep import SECTIONS, Sweep
from pruned_ops.ops.registry import BACKENDS

DTYPES = {"cuda": (torch.float16, torch.bfloat16), "cpu": (torch.float32,)}


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--minutes", type=float, default=3.0, help="what is not begun by then is left out by name"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: a dry run")
    parser.add_argument("--only-times", action="store_true", help="time kernels without comparing them first")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status is 1 where a kernel was wrong or failed."""
    arguments = parsed(argv)
    tiny = arguments.device == "cpu"
    torch.manual_seed(0)
    with Journal(arguments.out, "kernels", arguments.minutes) as journal, torch.inference_mode():
        gpu = "none" if tiny else torch.cuda.get_device_name()
        backends = {name: backend.missing or "ready" for name, backend in BACKENDS.items()}
        journal.note("runs on", gpu=gpu, torch=torch.__version__, **backends)
        dtypes = DTYPES[arguments.device]
        for dtype in () if arguments.only_times else dtypes:
            check_all(journal, Place(dtype, arguments.device), tiny)
        sweep = Sweep(journal, Place(dtypes[0], arguments.device), tiny)
        for section in SECTIONS:
            try:
                section(sweep)
            except Exception as error:  # the next section may run
                journal.failed(error, section=section.__name__)
        return int(any(row["verdict"] in (WRONG, FAILED) for row in journal.rows))


if __name__ == "__main__":
    sys.exit(main())
