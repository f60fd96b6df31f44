"""The surgeon's scores: against what they are defined as, and against a choice that does not know what units
have in common."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertForQuestionAnswering

from matching import batch_of, trained_model
from pruned_ops.models.stock import model_shape
from pruned_trainer import Decision, SizeBudget, Target, compact, decide
from pruned_trainer.pruning import importance, surgeon
from pruned_trainer.pruning.decision import Kept, LayerDecision
from pruned_trainer.tasks.output_kinds import comparable_outputs, drawn_losses
from pruned_trainer.tasks.task import without_labels


@pytest.fixture(scope="module")
def trained() -> BertForQuestionAnswering:
    return trained_model(300)


def batches(number: int, seed: int = 0) -> list[dict[str, Tensor]]:
    return [batch_of(16, torch.Generator().manual_seed(seed + i)) for i in range(number)]


def a_problem(width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix (5, width), the covariance of its inputs, and a curvature."""
    generator = torch.Generator().manual_seed(seed)

    def moments(size: int) -> Tensor:
        drawn = torch.randn(4 * size, size, generator=generator, dtype=torch.float64)
        return drawn.T @ drawn / len(drawn)

    return torch.randn(5, width, generator=generator, dtype=torch.float64), moments(width), moments(5)


def rise_without(columns: list[int], matrix: Tensor, covariance: Tensor, curvature: Tensor) -> float:
    """Half of trace(D' G D C) for the D that is least of all that close these columns, by a solver of its
    own."""
    stay = [i for i in range(matrix.shape[1]) if i not in columns]
    solved = torch.zeros_like(matrix)
    wanted = (matrix @ covariance)[:, stay]
    solved[:, stay] = torch.linalg.lstsq(covariance[stay][:, stay], wanted.T).solution.T
    change = solved - matrix
    return float(torch.trace(change.T @ curvature @ change @ covariance)) / 2


@pytest.mark.parametrize("size", [1, 3])
def test_the_least_goes_first_and_the_rise_is_that_of_the_matrix_solved_anew(size: int) -> None:
    matrix, covariance, curvature = a_problem(4 * size)
    found = surgeon.removal_rises(matrix, covariance, curvature, 4, ridge=0.0)

    def blocks(*names: int) -> list[int]:
        return [name * size + i for name in names for i in range(size)]

    alone = {name: rise_without(blocks(name), matrix, covariance, curvature) for name in range(4)}
    first = min(alone, key=alone.__getitem__)
    assert int(found.argmin()) == first and float(found[first]) == pytest.approx(alone[first], rel=1e-6)
    pairs = {
        name: rise_without(blocks(first, name), matrix, covariance, curvature) - alone[first]
        for name in range(4)
        if name != first
    }
    second = min(pairs, key=pairs.__getitem__)
    assert float(found[second]) == pytest.approx(max(pairs[second], alone[first]), rel=1e-6)
    assert int(found.argsort()[1]) == second


@pytest.mark.parametrize("size", [1, 3])
def test_every_removal_is_that_of_a_search_from_the_beginning(size: int) -> None:
    """Through all halvings of what is kept; the caller's matrix is not written to."""
    matrix, covariance, curvature = a_problem(9 * size)
    before = matrix.clone()
    found = surgeon.removal_rises(matrix, covariance, curvature, 9, ridge=0.0)
    assert torch.equal(matrix, before)
    removed: list[int] = []
    total = least = 0.0
    while len(removed) < 9:
        rises = {
            name: rise_without(
                [each * size + i for each in (*removed, name) for i in range(size)],
                matrix,
                covariance,
                curvature,
            )
            for name in range(9)
            if name not in removed
        }
        name = min(rises, key=rises.__getitem__)
        least, total = max(least, rises[name] - total), rises[name]
        removed.append(name)
        assert float(found[name]) == pytest.approx(least, rel=1e-6)


def test_several_at_a_time_share_what_they_cost_together() -> None:
    matrix, covariance, curvature = a_problem(8)
    found = surgeon.removal_rises(matrix, covariance, curvature, 8, at_a_time=8, ridge=0.0)
    everything = rise_without(list(range(8)), matrix, covariance, curvature)
    assert float(found.min()) > 0 and float(found.sum()) >= everything - 1e-9
    one_by_one = surgeon.removal_rises(matrix, covariance, curvature, 8, ridge=0.0)
    assert len(one_by_one.unique()) > 1 and bool((one_by_one > 0).all())


def test_of_two_units_that_say_the_same_one_is_free_and_not_the_other() -> None:
    matrix, covariance, curvature = a_problem(6)
    same = torch.eye(6, dtype=torch.float64)
    same[1] = same[0]  # the second input repeats the first
    covariance = same @ covariance @ same.T
    found = surgeon.removal_rises(matrix, covariance, curvature, 6, ridge=1e-9)
    twins = sorted(found[:2].tolist())
    assert twins[0] < 1e-6 * twins[1] and int(found.argmin()) in (0, 1)


