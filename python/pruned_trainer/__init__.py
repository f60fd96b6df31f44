"""Decide which heads and FFN units of a question-answering BERT or RoBERTa the task does not need, and train
the rest."""

from pruned_trainer.pruning.attach import attach, attached, detach
from pruned_trainer.pruning.budget import Budget, LatencyBudget, SizeBudget
from pruned_trainer.pruning.compact import compact
from pruned_trainer.pruning.decision import Decision, decide
from pruned_trainer.pruning.gate_phase import GatePhase, HoldTarget, PayPerGate
from pruned_trainer.pruning.gates import Gates, PerGate, Scores
from pruned_trainer.pruning.options import Target
from pruned_trainer.training.distillation import Distillation
from pruned_trainer.training.trainer import PruningTrainer

__all__ = [
    "Budget",
    "Decision",
    "Distillation",
    "GatePhase",
    "Gates",
    "HoldTarget",
    "LatencyBudget",
    "PayPerGate",
    "PerGate",
    "PruningTrainer",
    "Scores",
    "SizeBudget",
    "Target",
    "attach",
    "attached",
    "compact",
    "decide",
    "detach",
]
