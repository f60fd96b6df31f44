"""The gate phase: the paper's prices, the Lagrangian's arithmetic, rates and their schedule, and when each
target is decided."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerState

from inputs import stock_model
from pruned_ops import LayerShape, ModelShape
from pruned_trainer import (
    Distillation,
    Gates,
    HoldTarget,
    PayPerGate,
    PerGate,
    PruningTrainer,
    SizeBudget,
    attached,
)
from pruned_trainer.jobs.choice import _AtSteps
from pruned_trainer.pruning.budget import ShareOfGates
from pruned_trainer.pruning.gate_phase import Lagrangian
from pruned_trainer.pruning.gates import COUNTED, INITIAL_LOG_ALPHA, Scores, deterministic_gate
from pruned_trainer.pruning.options import PENALTIES
from pruned_trainer.training.phase import training_arguments

SHAPE = ModelShape((LayerShape(4, 96), LayerShape(2, 40)), 64, 16)


@pytest.mark.parametrize(
    ("layers", "heads", "width", "head_price", "unit_price"),
    [(12, 12, 3072, 5e-3, 2e-5), (24, 16, 4096, 1.875e-3, 7.5e-6)],
)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_paper_s_prices(
    layers: int, heads: int, width: int, head_price: float, unit_price: float, penalty: str
) -> None:
    """Lambda times the expected number of gates, for BERT-base and BERT-large."""
    gates = Gates(ModelShape((LayerShape(heads, width),) * layers, 1024, 64))
    multiples = {"heads": 2.0, "ffn": 3.0}
    with torch.no_grad():
        for i, log_alpha in enumerate(gates.locations()):
            log_alpha.copy_(torch.randn(log_alpha.shape, generator=torch.Generator().manual_seed(i)))
    term, facts = PayPerGate(gates, multiples, penalty=penalty).loss(0.3)
    counts = gates.per_gate(lambda log_alpha: COUNTED[penalty](log_alpha).detach(), 1.0)
    numbers = [float(torch.cat(counts.of(p)).sum()) for p in ("heads", "ffn")]
    expected = 2 * head_price * numbers[0] + 3 * unit_price * numbers[1]
    assert float(term.detach()) == pytest.approx(expected, rel=2e-3)
    assert facts["open_heads"] == pytest.approx(numbers[0] / layers / heads, rel=1e-5)


def test_the_price_has_a_gradient_where_training_starts() -> None:
    """At the start a gate of the default penalty has a tenth of the largest gradient at least; and the model
    is the stock one."""
    start = torch.tensor(INITIAL_LOG_ALPHA, requires_grad=True)
    phase = PayPerGate(Gates(SHAPE), {"heads": 1.0, "ffn": 1.0})
    COUNTED[phase.penalty](start).backward()
    assert float(start.grad) > 0.1 and float(deterministic_gate(start.detach())) == 1.0


def test_parts_without_any_gate_cost_nothing() -> None:
    gates = Gates(ModelShape((LayerShape(0, 8),), 64, 16))
    term, facts = PayPerGate(gates, {"heads": 1.0, "ffn": 0.0}).loss(0.0)
    assert float(term.detach()) == 0 and facts["open_heads"] == 0
    assert float(ShareOfGates(["heads"]).expected(gates.probabilities())) == 0


def test_the_lagrangian_s_arithmetic() -> None:
    """The multiplier sums up the gaps and nothing makes it decay; the term's slope is the price."""
    lagrangian, gaps = Lagrangian(), [0.3, 0.1, -0.05]
    for gap in gaps:
        lagrangian.follow(torch.tensor(gap), 20.0)
    assert float(lagrangian.multiplier) == pytest.approx(20 * sum(gaps))
    assert not list(lagrangian.parameters()) and "multiplier" in lagrangian.state_dict()
    gap = torch.tensor(0.02, requires_grad=True)
    lagrangian(gap).backward()
    assert float(gap.grad) == pytest.approx(20 * sum(gaps) + 1000 * 0.02)


