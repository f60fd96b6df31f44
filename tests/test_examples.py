"""Every example runs."""

from __future__ import annotations

import json
import runpy
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from inputs import pruned_model
from pruned_ops import QuestionAnswerer
from tiny_tokenizers import word_tokenizer

# Those that need no arguments; corpus_on_ray.py has tests of its own.
FOLDER = Path(__file__).resolve().parents[1] / "python" / "examples"
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if path.stem != "corpus_on_ray")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    if path.stem == "swap_into_your_model":
        assert float(printed.split("largest difference: ")[1].split()[0]) < 1e-4


def test_a_record_that_cannot_be_asked_says_why(tmp_path: Path) -> None:
    """In the example for Ray, a worker of which runs here without it."""
    spec = spec_from_file_location("corpus_on_ray", FOLDER / "corpus_on_ray.py")
    assert spec is not None and spec.loader is not None
    example = module_from_spec(spec)
    spec.loader.exec_module(example)
    lines = tmp_path / "a.jsonl"
    lines.write_text('"a text"\n{broken\n{"question": "w1"}\n')
    (block,) = example.blocks_of(lines, 9)
    worker = object.__new__(example.Worker)
    worker.answerer, worker.out = QuestionAnswerer(pruned_model(), word_tokenizer(96)), tmp_path
    assert worker({name: [value] for name, value in block.items()}) == {"records": [3]}
    rows = (tmp_path / "a.jsonl-000000.jsonl").read_text().splitlines()
    reasons = [json.loads(row)["refused"] for row in rows]
    assert reasons[0] == "is a str; a mapping with question and context, or a pair, is needed"
    assert reasons[1].startswith("is no JSON: ") and reasons[2] == "has no context"


def test_there_are_examples() -> None:
    assert EXAMPLES