def test_moments_are_those_of_every_real_token(trained: BertForQuestionAnswering) -> None:
    """Against autograd, a place at a time; padding and labels bring nothing, and the model is left as it
    was."""
    data = batches(2)
    for batch in data:
        batch["attention_mask"][:4, -3:] = 0
    trained.train()
    before = {name: parameter.requires_grad for name, parameter in trained.named_parameters()}
    trained.zero_grad()
    moments = surgeon.moments_of(trained, [without_labels(batch) for batch in data], ("heads", "ffn"), seed=5)
    assert trained.training and before == {n: p.requires_grad for n, p in trained.named_parameters()}
    assert all(parameter.grad is None for parameter in trained.parameters())
    assert not any(module._forward_hooks for module in trained.modules())
    model: Any = copy.deepcopy(trained).eval()
    projection = model.bert.encoder.layer[1].output.dense
    seen: dict[str, list[Tensor]] = {"inputs": [], "outputs": [], "gradients": []}

    def keep(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen["inputs"].append(inputs[0].detach())
        seen["outputs"].append(output)

    projection.register_forward_hook(keep)
    generator = torch.Generator().manual_seed(5)
    for batch in data:
        said = comparable_outputs(model(**without_labels(batch)), model.config, batch["attention_mask"])
        for _ in range(surgeon.DRAWS):
            (output,) = seen["outputs"][-1:]
            loss = drawn_losses(said, batch["attention_mask"], generator).sum()
            seen["gradients"] += torch.autograd.grad(loss, output, retain_graph=True)
    real = [batch["attention_mask"].bool() for batch in data]
    inputs = torch.cat([x[mask] for x, mask in zip(seen["inputs"], real, strict=True)]).double()
    each = [mask for mask in real for _ in range(surgeon.DRAWS)]
    gradients = torch.cat([g[mask] for g, mask in zip(seen["gradients"], each, strict=True)]).double()
    found = moments["ffn", 1]
    assert found.tokens == len(inputs) == sum(int(mask.sum()) for mask in real)
    torch.testing.assert_close(found.covariance(), torch.cov(inputs.T, correction=0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        found.curvature(), gradients.T @ gradients / len(gradients), rtol=1e-4, atol=1e-9
    )


def test_compensated_it_loses_less_than_gain(trained: BertForQuestionAnswering) -> None:
    budget = SizeBudget(model_shape(trained), "macs", [14])
    data, fresh = batches(8), batches(8, seed=100)

    def loss_of(scores: importance.Scores) -> float:
        decision = decide(scores, budget, Target(macs=0.5), align=1)
        narrow = compact(trained, decision, calibration=data, compensate="least-squares").eval()
        with torch.no_grad():
            losses = [importance.example_losses(narrow(**without_labels(batch)), batch) for batch in fresh]
        return float(torch.cat(losses).mean())

    by_surgeon = surgeon.score(trained, data, budget, ("heads", "ffn"))
    assert loss_of(by_surgeon) < loss_of(importance.score("gain", trained, data, budget, ("heads", "ffn")))


def test_parts_that_no_projection_has_are_refused_and_empty_layers_are_none(
    trained: BertForQuestionAnswering,
) -> None:
    budget = SizeBudget(model_shape(trained), "macs", [14])
    with pytest.raises(ValueError, match="leave hidden out"):
        surgeon.score(trained, batches(1), budget, ("hidden",))
    scores = surgeon.score(trained, batches(1), budget, ("ffn",))
    assert all(bool(torch.isinf(heads).all()) for heads in scores.rank.heads)
    narrow = compact(trained, decide(scores, budget, Target(macs=0.8), align=1))
    again = surgeon.score(narrow, batches(1), SizeBudget(model_shape(narrow), "macs", [14]), ("ffn",))
    assert [len(x) for x in again.rank.ffn] == [layer.ffn_width for layer in model_shape(narrow).layers]


def test_a_layer_without_heads_has_nothing_to_score(trained: BertForQuestionAnswering) -> None:
    """No gradient comes to its output projection, which only has a bias."""
    whole = Kept(tuple(range(48)), (1.0,) * 48)
    layers = LayerDecision(Kept((), ()), whole), LayerDecision(Kept((1, 2), (1.0, 1.0)), Kept((), ()))
    narrow = compact(trained, Decision(layers, 1, {}, {}))
    budget = SizeBudget(model_shape(narrow), "macs", [14])
    scores = surgeon.score(narrow, batches(1), budget, ("heads", "ffn"))
    assert [len(heads) for heads in scores.rank.heads] == [0, 2]
    assert [len(units) for units in scores.rank.ffn] == [48, 0]
    assert all(bool(torch.isfinite(x).all()) for x in (*scores.rank.heads, *scores.rank.ffn))


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_constant_unit_is_free_where_a_bias_can_take_its_mean(has_bias: bool) -> None:
    """And only there: without a bias its mean is lost with it."""
    model: Any = trained_model(steps=1)
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.intermediate.dense.weight[0] = 0
        layer.intermediate.dense.bias[0] = 2.0
    if not has_bias:
        layer.output.dense.bias = None
    worths = surgeon.worth(model, batches(2), ("ffn",)).ffn[0]
    assert int(worths.argmin()) == 0 if has_bias else float(worths[0]) > float(worths[1:].median())
