"""The paper's other ways to choose what stays, which need a few passes over data and no training: random,
gain, leave-one-out.

All give the same `Scores` as trained gates do, so that `decide` treats them alike. Gain and leave-one-out
measure what a part is worth to the loss; it is divided by what the part costs, so that heads, FFN units and
hidden dimensions can be ranked together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pruned_ops import ModelShape
from pruned_ops.models.disentangled import relative_norm
from pruned_ops.models.stock import config_of, find_encoder, model_shape
from pruned_ops.qa.logits import evaluating
from pruned_trainer.distributed import shared
from pruned_trainer.pruning.attach import attached
from pruned_trainer.pruning.budget import Budget
from pruned_trainer.pruning.gates import PerGate, Scores
from pruned_trainer.pruning.options import METHODS, check_parts
from pruned_trainer.tasks.output_kinds import comparable_outputs, label_losses
from pruned_trainer.tasks.task import without_labels

# The number of FFN units, or hidden dimensions, that leave-one-out closes together; one by one, each of
# thousands would take a pass over the data.
GROUP = 64

Batches = Sequence[dict[str, Tensor]]
# Gates that leave-one-out closes together: their part, the number of the layer, and which of its gates.
LeftOut = tuple[str, int, slice]


def score(
    method: str,
    model: nn.Module,
    batches: Batches,
    budget: Budget,
    parts: Sequence[str],
    seed: int = 0,
    progress: bool = False,
) -> Scores:
    """Scores of every gate on `parts` of a model, by one of METHODS; the model is left as it was.

    batches: padded inputs with the task's LABELS, on the model's device; random needs none. Several processes
    share leave-one-out's passes.
    """
    check_parts(parts)
    shape = model_shape(model)
    if method == "random":
        worth = _random(shape, seed)
    elif method == "gain":
        worth = per_cost(_gain(model, batches, parts, progress), budget, parts)
    elif method == "leave-one-out":
        worth = per_cost(_leave_one_out(model, batches, parts, progress), budget, parts)
    else:
        raise ValueError(f"method is {method!r}; one of {', '.join(METHODS)} is needed")
    rank = PerGate.full(shape, math.inf)
    for part in parts:
        rank = rank.replace(part, worth)
    return Scores(rank, PerGate.full(shape, 1.0))


def example_losses(output: Any, batch: dict[str, Tensor], config: Any = None) -> Tensor:
    """The loss of each example on its labels, (batch,), as `label_losses` has it for this kind of output."""
    return label_losses(comparable_outputs(output, config, batch.get("attention_mask")), batch, config)


def _random(shape: ModelShape, seed: int) -> PerGate:
    generator = torch.Generator().manual_seed(seed)
    return PerGate.full(shape, 0.0).map(lambda t: torch.rand(t.shape, generator=generator))


def per_cost(worth: PerGate, budget: Budget, parts: Sequence[str]) -> PerGate:
    """What each gate on these parts is worth, over its price: (gates on other parts: 0)."""
    prices = budget.prices(parts)
    scores = PerGate.full(budget.dense, 0.0)
    for part in parts:
        for score, value, price in zip(scores.of(part), worth.of(part), prices.of(part), strict=True):
            score.copy_(value / price.clamp(min=1e-12))
    return scores


def _gain(model: nn.Module, batches: Batches, parts: Sequence[str], progress: bool) -> PerGate:
    """Mean over examples of |d loss / d gate| with all gates at 1 (Michel et al. 2019)."""
    config = config_of(model)
    if "hidden" in parts and relative_norm(find_encoder(model)) is not None:
        # All examples of a batch share the norm of the relative embeddings.
        batches = [example for batch in batches for example in _one_by_one(batch)]
    with frozen(model), attached(model, parts=parts) as gates:
        total = PerGate.full(gates.shape, 0.0)
        examples = 0
        for batch in tqdm(batches, desc="gain", disable=not progress):
            rows = len(batch["input_ids"])
            # Each example has gates of its own, so that one backward pass gives every example's derivatives.
            ones = PerGate.full(gates.shape, 1.0).map(partial(_for_each, rows, gates.draws.device))
            gates.fixed = ones
            leaves = [tensor for part in parts for tensor in ones.of(part)]
            with torch.enable_grad():
                loss = example_losses(model(**without_labels(batch)), batch, config).sum()
            gradients = torch.autograd.grad(loss, leaves)
            sums = [tensor for part in parts for tensor in total.of(part)]
            for part_sum, gradient in zip(sums, gradients, strict=True):
                part_sum += gradient.abs().reshape(rows, gradient.size(-1)).sum(0).cpu()
            examples += rows
    return total.map(lambda t: t / max(examples, 1))


def _for_each(rows: int, device: torch.device, values: Tensor) -> Tensor:
    """The values once for each example, (rows, 1, gates), or (gates,) for a single one, as leaves of the
    gradient."""
    values = values.to(device)
    return (values if rows == 1 else values.expand(rows, 1, -1)).clone().requires_grad_()


def _one_by_one(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """A batch of its own for each example."""
    rows = range(len(batch["input_ids"]))
    return [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in rows]


def _leave_one_out(model: nn.Module, batches: Batches, parts: Sequence[str], progress: bool) -> PerGate:
    """The mean loss with a gate closed minus the loss with all gates open. Heads are closed one by one, FFN
    units and hidden dimensions in groups of GROUP."""
    config = config_of(model)
    with frozen(model), attached(model, parts=parts) as gates, torch.no_grad():
        worth = PerGate.full(gates.shape, 0.0)

        def mean_loss(closed: LeftOut | None) -> float:
            values = PerGate.full(gates.shape, 1.0)
            if closed is not None:
                part, number, where = closed
                values.of(part)[number][where] = 0.0
            gates.fix(values)
            losses = [example_losses(model(**without_labels(batch)), batch, config) for batch in batches]
            return float(torch.cat(losses).mean())

        open_loss = mean_loss(None)
        choices = left_out(gates.shape, parts)

        def losses_of(choices: Sequence[LeftOut]) -> list[float]:
            return [mean_loss(choice) for choice in tqdm(choices, "leave-one-out", disable=not progress)]

        for (part, number, where), loss in zip(choices, shared(losses_of, choices), strict=True):
            group = worth.of(part)[number][where]
            group += (loss - open_loss) / group.numel()
    return worth


def left_out(shape: ModelShape, parts: Sequence[str]) -> list[LeftOut]:
    """The gates that leave-one-out closes, one choice after another."""
    return [
        (part, number, slice(start, start + size))
        for part, size in (("heads", 1), ("ffn", GROUP), ("hidden", GROUP))
        if part in parts
        for number, tensor in enumerate(PerGate.full(shape, 0.0).of(part))
        for start in range(0, tensor.numel(), size)
    ]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, without gradients for its weights, inside the block."""
    required = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)
