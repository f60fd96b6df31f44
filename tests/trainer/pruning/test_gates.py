"""Gates, attaching, deciding, compacting: invariants 1 (open gates = the stock model) and 2 (hard-gated =
compacted)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pruned_ops
from inputs import ODD_SHAPES, logits, padded_batch, pruned_model, stock_model
from pruned_ops import LayerShape, ModelShape
from pruned_trainer import (
    Decision,
    Gates,
    PerGate,
    Scores,
    SizeBudget,
    Target,
    attach,
    attached,
    compact,
    decide,
    detach,
)
from pruned_trainer.pruning.decision import Kept, LayerDecision, round_up
from pruned_trainer.pruning.gates import COUNTED, deterministic_gate, open_probability, sampled_gate


def scatter(gates: Gates, seed: int = 0) -> None:
    """Random locations: open, closed and between."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for log_alpha in gates.locations():
            log_alpha.copy_(4 * torch.randn(log_alpha.shape, generator=generator))


def test_open_gates_are_the_stock_model(model: Any) -> None:
    """Bit for bit, whether fixed open or as they are at the start; and undone without a trace."""
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    expected, names = logits(model, batch), [name for name, _ in model.named_parameters()]
    with attached(model) as gates:
        assert torch.equal(logits(model, batch), expected)
        gates.fix_open()
        gates.train()  # fixed is fixed, in training too
        assert torch.equal(logits(model, batch), expected)
        with pytest.raises(ValueError, match="attached.*already"):
            attach(model)
    assert torch.equal(logits(model, batch), expected)
    assert [name for name, _ in model.named_parameters()] == names
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_closed_gate_removes_its_part(model: Any) -> None:
    """Closing head h of layer 0 equals zeroing its columns of the output projection; the same for an FFN
    unit."""
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    head_dim = 16
    parts = dict(model.base_model.encoder.layer[0].named_modules())
    with attached(model) as gates:
        gates.fix_open()
        gates.fixed.heads[0][1] = 0.0
        gates.fixed.ffn[0][3] = 0.5
        gated = logits(model, batch)
    with torch.no_grad():
        parts["attention.output.dense"].weight[:, head_dim : 2 * head_dim] = 0
        parts["output.dense"].weight[:, 3] *= 0.5
    torch.testing.assert_close(gated, logits(model, batch), atol=1e-5, rtol=1e-5)


def test_training_gates_are_samples_seeded_by_draw() -> None:
    model = stock_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batch = padded_batch()
    outputs = []
    for _ in range(2):
        with attached(model.train(), seed=3) as gates:
            first, second = logits(model, batch), logits(model, batch)
            assert not torch.equal(first, second) and int(gates.draws) == 2
            outputs.append((first, second))
    assert torch.equal(outputs[0][0], outputs[1][0]) and torch.equal(outputs[0][1], outputs[1][1])


