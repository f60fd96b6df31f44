"""What outputs are recognised as, and how far two models' outputs are apart: 0 for equals, in closed form,
blind to padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig
from transformers.modeling_outputs import SequenceClassifierOutput

from inputs import randn
from pruned_trainer.tasks.output_kinds import (
    OutputKind,
    Outputs,
    check_comparable,
    comparable_outputs,
    divergences,
    drawn_losses,
    label_losses,
    margin_divergence,
)

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
BY_KIND: dict[OutputKind, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {
    OutputKind.SPANS: ({"start_logits": (2, 4), "end_logits": (2, 4)}, {}),
    OutputKind.CLASSES: ({"logits": (2, 3)}, {}),
    OutputKind.LABELS: ({"logits": (2, 3)}, {"problem_type": "multi_label_classification"}),
    OutputKind.SCORES: ({"logits": (2, 1)}, {}),
    OutputKind.TOKENS: ({"logits": (2, 4, 3)}, {}),
    OutputKind.EMBEDDINGS: ({"last_hidden_state": (2, 4, 6)}, {}),
    OutputKind.SPARSE: ({"sentence_embedding": (2, 50)}, {}),
}


def outputs(kind: OutputKind, seed: int) -> Outputs:
    shapes, config = BY_KIND[kind]
    fields = {name: randn(seed, *shape) for name, shape in shapes.items()}
    said = comparable_outputs(SequenceClassifierOutput(**fields) if kind is OutputKind.CLASSES else fields,
                   BertConfig(vocab_size=50, **config), MASK)  # fmt: skip
    assert said.kind is kind
    return said


@pytest.mark.parametrize("kind", OutputKind)
def test_a_divergence_is_zero_for_equals_and_grows_from_there(kind: OutputKind) -> None:
    own, wanted = outputs(kind, 0), outputs(kind, 1)
    assert divergences(own, own, MASK, 2.0).tolist() == pytest.approx([0, 0], abs=1e-6)
    nearer = Outputs(kind, {name: v + 0.1 * (wanted.values[name] - v) for name, v in own.values.items()})
    far, near = divergences(own, wanted, MASK, 2.0), divergences(nearer, wanted, MASK, 2.0)
    assert far.shape == (2,) and bool((far > near).all()) and bool((near > 0).all())
    alone = Outputs(kind, {name: v[1:] for name, v in own.values.items()})
    other = Outputs(kind, {name: v[1:] for name, v in wanted.values.items()})
    torch.testing.assert_close(divergences(alone, other, MASK[1:], 2.0)[0], far[1])


def test_divergences_have_their_closed_forms() -> None:
    own, wanted = (outputs(OutputKind.CLASSES, seed) for seed in (0, 1))
    by_torch = F.kl_div((own.only / 3).log_softmax(-1), (wanted.only / 3).softmax(-1), reduction="none").sum(
        -1
    )
    torch.testing.assert_close(divergences(own, wanted, MASK, 3.0), 9 * by_torch)
    own, wanted = (outputs(OutputKind.LABELS, seed) for seed in (0, 1))
    targets = wanted.only.sigmoid()
    crossed = F.binary_cross_entropy_with_logits(own.only, targets, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(wanted.only, targets, reduction="none")
    torch.testing.assert_close(divergences(own, wanted, MASK), (crossed - entropy).mean(-1))
    own, wanted = (outputs(OutputKind.SCORES, seed) for seed in (0, 1))
    torch.testing.assert_close(divergences(own, wanted, MASK), (own.only - wanted.only)[:, 0] ** 2)
    unit = [
        Outputs(OutputKind.EMBEDDINGS, {"embedding": F.normalize(randn(seed, 2, 6), dim=-1)})
        for seed in (0, 1)
    ]
    away = 1 - (unit[0].only * unit[1].only).sum(-1)  # the squared distance of unit vectors is twice that
    torch.testing.assert_close(divergences(*unit, MASK), 3 * away)


@pytest.mark.parametrize("kind", [OutputKind.SPANS, OutputKind.TOKENS])
def test_divergences_see_no_padding(kind: OutputKind) -> None:
    own, wanted = outputs(kind, 0), outputs(kind, 1)
    before = divergences(own, wanted, MASK, 2.0)
    for value in own.values.values():
        value[1, 2:] = 1e9
    torch.testing.assert_close(divergences(own, wanted, MASK, 2.0), before)


def test_a_bare_encoder_is_pooled_over_its_real_tokens() -> None:
    states = randn(0, 2, 4, 6)
    mean = comparable_outputs({"last_hidden_state": states}, None, MASK).only
    torch.testing.assert_close(mean[1], states[1, :2].mean(0))
    torch.testing.assert_close(
        comparable_outputs({"last_hidden_state": states}, None, MASK, "cls").only, states[:, 0]
    )
    on_the_left = comparable_outputs({"last_hidden_state": states}, None, MASK.flip(1), "cls").only
    torch.testing.assert_close(on_the_left[1], states[1, 2])


def test_margins_count_within_a_query() -> None:
    own, wanted = (Outputs(OutputKind.SCORES, {"logits": randn(seed, 4, 1)}) for seed in (0, 1))
    groups = torch.tensor([7, 7, 8, 9])
    margins = [(s.only[0] - s.only[1])[0] for s in (own, wanted)]
    torch.testing.assert_close(margin_divergence(own, wanted, groups), (margins[0] - margins[1]) ** 2)
    assert float(margin_divergence(own, wanted, torch.arange(4))) == 0
    shifted = Outputs(OutputKind.SCORES, {"logits": wanted.only + 5})
    assert float(margin_divergence(shifted, wanted, groups)) == pytest.approx(0, abs=1e-10)


def test_losses_on_labels_are_those_of_transformers() -> None:
    for kind, labels in (
        (OutputKind.CLASSES, torch.tensor([2, 0])),
        (OutputKind.SCORES, torch.tensor([0.5, -1.0])),
        (OutputKind.LABELS, torch.tensor([[1.0, 0, 1], [0, 0, 1]])),
    ):
        said = outputs(kind, 0)
        expected = {
            OutputKind.CLASSES: lambda x, y: F.cross_entropy(x, y),
            OutputKind.SCORES: lambda x, y: F.mse_loss(x[:, 0], y),
            OutputKind.LABELS: F.binary_cross_entropy_with_logits,
        }[kind](said.only, labels)  # fmt: skip
        torch.testing.assert_close(label_losses(said, {"labels": labels}).mean(), expected)
    said, labels = outputs(OutputKind.SCORES, 0), torch.tensor([[1.0], [0.25]])
    ranker = BertConfig(num_labels=1, problem_type="multi_label_classification")
    expected = F.binary_cross_entropy_with_logits(said.only, labels)
    torch.testing.assert_close(label_losses(said, {"labels": labels}, ranker).mean(), expected)
    tokens = outputs(OutputKind.TOKENS, 0)
    labels = torch.tensor([[0, 1, 2, -100], [-100, -100, -100, -100]])
    found = label_losses(tokens, {"labels": labels})
    torch.testing.assert_close(found[0], F.cross_entropy(tokens.only[0, :3], labels[0, :3]))
    assert float(found[1]) == 0


def test_what_cannot_be_compared_is_said() -> None:
    with pytest.raises(ValueError, match="returns a tuple: outputs with names are needed"):
        comparable_outputs((randn(0, 2, 3),), None, MASK)
    with pytest.raises(ValueError, match=r"nothing in the model's outputs \(loss\)"):
        comparable_outputs({"loss": randn(0, 1)}, None, MASK)
    classes, scores = outputs(OutputKind.CLASSES, 0), outputs(OutputKind.SCORES, 0)
    with pytest.raises(ValueError, match="teacher gives scores, and the student classes"):
        check_comparable(classes, scores)
    more = comparable_outputs({"logits": randn(0, 2, 5)}, None, MASK)
    with pytest.raises(ValueError, match="logits have a width of 5, and the student's of 3"):
        check_comparable(classes, more)


@pytest.mark.parametrize("kind", OutputKind)
def test_drawn_losses_have_the_curvature_of_the_divergences(kind: OutputKind) -> None:
    """Gradients of many draws, squared and averaged, against the second derivative of the divergence from the
    model itself; one example with padding."""
    said, mask, draws = outputs(kind, 3), MASK[1:], 40_000
    shapes = {name: value[1:].shape for name, value in said.values.items()}
    own = torch.cat([value[1:].flatten() for value in said.values.values()]).double()

    def as_outputs(flat: Tensor, rows: int = 1) -> Outputs:
        parts = flat.view(rows, -1).split([shape.numel() for shape in shapes.values()], dim=1)
        values = [part.view(rows, *shape[1:]) for part, shape in zip(parts, shapes.values(), strict=True)]
        return Outputs(kind, dict(zip(shapes, values, strict=True)))

    def divergence(flat: Tensor) -> Tensor:
        return divergences(as_outputs(flat), as_outputs(own), mask).sum()

    wanted = torch.autograd.functional.hessian(divergence, own)
    leaves = own.expand(draws, -1).clone().requires_grad_()
    loss = drawn_losses(as_outputs(leaves, draws), mask.expand(draws, -1), torch.Generator().manual_seed(0))
    assert loss.shape == (draws,)
    (gradients,) = torch.autograd.grad(loss.sum(), leaves)
    found = gradients.T @ gradients / draws
    torch.testing.assert_close(found, wanted, atol=0.03 * float(wanted.abs().max()), rtol=0.0)