def test_a_held_budget_is_what_was_asked_for() -> None:
    """The wanted cost ramps from what the gates cost at first; the multiplier follows in every step."""
    gates = Gates(SHAPE)
    budget = SizeBudget(SHAPE, "params")
    phase = HoldTarget(gates, budget, [0.5])
    at_start = float(budget.expected(gates.probabilities("one")).detach())
    assert phase.target_at(0.0) == phase.start == pytest.approx(at_start)
    assert phase.target_at(0.3) == pytest.approx((at_start + 0.5) / 2) and phase.target_at(0.6) == 0.5
    term, facts = phase.loss(0.6)
    gap = at_start - 0.5
    assert facts == {
        "expected": pytest.approx(at_start),
        "wanted": 0.5,
        "multiplier": pytest.approx(20 * gap),
    }
    assert float(term.detach()) == pytest.approx(20 * gap * gap + 500 * gap**2, rel=1e-4)


@pytest.mark.parametrize(
    ("steps", "stages", "pace", "warned"),
    [(1000, 1, 1.0, False), (300, 1, 1.0, False), (200, 1, 1.5, False), (100, 1, 3.0, False),
     (99, 1, 3.0, True), (4, 1, 3.0, True), (600, 2, 1.0, False), (300, 2, 2.0, False), (150, 2, 3.0, True)],
)  # fmt: skip
def test_short_trainings_move_faster_and_say_so(steps: int, stages: int, pace: float, warned: bool) -> None:
    fractions = [0.8, 0.4][-stages:]
    phase = HoldTarget(Gates(SHAPE), SizeBudget(SHAPE, "params"), fractions, gate_learning_rate=0.2)
    group = phase.group(steps)
    assert phase.pace(steps) == pytest.approx(pace) and group["lr"] == pytest.approx(0.2 * pace)
    assert group["weight_decay"] == 0 and len(group["params"]) == 4
    remarks = phase.remarks(steps)
    assert any("their rate is" in remark and f"{0.2 * pace:.3g}" in remark for remark in remarks) == (
        pace > 1
    )
    assert any(remark.startswith("warning") for remark in remarks) == warned


@pytest.mark.parametrize(("steps", "ends"), [(100, [34, 67, 100]), (30, [10, 20, 30]), (2, [1, 2, 2])])
def test_a_target_is_held_until_its_stage_ends(steps: int, ends: list[int]) -> None:
    """The last step before an end still goes towards the target of that stage, and the next one does not."""
    phase = HoldTarget(Gates(SHAPE), SizeBudget(SHAPE, "params"), [0.6, 0.4, 0.2])
    assert phase.stage_ends(steps) == ends
    held = [phase.start, *phase.fractions]
    for (begin, end), (before, target) in zip(pairwise([0, *ends]), pairwise(held), strict=True):
        assert all(target - 1e-9 <= phase.target_at(step / steps) <= before for step in range(begin, end))


