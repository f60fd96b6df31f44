"""The imports are lean: they bring in no package that transformers does not bring in by itself, and start no
CUDA."""

from __future__ import annotations

import subprocess
import sys

# Packages that only some commands need, and transformers brings in at most with its Trainer.
HEAVY = ("datasets", "fastapi", "matplotlib", "onnx", "onnxruntime", "pandas", "pyarrow", "scipy", "sklearn")


# Whatever starts CUDA fails: no process that is forked after the import could use a GPU.
WITHOUT_CUDA = "import torch; torch.cuda.is_available = torch.cuda.init = None"
# transformers, and what of ours comes behind it. A command line's import brings in its package too; the
# trainer's, all that the runtime's does.
IMPORTS = (
    f"{WITHOUT_CUDA}; from transformers import BertModel",
    "import pruned_ops.cli",
    "from transformers import Trainer",
    "import pruned_trainer.cli",
)


def packages(statements: tuple[str, ...]) -> list[set[str]]:
    """The top-level packages that a fresh process has after each of these statements."""
    said = "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    code = "\n".join(["import sys", *(f"{statement}\n{said}" for statement in statements)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_an_import_brings_in_no_more_than_transformers() -> None:
    found = packages(IMPORTS)
    for theirs, ours, statement in zip(found[::2], found[1::2], IMPORTS[1::2], strict=True):
        more = ours - theirs - {"pruned_ops", "pruned_trainer"}
        assert not more & {*HEAVY, "triton"}, statement
        assert not more - set(sys.stdlib_module_names), (
            f"a new dependency of {statement}: is it needed there?"
        )
