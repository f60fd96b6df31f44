"""Every family under every head: packed, gated, compacted, saved and in int8, against stock transformers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import pruned_ops
from counting import RowCounter
from family_models import (
    ANSWERS,
    FAMILIES,
    MODELS,
    PRUNED_TYPES,
    TEXTS,
    TOKENS,
    batch,
    cosine,
    family_named,
    largest_difference,
    outputs,
    pruned,
    stock,
)
from pruned_ops.models.configuration import PRUNED_CONFIGS
from pruned_ops.models.families.known import FAMILIES as KNOWN
from pruned_ops.models.heads import pruned_class
from pruned_trainer import SizeBudget, Target, attached, compact, decide

CLOSE = 2e-5
# transformers 4's models do not hand keywords on to their encoders, so that their heads see padding; nor do
# those of a family with `hands_on` False.
HEADS_ARE_PADDED = int(transformers.__version__.split(".")[0]) < 5
AUTO = {
    "": AutoModel,
    ANSWERS: AutoModelForQuestionAnswering,
    TEXTS: AutoModelForSequenceClassification,
    TOKENS: AutoModelForTokenClassification,
}
HEADS = [(pruned_type, head) for pruned_type in PRUNED_TYPES for head in AUTO]


def test_every_family_has_its_row() -> None:
    assert {each.stem for family in KNOWN for each in family.stock} == FAMILIES.keys()


@pytest.mark.parametrize(("stem", "head"), MODELS)
@pytest.mark.parametrize("kind", ["right", "left", "holes"])
def test_packed_is_stock(stem: str, head: str, kind: str) -> None:
    """The same outputs; the rows that enter a linear of the encoder are the real tokens and no other."""
    model, inputs = stock(stem, head), batch(kind)
    expected = outputs(model, inputs)
    fast = pruned_ops.optimize(model)
    if head == TEXTS and kind == "left":
        with pytest.raises(ValueError, match="reads position 0, where attention_mask says there is padding"):
            fast(**inputs)
        return
    assert largest_difference(outputs(fast, inputs), expected) <= CLOSE
    with torch.no_grad(), RowCounter() as counter:
        fast(**inputs)
    # The model's own head runs on no rows; poolers and heads of texts on one for each text.
    is_padded = HEADS_ARE_PADDED or not family_named(stem).hands_on
    of_texts = ("addmm", "mm") if head in ("", TEXTS) or is_padded else ()
    rows = {number for name, number in counter.rows if number and name not in of_texts}
    assert rows == {int(inputs["attention_mask"].sum())}
    assert largest_difference(outputs(pruned_ops.restore(fast), inputs), expected) == 0


def assert_same_places(found: Any, expected: Any, real: torch.Tensor) -> None:
    """That nested tuples have the same tensors, and None, in the same places; states at real tokens."""
    if isinstance(expected, tuple):
        assert isinstance(found, tuple) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same_places(one, other, real)
    elif expected is None:
        assert found is None
    else:
        assert found.shape == expected.shape
        at = real if expected.shape[: real.dim()] == real.shape else ...
        torch.testing.assert_close(found[at], expected[at], atol=CLOSE, rtol=1e-4)


@pytest.mark.parametrize(("stem", "head"), MODELS)
def test_tuples_have_the_stock_places(stem: str, head: str) -> None:
    """By the argument and by the config, with hidden states, and of encoders without a pooler."""
    inputs = batch("right")
    real, may_lack_pooler = inputs["attention_mask"].bool(), not head and family_named(stem).has_pooler
    calls: list[dict[str, Any]] = [{"return_dict": False}]
    if stem != "ModernBert" or not HEADS_ARE_PADDED:  # transformers 4's gives other last hidden states
        calls.append({"output_hidden_states": True, "return_dict": False})
    if stem != "ModernBert" or not head:  # whose stock heads fail where the config asks for tuples
        calls.append({"output_hidden_states": True} if len(calls) > 1 else {})
    for lacks_pooler in (False, True) if may_lack_pooler else (False,):
        for settings in calls:
            model = stock(stem, head)
            if lacks_pooler:
                model.pooler = None
            model.config.return_dict = "return_dict" in settings
            with torch.no_grad():
                expected = model(**inputs, **settings)
                packed = pruned_ops.optimize(model)(**inputs, **settings)
            assert isinstance(expected, tuple)
            assert_same_places(packed, expected, real)


@pytest.mark.parametrize(("pruned_type", "head"), HEADS)
def test_dense_it_has_the_publishers_parameters(pruned_type: str, head: str) -> None:
    """Our own class takes the stock model's tensors by their names, and computes the same, padded."""
    model, inputs = stock(PRUNED_TYPES[pruned_type], head), batch("holes")
    ours = pruned_class(head, pruned_type)(PRUNED_CONFIGS[pruned_type](**model.config.to_dict())).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if "pooler" not in name or head}
    ours.load_state_dict(state)
    assert largest_difference(outputs(ours, inputs), outputs(model, inputs)) <= CLOSE


