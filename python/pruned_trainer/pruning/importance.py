"""The paper's other ways to choose what stays: random, gain, leave-one-out. No training: scores from a few
passes over data.

All give the same `Scores` as trained gates do, so that `decide` treats them alike. Gain and leave-one-out
measure what a part is worth to the loss; it is divided by what the part costs, so that heads, FFN units and
hidden dimensions can be ranked together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from pruned_ops import ModelShape
from pruned_ops.models.stock import model_shape
from pruned_trainer.distributed import shared
from pruned_trainer.pruning.attach import attached
from pruned_trainer.pruning.budget import Budget
from pruned_trainer.pruning.gates import PerGate, Scores, check_parts
from pruned_trainer.tasks.task import without_labels

METHODS = ("gain", "leave-one-out", "random")
# FFN units and hidden dimensions that leave together in leave-one-out: one by one would take a pass over the
# data for each of thousands.
GROUP = 64

Batches = Sequence[dict[str, Tensor]]


def score(
    method: str,
    model: nn.Module,
    batches: Batches,
    budget: Budget,
    parts: Sequence[str],
    seed: int = 0,
    progress: bool = False,
) -> Scores:
    """Scores of every gate on `parts` of a question-answering model, by one of METHODS.

    Several processes share leave-one-out's passes. batches: padded inputs with the task's LABELS,
    on the model's device; random needs none.
    The model is as before afterwards.
    """
    check_parts(parts)
    shape = model_shape(model)
    if method == "random":
        worth = _random(shape, seed)
    elif method == "gain":
        worth = _per_cost(_gain(model, batches, parts, progress), budget, parts)
    elif method == "leave-one-out":
        worth = _per_cost(_leave_one_out(model, batches, parts, progress), budget, parts)
    else:
        raise ValueError(f"method is {method!r}; one of {', '.join(METHODS)} is needed")
    rank = PerGate.full(shape, math.inf)
    for part in parts:
        rank = rank.replace(part, worth)
    return Scores(rank, PerGate.full(shape, 1.0))


def example_losses(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of start and end (and answer type), averaged, of each example: (batch,)."""
    pairs = [
        (output.start_logits, batch["start_positions"]),
        (output.end_logits, batch["end_positions"]),
    ]
    if "answer_types" in batch:
        pairs.append((output.answer_type_logits, batch["answer_types"]))
    losses = [F.cross_entropy(logits, label, reduction="none") for logits, label in pairs]
    return torch.stack(losses).mean(0)


def _random(shape: ModelShape, seed: int) -> PerGate:
    generator = torch.Generator().manual_seed(seed)
    return PerGate.full(shape, 0.0).map(lambda t: torch.rand(t.shape, generator=generator))


def _per_cost(worth: PerGate, budget: Budget, parts: Sequence[str]) -> PerGate:
    prices = budget.prices(parts)
    found = PerGate.full(budget.dense, 0.0)
    for part in parts:
        for target, value, price in zip(found.of(part), worth.of(part), prices.of(part), strict=True):
            target.copy_(value / price.clamp(min=1e-12))
    return found


def _gain(model: nn.Module, batches: Batches, parts: Sequence[str], progress: bool) -> PerGate:
    """Mean over examples of |d loss / d gate| with all gates at 1 (Michel et al. 2019)."""
    with _evaluating(model), attached(model, parts=parts) as gates:
        total = PerGate.full(gates.shape, 0.0)
        examples = 0
        for batch in _shown(batches, progress, "gain"):
            rows = len(batch["input_ids"])
            # A gate for each example: one backward pass gives every example's own derivatives.
            ones = PerGate.full(gates.shape, 1.0).map(partial(_for_each, rows, gates.draws.device))
            gates.fixed = ones
            leaves = [tensor for part in parts for tensor in ones.of(part)]
            with torch.enable_grad():
                loss = example_losses(model(**without_labels(batch)), batch).sum()
            found = torch.autograd.grad(loss, leaves)
            sums = [tensor for part in parts for tensor in total.of(part)]
            for into, gradient in zip(sums, found, strict=True):
                into += gradient.abs().sum((0, 1)).cpu()
            examples += rows
    return total.map(lambda t: t / max(examples, 1))


def _for_each(rows: int, device: torch.device, values: Tensor) -> Tensor:
    """Values of their own for each example, (rows, 1, gates), that gradients are wanted of."""
    return values.to(device).expand(rows, 1, -1).clone().requires_grad_()


def _leave_one_out(model: nn.Module, batches: Batches, parts: Sequence[str], progress: bool) -> PerGate:
    """Mean loss with a gate closed minus that with all open: heads one by one, others in groups of GROUP."""
    with _evaluating(model), attached(model, parts=parts) as gates, torch.no_grad():
        found = PerGate.full(gates.shape, 0.0)

        def mean_loss(closed: tuple[str, int, slice] | None) -> float:
            values = PerGate.full(gates.shape, 1.0)
            if closed is not None:
                values.of(closed[0])[closed[1]][closed[2]] = 0.0
            gates.fix(values)
            losses = [example_losses(model(**without_labels(batch)), batch) for batch in batches]
            return float(torch.cat(losses).mean())

        everything = mean_loss(None)
        choices = left_out(gates.shape, parts)
        losses = shared(
            lambda some: [mean_loss(choice) for choice in _shown(some, progress, "leave-one-out")], choices
        )
        for (part, number, where), loss in zip(choices, losses, strict=True):
            group = found.of(part)[number][where]
            group += (loss - everything) / group.numel()
    return found


def left_out(shape: ModelShape, parts: Sequence[str]) -> list[tuple[str, int, slice]]:
    """What leave-one-out closes, one after another: part, number of the layer, which of its gates."""
    return [
        (part, number, slice(start, start + size))
        for part, size in (("heads", 1), ("ffn", GROUP), ("hidden", GROUP))
        if part in parts
        for number, tensor in enumerate(PerGate.full(shape, 0.0).of(part))
        for start in range(0, tensor.numel(), size)
    ]


def _shown(things: Iterable[Any], progress: bool, name: str) -> Iterable[Any]:
    return tqdm(things, desc=name) if progress else things


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradients for the weights, inside the block."""
    training, required = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)
        model.train(training)
