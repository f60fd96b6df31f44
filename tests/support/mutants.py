"""Faults planted in the pruning code, one at a time, each of which a test must find: `make mutants`.

A fault is a line of the source replaced by another in a copy of the package. Tests run in a forked process,
which has torch and transformers already: `mutants.py [WORD ...]` plants those whose file or text has a word.
The exit status is the number of faults that no test found, at most 100.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "pruned_trainer"
# The tests that run for every fault, and those of whole jobs, which run where the first find nothing.
TESTS = ("tests/trainer/pruning",)
JOB_TESTS = ("tests/trainer/jobs/test_paper_recipe.py", "tests/trainer/training/test_trainer.py")


@dataclass(frozen=True)
class Mutant:
    """A text of a file, which is there once, and what stands in its place."""

    file: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.old.split())}  ->  {' '.join(self.new.split()) or '(nothing)'}"

    def plant(self, package: Path) -> None:
        """Change the file in this copy of the package; ValueError where the text is not there once."""
        path = package / self.file
        source = path.read_text(encoding="utf-8")
        if source.count(self.old) != 1:
            raise ValueError(f"{self.file} has {source.count(self.old)} times: {self.old!r}")
        path.write_text(source.replace(self.old, self.new), encoding="utf-8")


MUTANTS = [
    # What makes the paper's recipe the paper's.
    Mutant("jobs/choice.py", "student.requires_grad_(False)", "student.requires_grad_(True)"),
    Mutant("jobs/choice.py", "PAPER_THRESHOLD = 0.0", "PAPER_THRESHOLD = 0.5"),
    Mutant("jobs/choice.py", "PAPER_THRESHOLD = 0.0", "PAPER_THRESHOLD = -0.5"),
    Mutant("jobs/choice.py", "part_scores.rank.places() if job.settings.targets else part_scores.rank",
           "part_scores.rank"),
    Mutant("jobs/settings.py", 'priced = "retrain" if self.targets else "none"', 'priced = "retrain"'),
    Mutant("jobs/settings.py", 'return self.distillation if taught in ("both", phase)',
           "return self.distillation if taught != 'none'"),
    Mutant("pruning/gate_phase.py", '"heads": 0.72', '"heads": 7.2'),
    Mutant("pruning/gate_phase.py", '"ffn": 0.737', '"ffn": 7.37'),
    Mutant("pruning/gate_phase.py", '"ffn": 0.737', '"ffn": 0.72'),
    Mutant("pruning/gate_phase.py", "multiple * PRICES[part] * share", "PRICES[part] * share"),
    Mutant("pruning/gate_phase.py", "counts = self.gates.probabilities(self.penalty)",
           "counts = self.gates.probabilities('open')"),
    # The regime of the gates.
    Mutant("pruning/gates.py", "INITIAL_LOG_ALPHA = 2.5", "INITIAL_LOG_ALPHA = 4.0"),
    Mutant("pruning/gates.py", "INITIAL_LOG_ALPHA = 2.5", "INITIAL_LOG_ALPHA = 2.0"),
    Mutant("pruning/gate_phase.py", ", MAX_PACE)", ", 100.0)"),
    Mutant("pruning/gate_phase.py", "max(steps // self.stages, 1)", "max(steps, 1)"),
    Mutant("pruning/gate_phase.py", "if steps_each < FEW_STEPS:", "if steps_each <= FEW_STEPS:"),
    Mutant("pruning/gate_phase.py", "self.multiplier += rate * gap.detach()",
           "self.multiplier += rate * gap.detach() - 0.1 * self.multiplier"),
    Mutant("pruning/gate_phase.py", "self.multiplier += rate * gap.detach()",
           "self.multiplier -= rate * gap.detach()"),
    Mutant("pruning/gate_phase.py", "STIFFNESS / 2 * gap.square()", "STIFFNESS / 2 * gap"),
    Mutant("pruning/gate_phase.py", "STIFFNESS / 2 * gap.square()", "0 * gap.square()"),
    Mutant("pruning/gate_phase.py", "self.lagrangian.follow(gap, MULTIPLIER_RATE)", "pass"),
    Mutant("pruning/gate_phase.py", "if stage else self.start", "if stage else 1.0"),
    Mutant("pruning/gate_phase.py", "(place - stage) / RAMP", "(place - stage)"),
    Mutant("pruning/gate_phase.py", '"lr": rate, "weight_decay": 0.0', '"lr": rate, "weight_decay": 0.1'),
    Mutant("training/trainer.py", "return linear(end - begin, step - begin)",
           "return linear(num_training_steps, step)"),
    Mutant("training/trainer.py", "gate_rate if id(group", "weight_rate if id(group"),
    # Gates.
    Mutant("pruning/gates.py", "log_alpha - BETA * math.log(-LOW / HIGH)",
           "log_alpha + BETA * math.log(-LOW / HIGH)"),
    Mutant("pruning/gates.py", "math.log((1 - LOW) / (HIGH - 1))", "math.log(-LOW / HIGH)"),
    Mutant("pruning/gates.py", "BETA = 2 / 3", "BETA = 1 / 2"),
    Mutant("pruning/gates.py", "self.draws += 1", "self.draws += 0"),
    Mutant("pruning/gates.py", "self.seed * 1_000_003 +", "0 * 1_000_003 +"),
    Mutant("pruning/gates.py", "every.argsort(stable=True)", "every.argsort(stable=True, descending=True)"),
    Mutant("pruning/attach.py", ".repeat_interleave(head_dim, -1)", ".repeat(head_dim)"),
    Mutant("pruning/attach.py", "centred = (x - mean) * is_open", "centred = x - mean"),
    Mutant("pruning/attach.py", "number = is_open.sum(-1, keepdim=True).clamp(min=1)", "number = x.size(-1)"),
    # Budgets and decisions.
    Mutant("pruning/budget.py", "return empty + open_heads", "return open_heads"),
    Mutant("pruning/budget.py", "fraction(layer, LayerShape(1, 0))", "fraction(0, LayerShape(1, 0))"),
    Mutant("pruning/budget.py", "place = (counts.hidden.sum() - 1)", "place = counts.hidden.sum()"),
    Mutant("pruning/budget.py", "fits = float(self.expected(counts)) <= fraction",
           "fits = float(self.expected(counts)) <= 1 - fraction"),
    Mutant("pruning/budget.py", "every.sum() / max(every.numel(), 1)", "every.mean()"),
    Mutant("pruning/decision.py", "(low, middle) if fits else (middle + 1, high)",
           "(low, middle) if fits else (middle + 1, high - 1)"),
    Mutant("pruning/decision.py", "descending=True, stable=True", "descending=False, stable=True"),
    Mutant("pruning/decision.py", "return min(-(-width // align) * align, limit)",
           "return min(width // align * align, limit)"),
    Mutant("pruning/decision.py", "return int((rank >= threshold).sum())",
           "return int((rank > threshold).sum())"),
    Mutant("pruning/decision.py", "min=LEAST_HIDDEN_VALUE", "min=0.0"),
    # Compaction and compensation.
    Mutant("pruning/compact.py", "* head_gates.to", "+ 0 * head_gates.to"),
    Mutant("pruning/compact.py", "* unit_gates.to", "+ 0 * unit_gates.to"),
    Mutant("pruning/compact.py", "tensor.index_select(0, kept) * torch.tensor(hidden.values).to(tensor)",
           "tensor.index_select(0, kept)"),
    Mutant("pruning/compact.py", ".to(encoder.device, encoder.dtype)", ".to(encoder.device)"),
    Mutant("pruning/compensate.py", "return None, error\n", "return None, -error\n"),
    Mutant("pruning/compensate.py", "- torch.outer(mean, mean)", ""),
    Mutant("pruning/compensate.py", "- torch.outer(error, mean)", ""),
    Mutant("pruning/compensate.py", "error - matrix @ mean", "error"),
    Mutant("pruning/compensate.py", "ridge * covariance.diagonal().mean() + floor", "floor"),
    Mutant("pruning/compensate.py", "raw.append(inputs[0][real]", "raw.append(inputs[0].flatten(0, 1)"),
    Mutant("pruning/compensate.py", "before_gates, prepend=True", "before_gates"),
    Mutant("pruning/compensate.py", "if reached < least:", "if reached > least:"),
    Mutant("pruning/compensate.py", "if reached < least:", "if reached < 2 * least:"),
    Mutant("pruning/compensate.py", "            compensator.reset()\n", ""),
    Mutant("pruning/compensate.py", "stack.enter_context(evaluating(model))", "pass"),
    Mutant("tasks/output_kinds.py", "teacher_log.exp() * (teacher_log - student_log)",
           "teacher_log.exp() * (student_log - teacher_log)"),
    # Importance.
    Mutant("pruning/importance.py", "gradient.abs().reshape(rows, gradient.size(-1)).sum(0)",
           "gradient.reshape(rows, gradient.size(-1)).sum(0).abs()"),
    Mutant("pruning/importance.py", "value / price.clamp(min=1e-12)", "value"),
    Mutant("pruning/importance.py", "(loss - open_loss) / group.numel()", "loss - open_loss"),
]  # fmt: skip


def found(package: Path, tests: tuple[str, ...]) -> bool:
    """Whether any of these tests fails on this copy of the package; in a process of its own."""
    child = os.fork()
    if child == 0:
        import pytest

        sys.path.insert(0, str(package.parent))
        os.chdir(ROOT)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
        os._exit(int(status))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, 1, 2):  # 2: the fault keeps a module from being imported
        raise RuntimeError(f"pytest ended with status {status}")
    return status != 0


def copied(into: Path, mutant: Mutant | None) -> Path:
    """A copy of the package, with the fault."""
    package = into / PACKAGE.name
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is not None:
        mutant.plant(package)
    return package


def chosen(words: list[str]) -> list[Mutant]:
    """The faults whose description has one of the words; all without any word."""
    return [mutant for mutant in MUTANTS if not words or any(word in str(mutant) for word in words)]


def main() -> int:
    sys.dont_write_bytecode = True
    with contextlib.redirect_stderr(io.StringIO()):
        import torch
        import transformers.models.bert.modeling_bert
        import transformers.models.roberta.modeling_roberta
        import transformers.trainer  # noqa: F401

        import pruned_ops  # noqa: F401
    torch.set_num_threads(1)
    survived = []
    mutants = chosen(sys.argv[1:])
    for mutant in [None, *mutants]:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            package = copied(Path(folder), mutant)
            finder = next((tests for tests in (TESTS, JOB_TESTS) if found(package, tests)), None)
        if mutant is None:
            if finder is not None:
                sys.exit("the tests fail without any fault")
            continue
        outcome = "survived" if finder is None else "found"
        survived += [mutant] if finder is None else []
        print(f"{outcome:8} {time.monotonic() - start:5.0f} s  {mutant}", flush=True)
    print(f"{len(mutants) - len(survived)} of {len(mutants)} faults found")
    return min(len(survived), 100)


if __name__ == "__main__":
    sys.exit(main())