def test_hard_concrete_is_as_published() -> None:
    """P(gate > 0) against a million samples, and the closed form of the open probability."""
    log_alpha = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0, 4.0])
    uniform = torch.rand(200_000, 1, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    samples = sampled_gate(log_alpha, uniform)
    assert samples.min() == 0 and samples.max() == 1
    share = (samples > 0).float().mean(0)
    torch.testing.assert_close(share, open_probability(log_alpha), atol=5e-3, rtol=0)
    expected = 1 / (1 + math.exp(-(0.5 - 2 / 3 * math.log(0.1 / 1.1))))
    assert float(open_probability(torch.tensor(0.5))) == pytest.approx(expected, abs=1e-6)
    assert deterministic_gate(torch.tensor([-9.0, 9.0])).tolist() == [0.0, 1.0]


def random_decision(gates: Gates, align: int = 8, fraction: float = 0.5) -> tuple[Decision, SizeBudget]:
    scatter(gates)
    budget = SizeBudget(gates.shape, "macs", [20, 3, 11])
    return decide(gates.scores(), budget, Target(macs=fraction), align), budget


def test_a_path_may_be_a_text(tmp_path: Path) -> None:
    """As the page on pruning from Python writes it."""
    decision = Decision((LayerDecision(Kept((0,), (1.0,)), Kept((), ())),), 1, {}, {})
    decision.save(f"{tmp_path}/decision.json")
    assert Decision.load(f"{tmp_path}/decision.json") == decision
    shape = ModelShape((LayerShape(1, 2),), 4, 4)
    scores = Scores(PerGate.full(shape, 0.5), PerGate.full(shape, 1.0))
    scores.save(f"{tmp_path}/scores.pt")
    assert torch.equal(Scores.load(f"{tmp_path}/scores.pt").rank.hidden, scores.rank.hidden)


@pytest.mark.parametrize("align", [1, 8])
def test_hard_gated_is_compacted(model: Any, align: int, tmp_path: Path) -> None:
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with attached(model) as gates:
        decision, _ = random_decision(gates, align)
        decision.save(tmp_path / "decision.json")
        gates.fix(Decision.load(tmp_path / "decision.json").values(gates.shape))
        expected = logits(model, batch)
        narrow = compact(model, decision)
    assert (
        0 < min(v for layer in decision.layers for v in layer.ffn.values + (1.0,) if v) < 1
    )  # values to fold
    assert narrow.config.shape.layers == tuple(d.shape for d in decision.layers)
    assert narrow.config.shape.parameters() < SizeBudget(gates.shape, "params").total
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits(narrow, batch)[real], expected[real], atol=2e-5, rtol=1e-4)
    fast = logits(pruned_ops.optimize(narrow), batch)
    torch.testing.assert_close(fast[real], expected[real], atol=3e-5, rtol=1e-4)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_whole_layers_can_go(model: Any) -> None:
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    with attached(model) as gates:
        nothing = LayerDecision(Kept((), ()), Kept((), ()))
        everything = Decision((nothing,) * len(gates.shape.layers), 8, {}, {})
        gates.fix(everything.values(gates.shape))
        expected = logits(model, batch)
        narrow = compact(model, everything)
    real = batch["attention_mask"].bool()
    assert set(narrow.config.shape.layers) == {LayerShape(0, 0)}
    torch.testing.assert_close(logits(narrow, batch)[real], expected[real], atol=2e-5, rtol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    st.floats(0.02, 0.98),
    st.sampled_from([1, 4, 8, 16]),
    st.integers(0, 99),
    st.sampled_from(["params", "macs"]),
)
def test_decisions_meet_their_target(fraction: float, align: int, seed: int, unit: str) -> None:
    """Within the target, aligned, the best gates of each layer, and nothing more of any size would still
    fit."""
    gates = Gates(ModelShape((LayerShape(4, 96), LayerShape(3, 50), LayerShape(0, 8)), 64, 16))
    scatter(gates, seed)
    budget = SizeBudget(gates.shape, unit, [9, 30])
    target, parts = Target(**{unit: fraction}), ["heads", "ffn"]
    least = budget.fraction(ModelShape((LayerShape(0, 0),) * 3, 64, 16))
    if fraction < least:
        with pytest.raises(ValueError, match="not even the smallest"):
            decide(gates.scores(), budget, target, align)
        with pytest.raises(ValueError, match=f"{unit} {least:.4g} is the limit"):
            budget.check_reachable(target, parts)
        return
    decision = decide(gates.scores(), budget, target, align)
    shapes = [d.shape for d in decision.layers]
    reached = budget.fraction(decision.shape(gates.shape))
    assert reached <= fraction and decision.reached[unit] == reached
    for i, layer in enumerate(decision.layers):
        width = gates.shape.layers[i].ffn_width
        assert layer.shape.ffn_width % align == 0 or layer.shape.ffn_width == width
        closed = [v for j, v in enumerate(gates.ffn[i].tolist()) if j not in layer.ffn.indices]
        kept = gates.ffn[i][list(layer.ffn.indices)].tolist()
        assert not kept or not closed or min(kept) >= max(closed)
    bigger = [
        LayerShape(s.num_heads, round_up(s.ffn_width + 1, align, d.ffn_width))
        for s, d in zip(shapes, gates.shape.layers, strict=True)
    ]
    fuller = [LayerShape(min(s.num_heads + 1, d.num_heads), b.ffn_width)
              for s, b, d in zip(shapes, bigger, gates.shape.layers, strict=True)]  # fmt: skip
    assert budget.fraction(ModelShape(tuple(fuller), 64, 16)) > fraction


