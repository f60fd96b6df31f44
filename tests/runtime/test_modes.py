"""The modes of an optimised model's modules: evaluation while it is optimised, and their own after it."""

from __future__ import annotations

import copy

import pytest
from torch import nn

import pruned_ops
from counting import CustomHead
from inputs import stock_model


def test_training_that_is_refused_leaves_every_module_in_evaluation_mode() -> None:
    """Also those that torch visits before the encoder: a caller that goes on would run with dropout."""
    model = nn.Sequential(nn.Dropout(0.5), nn.ModuleList([nn.Dropout(0.5), stock_model()]))
    for fast in (pruned_ops.optimize(model), copy.deepcopy(model)):
        for around in (fast, fast[1], fast[1][1]):
            with pytest.raises(RuntimeError, match="inference-only.*restore"):
                around.train()
            assert not any(module.training for module in fast.modules())
        assert fast[0].train().training and fast.eval() is fast and not fast[0].training
        pruned_ops.restore(fast)
        assert not any("train" in vars(module) for module in fast.modules())
        assert all(module.training for module in fast.train().modules())


def test_a_model_around_an_optimised_one_is_optimised_too() -> None:
    """It is in evaluation mode, and has what `optimize` gives to a model."""
    inner = pruned_ops.optimize(stock_model())
    around = CustomHead(inner)
    for _ in range(2):  # twice is once
        assert pruned_ops.optimize(around) is around
        assert not any(module.training for module in around.modules())
        assert hasattr(around, "encode_many") and around.engine is inner.engine
        assert len(inner.bert.packed.heads) < 2 and inner.bert.packed.around == ["BertForQuestionAnswering"]
    pruned_ops.restore(around)
    assert around.training and around.head.training and not inner.training
    for model in (around, inner):
        assert not {"encode_many", "engine", "train"} & set(vars(model))


def test_restore_gives_back_the_mode_of_a_part_that_was_optimised_before() -> None:
    """And none that an earlier `optimize` noted."""
    part = stock_model().train()
    pruned_ops.optimize(part)
    whole = CustomHead(part.bert).eval()
    whole.head.train()
    pruned_ops.restore(pruned_ops.optimize(whole))
    assert all(module.training for module in part.bert.modules())
    assert whole.head.training and not whole.training
    part.eval()
    pruned_ops.restore(pruned_ops.optimize(part))
    assert not any(module.training for module in part.modules())


def test_restore_of_a_whole_gives_back_the_modes_around_a_part() -> None:
    part = stock_model().train()
    pruned_ops.optimize(part)
    whole = nn.ModuleList([part, stock_model(seed=1)]).eval()
    pruned_ops.restore(pruned_ops.optimize(whole))
    assert all(module.training for module in part.modules())
    assert not whole.training and not any(module.training for module in whole[1].modules())
    part.eval()
    pruned_ops.restore(pruned_ops.optimize(part))
    assert not any(module.training for module in part.modules())
