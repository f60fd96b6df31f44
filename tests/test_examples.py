"""Every example runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

# Those that need no arguments; corpus_on_ray.py has tests of its own.
FOLDER = Path(__file__).resolve().parents[1] / "python" / "examples"
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if path.stem != "corpus_on_ray")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    if path.stem == "swap_into_your_model":
        assert float(printed.split("largest difference: ")[1].split()[0]) < 1e-4


def test_there_are_examples() -> None:
    assert EXAMPLES
