"""Optimal brain surgeon on whole heads and FFN units: what each is worth to the loss once those that are left
stand in for it (Hassibi and Stork 1993; for structures Kurtic et al. 2023).

About the model as it is, a change D of an output projection's matrix raises the loss of a token by half of
trace(D' G D C), where C is the covariance of the projection's inputs and G the second moment of the loss's
gradient at its outputs: a Kronecker-factored Fisher matrix (Martens and Grosse 2015). When inputs are removed
and the rest of the matrix is solved anew, this rise has a closed form. It counts what units have in common:
of two units that say the same, either may go, but not both. No weight is trained, or changed, here.

The loss is how far the outputs move from the model's own, so no labels are needed: its gradients are those
of outcomes that are drawn from what the model says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pruned_ops.models.stock import LayerParts, config_of, find_encoder, layers_of, model_shape
from pruned_trainer.pruning.budget import Budget
from pruned_trainer.pruning.compensate import PROJECTIONS, RIDGE, Place
from pruned_trainer.pruning.decision import Decision
from pruned_trainer.pruning.gates import PerGate, Scores
from pruned_trainer.pruning.importance import Batches, frozen, per_cost
from pruned_trainer.tasks.output_kinds import comparable_outputs, drawn_losses
from pruned_trainer.tasks.task import without_labels

# Outcomes drawn for each batch: a backward pass each, over one forward pass.
DRAWS = 2
# FFN units that go at a time, the least of those that are left; one by one would take eight times as long.
UNITS_AT_A_TIME = 8


@dataclass
class Moments:
    """Sums over tokens at one output projection, in fp64: of its inputs (width,), of their products
    (width, width), and, over tokens and draws, of the products of the loss's gradient at its outputs
    (hidden, hidden)."""

    tokens: int = 0
    inputs: Tensor | None = None
    products: Tensor | None = None
    drawn: int = 0
    gradients: Tensor | None = None

    def add_inputs(self, inputs: Tensor) -> None:
        """inputs: (tokens, width)."""
        self.tokens += len(inputs)
        self.inputs = _sum(self.inputs, inputs.double().sum(0))
        self.products = _sum(self.products, (inputs.T @ inputs).double())

    def add_gradients(self, gradients: Tensor) -> None:
        """gradients: (tokens, hidden), of one draw."""
        self.drawn += len(gradients)
        self.gradients = _sum(self.gradients, (gradients.T @ gradients).double())

    def covariance(self, has_bias: bool = True) -> Tensor:
        """The covariance of the inputs: (width, width). Without a bias, which would make up for their means,
        it is their second moment."""
        assert self.inputs is not None and self.products is not None
        mean = self.inputs / self.tokens * has_bias
        return self.products / self.tokens - torch.outer(mean, mean)

    def curvature(self) -> Tensor:
        """The second moment of the gradient, over tokens and draws: (hidden, hidden)."""
        assert self.gradients is not None
        return self.gradients / self.drawn


def _sum(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total + term


def score(
    model: nn.Module, batches: Batches, budget: Budget, parts: Sequence[str], seed: int = 0,
    pooling: str = "mean", progress: bool = False, earlier: Decision | None = None,
) -> Scores:  # fmt: skip
    """Scores of every gate on `parts`, as `importance.score` makes them: `worth` for what it costs.

    earlier: the decision that left `model` of the budget's dense model, where one did; what it removed ranks
    below everything."""
    rank = PerGate.full(budget.dense, math.inf)
    worths = worth(model, batches, parts, seed, pooling, progress)
    if earlier is not None:
        worths = earlier.spread(worths, budget.dense, -math.inf)
    ranked = per_cost(worths, budget, parts)
    for part in parts:
        rank = rank.replace(part, ranked)
    return Scores(rank, PerGate.full(budget.dense, 1.0))


def worth(
    model: nn.Module, batches: Batches, parts: Sequence[str], seed: int = 0, pooling: str = "mean",
    progress: bool = False,
) -> PerGate:  # fmt: skip
    """The rise of a token's loss when a head or an FFN unit goes, after those of its layer that are worth
    less; the worth of parts that are not asked for is 0.

    batches: padded inputs, some hundred windows in all; labels are not looked at. seed: of the draws.
    pooling: as for `comparable_outputs`. The model is left as it was. Errors: ValueError for hidden
    dimensions, which belong to no projection alone.
    """
    if "hidden" in parts:
        raise ValueError(
            "the recipe fast scores heads and FFN units: leave hidden out of --parts, or take the recipe gain"
        )
    shape = model_shape(model)
    worths = PerGate.full(shape, 0.0)
    moments = moments_of(model, batches, parts, seed, pooling, progress)
    layers = layers_of(find_encoder(model))
    for (part, i), at_place in moments.items():
        number = len(worths.of(part)[i])
        projection = getattr(layers[i], PROJECTIONS[part])
        covariance = at_place.covariance(projection.bias is not None)
        rises = removal_rises(
            projection.weight.detach().double(), covariance, at_place.curvature(), number,
            UNITS_AT_A_TIME if part == "ffn" else 1,
        )  # fmt: skip
        worths.of(part)[i].copy_(rises.float())
    return worths


def moments_of(
    model: nn.Module, batches: Batches, parts: Sequence[str], seed: int = 0, pooling: str = "mean",
    progress: bool = False,
) -> dict[Place, Moments]:  # fmt: skip
    """The moments of every output projection of these parts that has inputs, from a forward pass and DRAWS
    backward passes over each batch."""
    layers = layers_of(find_encoder(model))
    moments = {
        (part, i): Moments()
        for i, layer in enumerate(layers)
        for part in parts
        if getattr(layer, PROJECTIONS[part]).in_features
    }
    config, generator = config_of(model), torch.Generator().manual_seed(seed)
    with frozen(model), torch.enable_grad():
        for batch in tqdm(batches, desc="curvature", disable=not progress):
            mask = batch["attention_mask"]
            with _watched(model, layers, moments, mask.bool()):
                outputs = comparable_outputs(model(**without_labels(batch)), config, mask, pooling)
                for draw in range(DRAWS):
                    loss = drawn_losses(outputs, mask, generator).sum()
                    loss.backward(retain_graph=draw + 1 < DRAWS)
    return moments


@contextmanager
def _watched(
    model: nn.Module, layers: Sequence[LayerParts], moments: dict[Place, Moments], real: Tensor
) -> Iterator[None]:
    """Inside the block, a pass through the model adds to the moments what its real tokens (batch, seqlen)
    bring to each projection, forwards and backwards."""

    def watch(at_place: Moments) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            at_place.add_inputs(inputs[0].detach()[real])
            output.register_hook(lambda gradient: at_place.add_gradients(gradient[real]))

        return hook

    # No weight asks for a gradient: what leaves the embeddings does, so that gradients reach every layer.
    embeddings: Any = find_encoder(model).embeddings
    hooks = [embeddings.register_forward_hook(lambda *call: call[-1].detach().requires_grad_())]
    hooks += [
        getattr(layers[i], PROJECTIONS[part]).register_forward_hook(watch(at_place))
        for (part, i), at_place in moments.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def removal_rises(
    matrix: Tensor, covariance: Tensor, curvature: Tensor, number: int, at_a_time: int = 1,
    ridge: float = RIDGE,
) -> Tensor:  # fmt: skip
    """The rise of the loss as each of `number` equal blocks of a matrix's columns is removed, least first,
    and the rest is solved anew each time: (number,), by block.

    matrix: (hidden, width). covariance: of the inputs, (width, width). curvature: (hidden, hidden). A block
    that goes later never counts less than one that goes earlier.
    """
    width = matrix.shape[1]
    size, names = width // number, torch.arange(number, device=matrix.device)
    penalty = ridge * covariance.diagonal().mean() + torch.finfo(torch.float64).tiny
    matrix = matrix.clone()  # the caller's stays as it is
    inverse = torch.linalg.inv(covariance + penalty * torch.eye(width).to(covariance))
    rises, least = torch.zeros(number).to(matrix), torch.zeros(()).to(matrix)
    # Solved anew as the matrix is, because that multiplies from the right.
    weighed = curvature @ matrix
    stays = torch.ones(number, dtype=torch.bool, device=matrix.device)
    while len(names):
        block_rises = _block_rises(matrix, weighed, inverse, size, stays)
        values, going = block_rises.topk(min(at_a_time, int(stays.sum())), largest=False, sorted=True)
        columns = _columns(going, size)
        going_inverse = torch.linalg.inv(inverse[columns][:, columns])
        together = (going_inverse * (matrix[:, columns].T @ weighed[:, columns])).sum().clamp(min=0.0)
        shares = values * (together / values.sum().clamp(min=torch.finfo(torch.float64).tiny))
        for name, share in zip(names[going], shares, strict=True):
            least = torch.maximum(least, share)
            rises[name] = least
        stays[going] = False
        step = going_inverse @ inverse[columns]
        for every in (matrix, weighed, inverse):  # in place; what goes becomes 0
            every.addmm_(every[:, columns], step, alpha=-1)
        if 2 * int(stays.sum()) <= len(stays):  # not each time: a copy takes longer than a step
            kept = stays.nonzero().flatten()
            names, stays, columns = names[kept], stays[kept], _columns(kept, size)
            matrix, weighed, inverse = matrix[:, columns], weighed[:, columns], inverse[columns][:, columns]
    return rises / 2


def _block_rises(matrix: Tensor, weighed: Tensor, inverse: Tensor, size: int, stays: Tensor) -> Tensor:
    """Twice the rise of the loss for each block alone, infinite where it does not stay: (number,).
    weighed: curvature @ matrix."""
    number = len(stays)
    every = torch.arange(number, device=matrix.device)
    diagonal_blocks = inverse.view(number, size, number, size)[every, :, every]
    diagonal_blocks[~stays] = torch.eye(size).to(diagonal_blocks)
    blocks, products = (columns.view(-1, number, size).permute(1, 2, 0) for columns in (matrix, weighed))
    rises = (torch.linalg.inv(diagonal_blocks) * (blocks @ products.mT)).sum((1, 2)).clamp(min=0.0)
    return rises.masked_fill(~stays, math.inf)


def _columns(blocks: Tensor, size: int) -> Tensor:
    """The columns of these blocks."""
    return (blocks[:, None] * size + torch.arange(size).to(blocks)).flatten()