def test_a_size_budget_is_the_shape_s_own_count() -> None:
    """Gates that are open or closed for certain cost what the shape that they leave counts."""
    shape = ModelShape((LayerShape(4, 96), LayerShape(2, 40)), 64, 16, windows=(None, 2))
    counts = PerGate(
        [torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0])],
        [torch.ones(96) * 0.5, torch.zeros(40)],
        torch.ones(64),
    )
    left = (LayerShape(2, 48), LayerShape(1, 0))
    for unit in ("params", "macs"):
        budget = SizeBudget(shape, unit, [5, 9])
        assert budget.fraction(shape) == 1
        for hidden in (64, 40, 1):
            counts.hidden = (torch.arange(64) < hidden).float()
            expected = budget.fraction(replace(shape, layers=left, hidden_size=hidden))
            assert float(budget.expected(counts)) == pytest.approx(expected, rel=1e-5)


def test_targets_beyond_reach_say_what_is_within() -> None:
    budget = SizeBudget(ModelShape((LayerShape(4, 96),), 64, 16), "params")
    with pytest.raises(ValueError, match="cannot be met: with every gate on heads, ffn closed.*is the limit"):
        budget.check_reachable(Target(params=0.001), ["heads", "ffn"])
    with pytest.raises(ValueError, match="every gate on heads closed"):
        budget.check_reachable(Target(params=0.3), ["heads"])
    bad: list[dict[str, float]] = [{}, {"params": 0.5, "macs": 0.5}, {"macs": 0.0}, {"macs": 1.5}]
    for one in (*bad, {"speedup": 1.0}, {"latency_ms": 0.0}, {"speedup": float("nan")}):
        with pytest.raises(ValueError):
            Target(**one)


def decision_text(indices: str, values: str = "[1.0]", align: str = "8", target: str = "{}") -> str:
    """A decision file's text for one layer, with these texts in the places of what it holds of the heads."""
    layer = (
        f'{{"heads": {{"indices": {indices}, "values": {values}}}, "ffn": {{"indices": [], "values": []}}}}'
    )
    return f'{{"format": 1, "layers": [{layer}], "align": {align}, "target": {target}, "reached": {{}}}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ('{"format": 9}', "format is 9"),
        ('{"format": 1, "layers": [{}], "align": 8}', "layer 0, heads"),
        (
            '{"format": 1, "layers": [{"heads": {"indices": [2, 1], "values": [1, 1]}, "ffn": {}}]}',
            "layer 0, heads: kept indices must rise",
        ),
        (
            '{"format": 1, "align": 8, "layers": [{"heads": {"indices": [1], "values": [2]}, "ffn": {}}]}',
            "gate values must lie in",
        ),
        ("[]", "an object is needed, not list"),
        ('{"format": 1, "layers": "two"}', "layers is 'two'"),
        (decision_text("[1.7]"), "layer 0, heads: index 0 is 1.7: an integer is needed"),
        (decision_text("[true]"), "layer 0, heads: index 0 is True: an integer is needed"),
        (decision_text('["1"]'), "layer 0, heads: index 0 is '1'"),
        (decision_text("[1e999]"), r"'1e999' is no finite number: line 1 column 49"),
        (decision_text("[1048576]"), "index 0 is 1048576: it must lie between"),
        (decision_text("[1]", "[NaN]"), "'NaN' is no finite number"),
        (decision_text("[1]", "[true]"), "value 0 is True: a number is needed"),
        (decision_text("[1]", align="8.5"), "align is 8.5: an integer is needed"),
        (decision_text("[1]", align="0"), "align is 0"),
        (decision_text("[1]", target='{"macs": "half"}'), "target, macs is 'half': a number is needed"),
        (decision_text("[1]", target="[]"), "target is .*: an object of numbers is needed"),
    ],
)
def test_bad_decision_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "decision.json").write_text(text)
    with pytest.raises(ValueError, match=rf"decision\.json is no decision file: .*{message}") as refusal:
        Decision.load(tmp_path / "decision.json")
    assert "\n" not in str(refusal.value)


