"""A rival that runs in a process of its own, in the Python of its own environment."""

from __future__ import annotations

import os
import pickle
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rivals.rival import Refused

# Batch sizes among which a rival takes the faster one for each kind of texts.
BATCH_SIZES = (8, 32)


class Worker:
    """Texts to vectors, computed by a script of this folder in another Python.

    versions: of the packages that run there. batch_size: of the rival's `encode`, the faster one of
    batch_sizes. Errors: Refused where it does not start, with the last line of what it said."""

    def __init__(
        self,
        python: str,
        script: str,
        arguments: Sequence[Any],
        threads: int,
        batch_sizes: Sequence[int] = BATCH_SIZES,
    ) -> None:
        path = Path(__file__).with_name(script)
        self.batch_sizes, self.batch_size = batch_sizes, batch_sizes[-1]
        self._said = tempfile.TemporaryFile()  # a pipe that nobody reads would stop it
        try:
            self._process = subprocess.Popen(
                [python, "-P", str(path), *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)},
            )
        except OSError as error:
            raise Refused(f"its Python does not start: {error}") from None
        try:
            self.versions: dict[str, str] = self._answer()
        except EOFError:
            self._process.wait()
            self._said.seek(0)
            lines = self._said.read().decode(errors="replace").strip().splitlines()
            raise Refused(f"{script} ended: {lines[-1] if lines else 'it said nothing'}") from None

    def encode(self, texts: Sequence[str], show_progress_bar: bool = False) -> Any:
        """The vectors (texts, dimensions). The pipe's time counts: some milliseconds a thousand texts."""
        assert self._process.stdin is not None
        pickle.dump((list(texts), self.batch_size), self._process.stdin)
        self._process.stdin.flush()
        return self._answer()

    @property
    def process(self) -> int:
        """The number of the process."""
        return self._process.pid

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._said.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return pickle.load(self._process.stdout)