@pytest.mark.parametrize(("pruned_type", "head"), HEADS)
def test_gated_decided_compacted_saved(pruned_type: str, head: str, tmp_path: Path) -> None:
    model, inputs = stock(PRUNED_TYPES[pruned_type], head), batch("left" if head != TEXTS else "holes")
    with attached(model) as gates:
        generator = torch.Generator().manual_seed(0)
        for log_alpha in gates.locations():
            log_alpha.data = torch.randn(log_alpha.shape, generator=generator) * 3
        decision = decide(gates.scores(), SizeBudget(gates.shape, "params"), Target(params=0.5), 1)
        gates.fix(decision.values(gates.shape))
        gated = outputs(model, inputs)
    narrow = compact(model, decision)
    assert narrow.config.model_type == pruned_type
    assert narrow.config.shape.parameters() <= 0.5 * gates.shape.parameters()
    assert largest_difference(outputs(narrow, inputs), gated) <= 10 * CLOSE
    narrow.save_pretrained(tmp_path)
    again = AUTO[head].from_pretrained(tmp_path)
    assert type(again) is type(narrow)
    assert largest_difference(outputs(again, inputs), outputs(narrow, inputs)) == 0
    assert largest_difference(outputs(pruned_ops.optimize(again), inputs), outputs(narrow, inputs)) <= CLOSE


@pytest.mark.parametrize("pruned_type", [kind for kind in PRUNED_TYPES if kind != "pruned_modernbert"])
def test_gated_hidden_dimensions_are_compacted(pruned_type: str) -> None:
    model, inputs = stock(PRUNED_TYPES[pruned_type], TEXTS), batch("holes")
    with attached(model, parts=["hidden"]) as gates:
        gates.locations()[0].data = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 3
        decision = decide(gates.scores(), SizeBudget(gates.shape, "params"), Target(params=0.6), 1)
        gates.fix(decision.values(gates.shape))
        gated = outputs(model, inputs)
    narrow = compact(model, decision)
    assert narrow.config.hidden_size < 64
    assert largest_difference(outputs(narrow, inputs), gated) <= 10 * CLOSE


@pytest.mark.parametrize(("pruned_type", "head"), HEADS)
@pytest.mark.parametrize("kind", ["right", "left", "holes"])
def test_layers_of_all_odd_shapes(pruned_type: str, head: str, kind: str) -> None:
    """Layers without heads, without an FFN, and of odd widths, packed and padded."""
    model, inputs = pruned(pruned_type, head), batch(kind)
    expected = outputs(model, inputs)
    assert largest_difference(outputs(pruned_ops.optimize(model), inputs), expected) <= CLOSE


@pytest.mark.parametrize(("stem", "head"), MODELS)
def test_int8(stem: str, head: str) -> None:
    """Compared are the states that a head reads: it runs in fp32, and its few outputs say little."""
    model, inputs = stock(stem, head), batch("right")
    expected = outputs(model.base_model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a processor on which it is not faster
        fast = pruned_ops.optimize(model, dtype="int8")
    assert len(fast.base_model.packed.encoder.int8_linears) == 8
    assert 0.9995 <= cosine(outputs(fast.base_model, inputs), expected) < 1.0
