"""Choices without training: gain, leave-one-out and random, against what they are defined as."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import BertForQuestionAnswering

from family_models import batch as padded
from family_models import stock
from matching import accuracy, batch_of, trained_model
from pruned_ops.models.stock import model_shape
from pruned_trainer import Scores, SizeBudget, Target, attached, compact, decide
from pruned_trainer.pruning import importance
from pruned_trainer.pruning.gates import PerGate
from pruned_trainer.pruning.options import METHODS, PARTS
from pruned_trainer.tasks.task import without_labels


@pytest.fixture(scope="module")
def trained() -> BertForQuestionAnswering:
    return trained_model()


def batches(number: int = 3, size: int = 8) -> list[dict[str, torch.Tensor]]:
    return [batch_of(size, torch.Generator().manual_seed(i)) for i in range(number)]


def budget_of(model: Any) -> SizeBudget:
    return SizeBudget(model_shape(model), "macs", [14])


def mean_loss(model: Any, gates: Any, values: PerGate, data: list[dict[str, torch.Tensor]]) -> float:
    gates.fix(values)
    with torch.no_grad():
        losses = [importance.example_losses(model(**without_labels(batch)), batch) for batch in data]
    return float(torch.cat(losses).mean())


def check_gain(
    model: Any, data: list[dict[str, torch.Tensor]], places: Sequence[tuple[str, int, int]]
) -> None:
    """Against finite differences of each example's loss, for gates at these (part, layer, gate)."""
    budget, step = budget_of(model), 1e-5
    scores = importance.score("gain", model, data, budget, PARTS)
    prices = budget.prices(PARTS)
    rows = [
        {name: tensor[row : row + 1] for name, tensor in batch.items()}
        for batch in data
        for row in range(len(batch["input_ids"]))
    ]
    for part, layer, gate in places:
        derivatives = []
        with attached(model, parts=PARTS) as gates:
            for row in rows:
                ends = []
                for value in (1 + step, 1 - step):
                    values = PerGate.full(gates.shape, 1.0).map(lambda t: t.double())
                    values.of(part)[layer][gate] = value
                    ends.append(mean_loss(model, gates, values, [row]))
                derivatives.append(abs(ends[0] - ends[1]) / (2 * step))
        expected = sum(derivatives) / len(rows) / float(prices.of(part)[layer][gate])
        assert float(scores.rank.of(part)[layer][gate]) == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_gain_is_the_mean_absolute_derivative(trained: BertForQuestionAnswering) -> None:
    model = copy.deepcopy(trained).double()
    check_gain(model, batches(2, 3), [("heads", 0, 1), ("heads", 1, 3), ("ffn", 1, 7), ("hidden", 0, 5)])


def test_gain_on_hidden_dimensions_where_distances_have_a_layer_norm() -> None:
    """DeBERTa's examples share that one's output, and each has a derivative of its own all the same."""
    model = stock("DebertaV2", "QuestionAnswering").double()
    positions = {name: torch.tensor([1, 2]) for name in ("start_positions", "end_positions")}
    data = [{**padded("right", (9, 5)), **positions}]
    check_gain(model, data, [("heads", 1, 2), ("ffn", 0, 7), ("hidden", 0, 5)])


def test_leave_one_out_is_what_closing_costs(trained: BertForQuestionAnswering) -> None:
    data, budget = batches(), budget_of(trained)
    scores = importance.score("leave-one-out", trained, data, budget, ["heads", "ffn"])
    prices = budget.prices(["heads", "ffn"])
    with attached(trained) as gates:
        open_loss = mean_loss(trained, gates, PerGate.full(gates.shape, 1.0), data)
        values = PerGate.full(gates.shape, 1.0)
        values.heads[1][2] = 0.0
        worth = mean_loss(trained, gates, values, data) - open_loss
        assert float(scores.rank.heads[1][2]) == pytest.approx(worth / float(prices.heads[1][2]), rel=1e-4)
        values = PerGate.full(gates.shape, 1.0)
        values.ffn[0][:] = 0.0  # 48 units are one group
        worth = (mean_loss(trained, gates, values, data) - open_loss) / 48
    assert scores.rank.ffn[0].unique().numel() == 1
    assert float(scores.rank.ffn[0][0]) == pytest.approx(worth / float(prices.ffn[0][0]), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_all_give_scores_that_decide_takes(method: str, trained: BertForQuestionAnswering) -> None:
    """Same seed, same scores; parts that are not pruned never go; the model is left as it was."""
    state = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    budget, target = budget_of(trained), Target(macs=0.8)
    found = [importance.score(method, trained, batches(), budget, ["ffn"], seed=3) for _ in range(2)]
    assert isinstance(found[0], Scores)
    for one, other in zip(found[0].rank.ffn, found[1].rank.ffn, strict=True):
        assert torch.equal(one, other)
    assert all(bool((h == math.inf).all()) for h in found[0].rank.heads)
    decision = decide(found[0], budget, target)
    assert [layer.shape.num_heads for layer in decision.layers] == [4, 4]
    assert 0 < decision.reached["macs"] <= 0.8 and decision.hidden is None
    compact(trained, decision)
    assert all(torch.equal(tensor, state[name]) for name, tensor in trained.state_dict().items())
    assert all(p.requires_grad for p in trained.parameters()) and not hasattr(trained, "pruning_gates")


def test_a_choice_by_gain_is_better_than_a_random_one(trained: BertForQuestionAnswering) -> None:
    budget, target = budget_of(trained), Target(macs=0.6)
    found = {}
    for method in METHODS:
        scores = importance.score(method, trained, batches(8, 32), budget, ["heads", "ffn"], seed=1)
        found[method] = accuracy(compact(trained, decide(scores, budget, target, align=1)))
    assert found["gain"] > found["random"] + 0.1 and found["leave-one-out"] > found["random"] + 0.1, found


def test_what_stays_in_evaluation_mode_does_so() -> None:
    """Who trains around a frozen part keeps it there, also after scores and a compensation."""
    model: Any = trained_model(steps=1).train()
    model.bert.embeddings.eval()
    decision = decide(importance.score("gain", model, batches(1), budget_of(model), ["ffn"]),
                      budget_of(model), Target(macs=0.8))  # fmt: skip
    compact(model, decision, batches(1), "bias")
    assert not any(module.training for module in model.bert.embeddings.modules())
    assert model.training and all(module.training for module in model.bert.encoder.modules())


def test_unknown_methods_and_parts_are_refused(trained: BertForQuestionAnswering) -> None:
    with pytest.raises(ValueError, match="one of gain, leave-one-out, random"):
        importance.score("magic", trained, [], budget_of(trained), ["heads"])
    with pytest.raises(ValueError, match="one or more of heads, ffn, hidden"):
        importance.score("random", trained, [], budget_of(trained), ["toes"])
