"""Work for single_kernels.watch that ends its processes. Without torch, so that they start at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path

from single_kernels.journal import Facts, Journal


def work(path: str, tell: Callable[[Facts], None], done: Collection[Facts]) -> None:
    """Five attempts, three of which end the process; then it fails outside of an attempt, in each process."""
    lost: list[str] = []

    def loses() -> None:
        lost.append("gpu")
        raise RuntimeError("an illegal memory access")

    with Journal(Path(path), done=done, tell=tell, is_lost=lambda: bool(lost)) as journal:
        for name, attempt in (
            ("plain", lambda: journal.note("right", name="plain")),
            ("crash", lambda: os.kill(os.getpid(), signal.SIGSEGV)),
            ("hang", lambda: time.sleep(600)),
            ("lost", loses),
            ("last", lambda: journal.note("right", name="last")),
        ):
            journal.attempt(attempt, name=name)
    raise SystemExit(1)
