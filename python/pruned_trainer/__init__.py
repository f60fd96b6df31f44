"""Decide which heads and FFN units of a question-answering BERT or RoBERTa the task does not need, and train
the rest."""

from pruned_trainer.attach import attach, attached, detach
from pruned_trainer.budget import Budget, Target
from pruned_trainer.compact import compact
from pruned_trainer.decision import Decision, decide
from pruned_trainer.distillation import Distillation
from pruned_trainer.gates import Gates
from pruned_trainer.trainer import GatePhase, PruningTrainer

__all__ = [
    "Budget",
    "Decision",
    "Distillation",
    "GatePhase",
    "Gates",
    "PruningTrainer",
    "Target",
    "attach",
    "attached",
    "compact",
    "decide",
    "detach",
]
