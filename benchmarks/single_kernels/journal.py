"""What is found about kernels is printed and written line by line, so that a run that is cut off keeps all of
it. Only the standard library is imported: the process that watches over the one with the GPU writes, too."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import Any

# Verdicts that stand at the beginning of a line, and that a summary repeats first.
WRONG, FAILED = "WRONG", "FAILED"
# What an attempt is about: words and numbers by which it is known.
Facts = dict[str, Any]


class GpuLost(Exception):
    """After an error like an illegal access every later call of this process fails: another has to go on."""


class Journal:
    """Rows with a verdict, printed and appended to a file of JSON lines at once. It knows when time is up.

    end: when, by time.monotonic(). done: the facts of attempts that earlier processes made. tell: is given
    the facts of an attempt that begins, and none at its end. is_lost: whether this process's GPU is of no use
    any more.
    """

    def __init__(
        self,
        path: Path,
        end: float = math.inf,
        done: Collection[Facts] = (),
        tell: Callable[[Facts], None] = lambda facts: None,
        is_lost: Callable[[], bool] = lambda: False,
    ) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._end, self._done, self._tell, self._is_lost = end, done, tell, is_lost

    def left(self) -> float:
        """Seconds until time is up."""
        return self._end - time.monotonic()

    def attempt(self, work: Callable[[], None], **facts: Any) -> None:
        """Do the work, which adds what it finds, unless an earlier process has. Whatever it raises is a row,
        and the next attempt can be made.

        Errors: GpuLost where it cannot be made by this process."""
        if facts in self._done:
            return
        if self.left() < 0:
            self.note("left out", **facts, reason="no time was left")
            return
        self._tell(facts)
        try:
            work()
        except Exception as error:  # whatever a kernel raises
            self.failed(error, **facts)
            if self._is_lost():
                raise GpuLost(str(error)) from error
        self._tell({})

    def note(self, verdict: str, **facts: Any) -> None:
        """Add a row. Numbers are printed in three digits, and written in full."""
        shown = [
            f"{name} {value:.3g}" if isinstance(value, float) else str(value) for name, value in facts.items()
        ]
        print(verdict, *shown, sep="  ", flush=True)
        self.write({"verdict": verdict, **facts})

    def write(self, row: Facts) -> None:
        """Add a row that is not printed."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def failed(self, error: Exception, **facts: Any) -> None:
        """Add a row about an error, in one line."""
        text = " ".join(f"{type(error).__name__}: {error}".split())
        self.note(FAILED, **facts, error=text[:400])

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def rows_in(path: Path) -> list[Facts]:
    """The rows of a journal."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