@pytest.mark.parametrize(("steps", "edges"), [(80, [0, 80]), (80, [0, 40, 80]), (242, [0, 81, 162, 242])])
def test_the_gates_schedule_restarts_for_each_target(steps: int, edges: list[int], tmp_path: Path) -> None:
    """Warm-up and decay for each target, from the step at which the target moves; the weights' are those of
    the whole training."""
    model, stages = stock_model(), len(edges) - 1
    with attached(model) as gates:
        phase = HoldTarget(gates, SizeBudget(gates.shape, "params"), [0.8, 0.6, 0.4][-stages:])
        trainer = PruningTrainer(
            model, training_arguments(tmp_path, steps, 1, 1e-4, 0), Distillation.none(), gate_phase=phase
        )
        optimizer = trainer.create_optimizer()
        schedule = trainer.create_scheduler(steps, optimizer)
        of_gates = next(i for i, g in enumerate(optimizer.param_groups) if g["params"][0] is gates.heads[0])
        assert optimizer.param_groups[of_gates]["weight_decay"] == 0
        rates: list[list[float]] = []
        for _ in range(steps):
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            schedule.step()
    assert phase.stage_ends(steps) == edges[1:]
    highest = 0.1 * phase.pace(steps)
    for begin, end in pairwise(edges):
        own, half = [rate[of_gates] for rate in rates[begin:end]], (end - begin + 1) // 2
        assert own[0] == 0 and own[(end - begin) // 20] == pytest.approx(highest) == max(own)
        assert own[-1] < 0.05 * highest and own[half] == pytest.approx(highest / 2, rel=0.06)
        if begin:
            before = phase.target_at((begin - 1) / steps)
            assert before == pytest.approx(phase.fractions[edges.index(begin) - 1])
            assert phase.target_at((begin + 1) / steps) < before - 1e-3
    weights = [rate[0] for rate in rates]
    assert max(weights) == weights[steps // 20] == pytest.approx(1e-4)
    assert weights[steps // 2] == pytest.approx(0.5e-4, rel=0.06)


def test_even_shares_cost_what_the_target_allows() -> None:
    for unit, hidden in (("params", False), ("macs", True)):
        budget = SizeBudget(SHAPE, unit, [9, 30])
        parts = ["heads", "ffn", "hidden"] if hidden else ["heads", "ffn"]
        share = budget.even_share(parts, 0.4)
        counts = PerGate.full(SHAPE, share)
        if not hidden:
            counts.hidden = torch.ones(64)
        assert float(budget.expected(counts)) == pytest.approx(0.4, abs=1e-5)
        assert budget.even_share(["heads"], 1.0) == pytest.approx(1.0)
    assert budget.even_share(["ffn"], 0.9) < 0.9 < 1


def test_places_compare_parts_by_the_share_below() -> None:
    rank = PerGate(
        [torch.tensor([5.0, 1.0]), torch.tensor([9.0, 1.0])], [torch.tensor([-3.0])], torch.ones(4)
    )
    places = rank.places()
    assert [h.tolist() for h in places.heads] == [[0.5, 0.0], [0.75, 0.25]]
    assert places.ffn[0].tolist() == [0.0] and places.hidden.tolist() == [0.0, 0.25, 0.5, 0.75]


def test_scores_are_read_as_they_were_saved(tmp_path: Path) -> None:
    gates = Gates(SHAPE)
    scores: Any = gates.scores()
    scores.save(tmp_path / "scores.pt")
    read = Scores.load(tmp_path / "scores.pt")
    for kind in ("rank", "values"):
        for part in ("heads", "ffn", "hidden"):
            for one, other in zip(getattr(read, kind).of(part), getattr(scores, kind).of(part), strict=True):
                assert torch.equal(one, other)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.pt"]


def test_the_multiplier_follows_once_for_all_minibatches_of_a_step() -> None:
    """However many a step has, the price is that of a step of one."""
    multipliers = []
    for minibatches in (1, 4):
        phase = HoldTarget(Gates(SHAPE), SizeBudget(SHAPE, "params"), [0.5])
        for step in range(3):
            facts = [phase.loss(step / 3)[1] for _ in range(minibatches)]
        multipliers.append(facts[-1]["multiplier"])
    assert multipliers[0] > 0 and multipliers[1] == pytest.approx(multipliers[0])


def test_every_target_is_decided_where_there_are_fewer_steps_than_targets() -> None:
    """Several at once then; the last at the end of training."""
    decided: list[tuple[int, int]] = []
    state = TrainerState()
    callback = _AtSteps([1, 1, 2, 2], lambda number: decided.append((state.global_step, number)))
    for state.global_step in (1, 2):
        callback.on_step_end(None, state, None)
    callback.on_train_end(None, state, None)
    assert decided == [(1, 0), (1, 1), (2, 2), (2, 3)]
