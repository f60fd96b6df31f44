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
    """Rows with a verdict, printed and appended to FOLDER/NAME.jsonl at once, and written to FOLDER/NAME.csv
    at the end. It also knows when time is up."""

    def __init__(self, folder: Path, name: str, minutes: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = []
        self._path = folder / f"{name}.jsonl"
        self._file = self._path.open("w", encoding="utf-8")
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
        self._file.write(json.dumps(self.rows[-1]) + "\n")
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
        if self.rows:
            origin = harness.stamp()
            harness.write_rows(self._path.with_suffix(".csv"), [row | origin for row in self.rows])
