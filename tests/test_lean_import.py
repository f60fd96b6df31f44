"""The imports are lean: they bring in no package that transformers does not bring in by itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Packages that only some commands need, and transformers brings in at most with its Trainer.
HEAVY = ("datasets", "fastapi", "matplotlib", "onnx", "onnxruntime", "pandas", "pyarrow", "scipy", "sklearn")


def packages(statement: str) -> set[str]:
    """The top-level packages that a fresh process has after this statement."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


# A command line's import brings in its package too.
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("import pruned_ops.cli", "from transformers import BertModel"),
        ("import pruned_trainer.cli", "from transformers import BertModel, Trainer"),
    ],
)
def test_an_import_brings_in_no_more_than_transformers(ours: str, theirs: str) -> None:
    more = packages(ours) - packages(theirs) - {"pruned_ops", "pruned_trainer"}
    assert not more & {*HEAVY, "triton"}
    assert not more - set(sys.stdlib_module_names), "a new dependency of the import: is it needed there?"
