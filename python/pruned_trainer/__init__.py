"""Decide which heads and FFN units of an encoder its task does not need, and train the rest."""

import importlib
from typing import TYPE_CHECKING, Any

from pruned_trainer.pruning.attach import attach, attached, detach
from pruned_trainer.pruning.budget import Budget, LatencyBudget, SizeBudget
from pruned_trainer.pruning.compact import compact
from pruned_trainer.pruning.decision import Decision, decide
from pruned_trainer.pruning.gate_phase import GatePhase, HoldTarget, PayPerGate
from pruned_trainer.pruning.gates import Gates, PerGate, Scores
from pruned_trainer.pruning.options import Target
from pruned_trainer.training.distillation import Distillation
from pruned_trainer.training.trainer import PruningTrainer

if TYPE_CHECKING:
    from pruned_trainer.jobs.call import prune
    from pruned_trainer.jobs.prune import PruneResult
    from pruned_trainer.training.gating import Gating, GatingTrainerMixin, gating

# What brings in more of the library than most of its callers need: imported when it is asked for.
_LATER = {
    "PruneResult": "pruned_trainer.jobs.prune",
    "prune": "pruned_trainer.jobs.call",
    "Gating": "pruned_trainer.training.gating",
    "GatingTrainerMixin": "pruned_trainer.training.gating",
    "gating": "pruned_trainer.training.gating",
}

__all__ = [
    "Budget",
    "Decision",
    "Distillation",
    "GatePhase",
    "Gating",
    "GatingTrainerMixin",
    "Gates",
    "HoldTarget",
    "LatencyBudget",
    "PayPerGate",
    "PerGate",
    "PruneResult",
    "PruningTrainer",
    "Scores",
    "SizeBudget",
    "Target",
    "attach",
    "attached",
    "compact",
    "decide",
    "detach",
    "gating",
    "prune",
]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
