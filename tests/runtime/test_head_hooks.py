"""The hooks around a model's forward, where that is another one than its known class has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import BertForQuestionAnswering

import pruned_ops
from head_models import MODELS, fields
from inputs import padded_batch, stock_model


class Both(NamedTuple):
    start: Tensor
    end: Tensor


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "a tensor": lambda logits: logits,
    "a dictionary": lambda logits: {"scores": logits},
    "a dictionary of logits": lambda logits: {"start_logits": logits[..., 0], "end_logits": logits[..., 1]},
    "a tuple": lambda logits: (logits.mean(), logits),
    "a named tuple": lambda logits: Both(logits[..., 0], logits[..., 1]),
    "places": lambda logits: {"start_logits": logits[..., 0].long(), "end_logits": logits[..., 1].argmax(-1)},
}


class Another(BertForQuestionAnswering):
    """A subclass whose forward puts out what it likes."""

    made: Callable[[Tensor], Any]

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **others: Any) -> Any:
        states = self.bert(input_ids, attention_mask=attention_mask, **others).last_hidden_state
        logits = self.qa_outputs(states)
        if attention_mask is not None:
            logits = (
                logits * attention_mask[..., None]
            )  # what an optimised encoder puts at padding is its own
        return type(self).made(logits)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_subclass_may_put_out_anything(kind: str) -> None:
    model, batch = stock_model(), padded_batch()
    model.__class__ = type("Mine", (Another,), {"made": staticmethod(OUTPUTS[kind])})
    with torch.no_grad():
        expected = model(**batch)
        output = pruned_ops.optimize(model)(**batch)
    assert type(output) is type(expected)
    padding = batch["attention_mask"] == 0
    if kind == "a dictionary of logits":
        for logits in output.values():
            assert bool((logits[padding] == torch.finfo(logits.dtype).min).all())
            logits.masked_fill_(padding, 0)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["question-answering", "stock-bert-sequence", "pruned-roberta-token"])
def test_hooks_that_a_model_had_see_and_change_its_logits(kind: str) -> None:
    """Those of the model itself, registered before `optimize` as after it."""
    model, batch = MODELS[kind](), padded_batch((9, 4), MODELS[kind]().config.pad_token_id)
    seen: list[dict[str, torch.Size]] = []

    def double(_: Any, __: Any, output: Any) -> Any:
        seen.append({name: value.shape for name, value in fields(output).items()})
        for name, value in fields(output).items():
            output[name] = 2 * value
        return output

    expected = fields(pruned_ops.optimize(MODELS[kind]())(**batch))
    model.register_forward_hook(double)
    pruned_ops.optimize(model)
    model.register_forward_hook(double)
    output = fields(model(**batch))
    assert seen == [{name: value.shape for name, value in expected.items()}] * 2
    assert all(torch.equal(output[name], 4 * expected[name]) for name in expected)
