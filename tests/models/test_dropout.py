"""In training, a pruned model drops what its stock model drops, as much of it, and at the same places.

Dropout that is planted here multiplies by the share that real dropout keeps, so that outputs tell where there
is how much of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import pruned_ops
from family_models import ANSWERS, FAMILIES, TEXTS, TOKENS, batch, family_named, fields, largest_difference
from family_models import stock as stock_model
from pruned_ops.models.heads import pruned_class
from pruned_trainer.training.phase import prepare_student

CLOSE = 2e-5
SHARES = (0.11, 0.23, 0.07, 0.31, 0.17, 0.29)


@contextmanager
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every dropout multiplies by what it would keep, and that of attention multiplies the context, which is
    linear in the probabilities."""
    attention = F.scaled_dot_product_attention

    def dropped(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * (1 - p) if training else x

    def attended(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        **more: Any,
    ) -> Tensor:
        return attention(query, key, value, attn_mask, 0.0, **more) * (1 - dropout_p)

    with monkeypatch.context() as patched:
        patched.setattr(F, "dropout", dropped)
        patched.setattr(F, "scaled_dot_product_attention", attended)
        yield


def stock(stem: str, head: str, **more: Any) -> Any:
    """A stock model with another share in each field for dropout that its publisher's config has."""
    config = getattr(transformers, f"{stem}Config")(**fields(stem))
    named = [name for name in config.to_dict() if "dropout" in name and name != "summary_last_dropout"]
    if stem == "DebertaV2":
        named.append("cls_dropout")  # its model reads this one, and its config has no default for it
    assert 2 <= len(named) <= len(SHARES)
    return stock_model(stem, head, **dict(zip(named, SHARES, strict=False)), **more)


def as_pruned(model: Any, stem: str, head: str) -> Any:
    """The pruned model that holds the same weights and no fewer."""
    kind = pruned_class(head, family_named(stem).pruned_type)
    narrow = kind(kind.config_class(**model.config.to_dict()))
    keys = narrow.load_state_dict(model.state_dict(), strict=False)
    assert not keys.missing_keys
    return narrow


def run(model: Any, inputs: dict[str, Tensor], training: bool = True) -> dict[str, Tensor]:
    """The outputs of a model at real tokens."""
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        output = model.train(training)(**inputs)
    found = {name: value for name, value in output.items() if isinstance(value, Tensor)}
    found.pop("pooler_output", None)
    return {name: one[real] if one.shape[:2] == real.shape else one for name, one in found.items()}


@pytest.mark.parametrize("head", ["", ANSWERS, TEXTS, TOKENS])
@pytest.mark.parametrize("stem", FAMILIES)
def test_pruned_models_drop_what_stock_models_drop(
    stem: str, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = stock(stem, head), batch("right")
    narrow = as_pruned(model, stem, head)
    with planted(monkeypatch):
        expected = run(model, inputs)
        assert largest_difference(run(narrow, inputs), expected) <= CLOSE
    assert largest_difference(run(model, inputs, training=False), expected) > 1e-3  # it does show


@pytest.mark.parametrize("stem", FAMILIES)
def test_a_student_has_the_dropout_that_was_asked_for(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's, too: without dropout training is evaluation, and with it stock and pruned agree."""
    model, inputs = stock(stem, ANSWERS), batch("right")
    students = model, as_pruned(model, stem, ANSWERS)
    with planted(monkeypatch):
        for student in students:
            prepare_student(student, 0.0, True)
            assert largest_difference(run(student, inputs), run(student, inputs, training=False)) <= CLOSE
            prepare_student(student, 0.2, True)
        found, expected = (run(student, inputs) for student in students)
        assert largest_difference(found, expected) <= CLOSE
    assert largest_difference(run(model, inputs, training=False), expected) > 1e-3


@pytest.mark.parametrize("head", [ANSWERS, TEXTS])
@pytest.mark.parametrize("stem", [stem for stem in FAMILIES if stem not in ("DebertaV2", "ModernBert")])
def test_what_is_imported_keeps_its_dropout(
    stem: str, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = stock(stem, head), batch("right")
    model.save_pretrained(tmp_path)
    narrow = pruned_ops.import_checkpoint(tmp_path)
    with planted(monkeypatch):
        assert largest_difference(run(narrow, inputs), run(model, inputs)) <= CLOSE


@pytest.mark.parametrize("stem", ["DebertaV2", "Electra", "Roberta", "ModernBert"])
def test_a_head_whose_dropout_trains_is_the_models_own(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an optimised model, stock and pruned: each dropout of the head alone."""
    model, inputs = stock(stem, TEXTS), batch("right")
    for plain in (model.eval(), as_pruned(model, stem, TEXTS).eval()):
        encoder = plain.base_model
        inside = set(encoder.modules())
        found = [one for one in plain.modules() if isinstance(one, nn.Dropout) and one not in inside]
        assert found
        for number in range(len(found)):
            with planted(monkeypatch), torch.no_grad():
                whole = plain(**inputs).logits
                found[number].train()
                expected = plain(**inputs).logits
                fast = pruned_ops.optimize(plain.eval())
                found[number].train()
                torch.testing.assert_close(fast(**inputs).logits, expected, atol=CLOSE, rtol=0)
                assert float((whole - expected).abs().max()) > 1e-4
                pruned_ops.restore(fast).eval()
