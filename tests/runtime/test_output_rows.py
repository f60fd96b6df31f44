"""What of a model's outputs belongs to tokens, and what to texts, where the two numbers are equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import family_models
from head_models import natural_questions
from int8_anywhere import int8_anywhere
from pruned_ops import optimize
from pruned_ops.checkpoints.quantizing import _by_text
from pruned_ops.runtime.int8_choice import outputs_of


def batch(tokens: int, texts: int = 3) -> dict[str, Any]:
    """Inputs of which each text but the first has one token less."""
    mask = torch.ones(texts, tokens, dtype=torch.long)
    mask[1:, -1] = 0
    ids = torch.randint(5, 100, (texts, tokens), generator=torch.Generator().manual_seed(tokens))
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    ("make", "labels"),
    [
        (lambda: family_models.stock("Bert", family_models.TEXTS), 3),
        (natural_questions, 5),
        (lambda: family_models.stock("Bert", ""), 64),
    ],
    ids=["classes", "answer types", "pooler"],
)
def test_as_many_tokens_as_labels(make: Any, labels: int) -> None:
    """A text's labels stay whole in a batch of texts of so many tokens, and beside other batches."""
    model, batches = make(), [batch(labels), batch(9)]
    found = outputs_of(model, batches)
    assert found[-1].shape == (6, labels)
    by_text = _by_text(model, batches[:1])
    with torch.no_grad():
        whole = list(model(**batches[0]).values())[-1]
    assert all(torch.equal(vector[-labels:], row) for vector, row in zip(by_text, whole, strict=True))


def test_such_a_batch_calibrates() -> None:
    with int8_anywhere():
        model = optimize(natural_questions(), dtype="int8", calibration=[batch(5), batch(9)], tolerance=0.9)
    assert len(model.int8_errors) > 0


class Embedder(torch.nn.Module):
    """Gives one tensor (texts, hidden_size), alone or in a tuple, or by a name of its own."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.encoder, self.form = family_models.stock("Bert", "", hidden_size=32), form

    def forward(self, **inputs: Any) -> Any:
        embedding = self.encoder(**inputs).last_hidden_state[:, 0]
        return {"tensor": embedding, "tuple": (embedding,), "name": {"embedding": embedding}}[self.form]


@pytest.mark.parametrize(
    ("form", "batches"),
    [
        ("tensor", [batch(32, 4), batch(10, 6)]),
        ("tensor", [batch(32, 4), batch(32, 6)]),
        ("tuple", [batch(32, 4), batch(10, 6)]),
        ("name", [batch(10, 6), batch(32, 4)]),
    ],
)
def test_as_many_tokens_as_an_embedding_has_numbers(form: str, batches: list[dict[str, Any]]) -> None:
    model = Embedder(form)
    (found,) = outputs_of(model, batches)
    with torch.no_grad():
        expected = torch.cat([model.encoder(**inputs).last_hidden_state[:, 0] for inputs in batches])
    assert found.shape == (10, 32) and torch.equal(found, expected)
    assert [len(vector) for vector in _by_text(model, batches)] == [32] * 10
    with int8_anywhere():
        fast = optimize(model, dtype="int8", calibration=batches, tolerance=0.9)
    assert len(fast.int8_errors) > 0


def test_outputs_without_names_and_losses() -> None:
    """Scores of tokens in a tuple are theirs, in batches of several lengths or of one; and a loss, which is
    there where labels are, is nobody's."""
    model, named = (family_models.stock("Bert", family_models.ANSWERS) for _ in range(2))
    model.config.return_dict = False
    for batches in ([batch(9), batch(4)], [batch(9)]):
        positions = torch.zeros(3, dtype=torch.long)
        labelled = [{**one, "start_positions": positions, "end_positions": positions} for one in batches]
        for given in (batches, labelled):
            pairs = zip(outputs_of(model, given), outputs_of(named, batches), strict=True)
            assert all(torch.equal(found, expected) for found, expected in pairs)


@pytest.mark.parametrize("head", [family_models.ANSWERS, ""])
def test_without_a_mask_every_token_is_real(head: str) -> None:
    """Batches of several lengths have rows of tokens then, too, as with a mask of ones."""
    model = family_models.stock("Bert", head)
    plain = [{"input_ids": batch(tokens)["input_ids"]} for tokens in (4, 9)]
    masked = [{**one, "attention_mask": torch.ones_like(one["input_ids"])} for one in plain]
    without, expected = outputs_of(model, plain), outputs_of(model, masked)
    assert len(expected[0]) == 3 * 4 + 3 * 9
    for own, right in zip(without, expected, strict=True):
        torch.testing.assert_close(own, right, atol=2e-5, rtol=1e-5)
