"""Gates on hidden dimensions (invariants 1 and 2 for them), on some parts only, and how gates count."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gates import random_decision

import pruned_ops
from inputs import logits, padded_batch, stock_model
from pruned_trainer import Decision, PerGate, attached
from pruned_trainer.pruning import attach, compact
from pruned_trainer.pruning.gates import PENALTIES, sampled_gate

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
    torch.testing.assert_close((samples > 0).float().mean(0), PENALTIES["open"](log_alpha), atol=5e-3, rtol=0)
    torch.testing.assert_close((samples == 1).float().mean(0), PENALTIES["one"](log_alpha), atol=5e-3, rtol=0)
