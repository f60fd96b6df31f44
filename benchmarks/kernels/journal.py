"""What is found about kernels is printed and written line by line, so that a run that is cut off keeps all of
it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import harness
from harness import Row

# Verdicts that stand at the beginning of a line, and that a summary repeats first.
WRONG, FAILED = "WRONG", "FAILED"


class Journal:
    """Rows with a verdict, printed and appended to FOLDER/NAME.jsonl at once. The first one, which is not
    printed, says when, where and how they were found. It also knows when time is up."""

    def __init__(self, folder: Path, name: str, minutes: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = []
        self._file = (folder / f"{name}.jsonl").open("w", encoding="utf-8")
        self._write({"verdict": "stamp", **harness.stamp()})
        self._end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds until time is up."""
        return self._end - time.monotonic()

    def note(self, verdict: str, **facts: Any) -> None:
        """Add a row. Numbers are printed in three digits, and written in full."""
        self.rows.append({"verdict": verdict, **facts})
        shown = [
            f"{name} {value:.3g}" if isinstance(value, float) else str(value) for name, value in facts.items()
        ]
        print(verdict, *shown, sep="  ", flush=True)
        self._write(self.rows[-1])

    def _write(self, row: Row) -> None:
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