def test_a_decision_for_another_model_is_refused() -> None:
    with attached(stock_model()) as gates:
        decision, _ = random_decision(gates)
    with pytest.raises(ValueError, match="is for 3 layers, the model has 5"):
        compact(pruned_model(), decision)
    with pytest.raises(ValueError, match="the model has 2"):
        compact(pruned_model(shapes=[LayerShape(2, 16)] * 3), decision)
    assert len(ODD_SHAPES) == 5


def test_detach_without_attach_is_harmless() -> None:
    detach(stock_model())


ALL = ["heads", "ffn", "hidden"]


def test_open_hidden_gates_are_the_stock_model(model: Any) -> None:
    """Within fp32 rounding, because the gated LayerNorm is computed anew; undone without a trace."""
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    expected = logits(model, batch)
    with attached(model, parts=ALL) as gates:
        gates.fix_open()
        torch.testing.assert_close(logits(model, batch), expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(logits(model, batch), expected)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("align", [1, 8])
def test_hard_gated_hidden_is_compacted(model: Any, align: int, tmp_path: Path) -> None:
    """Embeddings, LayerNorms, q/k/v, outputs and the answer head lose the same dimensions."""
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    with attached(model, parts=ALL) as gates:
        decision, _ = random_decision(gates, align)
        decision.save(tmp_path / "decision.json")
        decision = Decision.load(tmp_path / "decision.json")
        gates.fix(decision.values(gates.shape))
        expected = logits(model, batch)
        dense = gates.shape
        narrow = compact(model, decision)
    assert decision.hidden is not None and 0 < len(decision.hidden.indices) < dense.hidden_size
    assert len(decision.hidden.indices) % align == 0 and 0 < min(decision.hidden.values) < 1
    assert narrow.config.hidden_size == len(decision.hidden.indices) == decision.shape(dense).hidden_size
    assert narrow.config.shape == decision.shape(dense)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits(narrow, batch)[real], expected[real], atol=1e-4, rtol=1e-3)
    fast = logits(pruned_ops.optimize(narrow), batch)
    torch.testing.assert_close(fast[real], expected[real], atol=1e-4, rtol=1e-3)


def test_parts_without_gates_stay_open() -> None:
    model = stock_model()
    batch = padded_batch()
    with attached(model, parts=["ffn"]) as gates:
        gates.train()
        scores = gates.scores()
        assert all(bool((h == math.inf).all()) for h in scores.rank.heads)
        assert gates.probabilities().hidden.tolist() == [1.0] * 64
        with pytest.raises(ValueError, match="no gates on heads"):
            gates.fix(PerGate.full(gates.shape, 0.0))
        assert {name.split(".")[0] for name, _ in gates.named_parameters()} == {"ffn"}
        logits(model, batch)
        assert all(bool((h == 1).all()) for h in gates.values.heads)
    with pytest.raises(ValueError, match="one or more of heads, ffn, hidden"):
        attach(model, parts=["layers"])


def test_the_two_penalties_count_what_they_say() -> None:
    log_alpha = torch.tensor([-2.0, 0.0, 1.0, 3.0])
    uniform = torch.rand(200_000, 1, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    samples = sampled_gate(log_alpha, uniform)
    torch.testing.assert_close((samples > 0).float().mean(0), COUNTED["open"](log_alpha), atol=5e-3, rtol=0)
    torch.testing.assert_close((samples == 1).float().mean(0), COUNTED["one"](log_alpha), atol=5e-3, rtol=0)
