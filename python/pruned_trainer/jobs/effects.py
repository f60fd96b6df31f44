"""Settings of a run that leave each other without effect: they are refused, because what is asked for is
obeyed, or said to be impossible.

This module imports neither torch nor transformers, so that the command line can show its help at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pruned_trainer.pruning.options import DEFAULT_PARTS, UNTRAINED
from pruned_trainer.tasks.options import PAIRED, TEXT_COLUMNS

if TYPE_CHECKING:
    from pruned_trainer.jobs.settings import PruneSettings

# Shares of windows that are made for the retraining, and that only the teacher judges.
UNLABELLED = ("cross_pairs", "masked_texts", "shuffled_texts")


def check_effects(settings: PruneSettings) -> None:
    """ValueError for settings that the other settings leave without effect."""
    if settings.decision is not None:
        _check_decided(settings)
    _check_recipe(settings)
    _check_teaching(settings)
    _check_phases(settings)


def _check_decided(settings: PruneSettings) -> None:
    """Refuse what a decision that is made already has no use for."""
    if settings.targets:
        raise ValueError("a decision has met its target: give one of the two")
    if settings.recipe != "joint" or settings.gate_steps is not None or settings.gate_epochs is not None:
        raise ValueError("a decision is made already: no recipe and no steps of gates go with it")
    if tuple(settings.parts) != DEFAULT_PARTS or settings.align is not None or settings.penalty != "one":
        raise ValueError("a decision is made already: no parts, no align and no penalty go with it")


def _check_recipe(settings: PruneSettings) -> None:
    """Refuse what the recipe has no use for."""
    lambdas = (settings.lambda_attention, settings.lambda_ffn, settings.lambda_hidden)
    if settings.recipe != "paper" and set(lambdas) != {1.0}:
        raise ValueError("the lambda multiples are prices of the paper's recipe: --recipe paper")
    if settings.targets and set(lambdas) != {1.0}:
        raise ValueError("a target holds the gates to a share: the lambda multiples are for runs without")
    if settings.recipe in UNTRAINED and settings.penalty != "one":
        raise ValueError(f"recipe {settings.recipe} trains no gates: penalty has no meaning there")
    if settings.gradual and (settings.recipe != "joint" or "hidden" in settings.parts):
        raise ValueError("gradual trains gates on heads and ffn anew for each target: --recipe joint")
    if settings.gradual and len(settings.targets) < 2:
        raise ValueError("gradual goes from each target to the next: name two or more")
    if settings.recipe == "fast" and "hidden" in settings.parts:
        raise ValueError("recipe fast scores heads and FFN units: leave hidden out of the parts")


def _check_teaching(settings: PruneSettings) -> None:
    """Refuse what the task, or the weights of the losses, have no use for."""
    weights = settings.distillation
    if settings.cache_teacher is not None and settings.task in TEXT_COLUMNS:
        raise ValueError(f"cache_teacher keeps start and end logits, which {settings.task} has none of")
    for name in UNLABELLED:
        if getattr(settings, name) and not settings.distillation_in("retrain").needs_teacher:
            raise ValueError(f"{name} have no labels, and no teacher teaches in the retrain phase")
    if settings.cross_pairs and settings.task not in PAIRED:
        raise ValueError(f"cross_pairs are of a question and a text: for {', '.join(PAIRED)}")
    if not weights.hidden and (weights.projection or weights.layers):
        raise ValueError("a projection and a layer map are for hidden states, whose weight is 0")
    if settings.cache_teacher is not None and (weights.hidden > 0 or not weights.logits):
        raise ValueError(
            "cache_teacher keeps the teacher's logits only, and its hidden states are asked for too: "
            "set --distil-hidden 0 (and a --distil-logits above 0)"
        )


def _check_phases(settings: PruneSettings) -> None:
    """Refuse what is for a training that this run does not have."""
    idle = [name for name in ("average_steps", *UNLABELLED, "compile") if getattr(settings, name)]
    if idle and not settings.retrains:
        raise ValueError(
            f"{', '.join(idle)}: for the narrow model's training, which has no steps here: give "
            "retrain_steps or retrain_epochs"
        )
    phases = (("gates", settings.trains_gates), ("retrain", settings.retrains))
    taught = any(trains and settings.distillation_in(phase).needs_teacher for phase, trains in phases)
    for name in ("teacher", "cache_teacher"):
        judges = name == "teacher" and not settings.has_labels
        if getattr(settings, name) is not None and not taught and not judges:
            raise ValueError(
                f"{name} is given, and no teacher teaches in any phase that this run trains in: leave it "
                "out, or see distil_in, retrain_steps and retrain_epochs"
            )
