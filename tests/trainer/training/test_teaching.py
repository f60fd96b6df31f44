"""Training under any head: with labels, without them, and in modules of one's own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from head_models import SIZES, stock
from inputs import padded_batch, stock_model
from pruned_trainer import Distillation, HoldTarget, PruningTrainer, SizeBudget, attached
from pruned_trainer.training.batches import pad_batch
from pruned_trainer.training.encoder_states import capturing, run_model
from pruned_trainer.training.phase import training_arguments
from pruned_trainer.training.teaching import Teaching, other_meaning

BATCH = padded_batch((6, 3), pad_token_id=1)


def rows(number: int, **more: Any) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (number,), generator=generator).tolist()
    return [
        {
            "input_ids": torch.randint(5, 100, (length,), generator=generator).tolist(),
            "attention_mask": [1] * length,
            **more,
        }
        for length in lengths
    ]


def trained(model: Any, features: Any, folder: Path, steps: int = 2, **more: Any) -> PruningTrainer:
    trainer = PruningTrainer(
        model,
        training_arguments(folder, steps, 4, 1e-3, 0, disable_tqdm=True),
        more.pop("distillation", Distillation()),
        train_dataset=features,
        data_collator=partial(pad_batch, pad_token_id=1),
        **more,
    )
    trainer.train()
    return trainer


class Pooled(nn.Module):
    """An embedder of one's own; its loss is a function beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = BertModel(
            BertConfig(
                **SIZES, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
            ),
            add_pooling_layer=False,
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return {"embedding": self.encoder(input_ids, attention_mask).last_hidden_state[:, 0]}


@pytest.mark.parametrize("head", ["sequence", "token", "own"])
def test_gates_train_without_labels(head: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make = Pooled if head == "own" else partial(stock, "bert", head)
    model, teacher = make(), make()
    with attached(model) as gates:
        phase = HoldTarget(gates, SizeBudget(gates.shape, "params"), [0.5])
        trainer = trained(model, rows(16), tmp_path, 3, teacher=teacher, gate_phase=phase)
    last = [entry for entry in trainer.state.log_history if "loss_logits" in entry][-1]
    assert last["loss_task"] == 0 and last["loss_logits"] > 0 and last["loss_hidden"] > 0
    assert len({x for location in gates.locations() for x in location.tolist()}) > 20  # each had its gradient
    assert "distillation_projection" not in dict(model.named_modules())


def test_a_loss_of_ones_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Pooled()
    before = model.encoder.embeddings.position_embeddings.weight.detach().clone()
    seen: list[tuple[Any, ...]] = []

    def loss(outputs: Any, batch: Any) -> Tensor:
        seen.append((*outputs, *batch))
        return outputs["embedding"].square().mean()

    trained(model, rows(8), tmp_path, task_loss=loss, distillation=Distillation.none())
    assert seen[0] == ("embedding", "input_ids", "attention_mask")
    assert not torch.equal(before, model.encoder.embeddings.position_embeddings.weight)


def test_a_batch_without_any_signal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing in this batch's loss has a gradient"):
        trained(stock("bert", "sequence"), rows(8), tmp_path, distillation=Distillation.none())


def test_a_batch_of_which_no_token_is_labelled_adds_nothing(tmp_path: Path) -> None:
    """Its loss in transformers is the mean over nothing, NaN, and training ended there."""
    unlabelled = [{**row, "labels": [-100] * len(row["input_ids"])} for row in rows(8)]
    trainer = trained(stock("bert", "token"), unlabelled, tmp_path, distillation=Distillation.none())
    assert {entry["loss_task"] for entry in trainer.state.log_history if "loss_task" in entry} == {0.0}
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())


def test_states_are_the_same_however_they_are_found() -> None:
    model = stock_model()
    with torch.no_grad():
        asked, (own,) = run_model(model, BATCH, True)
        with capturing(model) as found:
            model(**BATCH)
    assert len(found) == 1 and len(found[0].hidden) == len(own.hidden)
    assert all(torch.equal(a, b) for a, b in zip(found[0].hidden, own.hidden, strict=True))
    assert torch.equal(found[0].mask, BATCH["attention_mask"]) and len(asked.hidden_states) == 4
    assert "forward" not in vars(model.bert)


def test_the_teacher_is_not_given_labels_nor_what_it_does_not_take() -> None:
    student, teacher = stock("bert", "sequence"), Pooled()
    given: list[set[str]] = []
    forward = teacher.forward

    def spy(input_ids: Tensor, attention_mask: Tensor) -> Any:
        given.append({"input_ids", "attention_mask"})
        return {"logits": forward(input_ids, attention_mask)["embedding"][:, :3]}

    teacher.forward = spy  # type: ignore[method-assign]
    teaching = Teaching(student, teacher, Distillation(hidden=0.0), labels=["gold"])
    inputs = {
        **BATCH,
        "labels": torch.tensor([0, 1]),
        "gold": torch.ones(2),
        "token_type_ids": BATCH["input_ids"] * 0,
    }
    outputs = student(**{k: v for k, v in inputs.items() if k != "gold"})
    parts = teaching.parts(outputs, (), inputs)
    assert given and set(parts) == {"logits"} and float(teaching.task_loss(outputs, inputs)) > 0
    assert float(teaching.task_loss(student(**BATCH), BATCH)) == 0


def test_rank_scores_learn_margins_where_the_query_is_known() -> None:
    torch.manual_seed(0)
    config = BertConfig(**{**SIZES, "num_labels": 1}, hidden_size=16, num_hidden_layers=1,
                        num_attention_heads=2, intermediate_size=24)  # fmt: skip
    student, teacher = (BertForSequenceClassification(config).eval() for _ in range(2))
    teaching = Teaching(student, teacher, Distillation(task=0.0, hidden=0.0))
    outputs = student(**BATCH)
    alone = teaching.parts(outputs, (), BATCH)["logits"]
    ranked = teaching.parts(outputs, (), BATCH, groups=torch.tensor([5, 5]))["logits"]
    own, wanted = outputs.logits[:, 0], teacher(**BATCH).logits[:, 0]
    torch.testing.assert_close(alone, F.mse_loss(own, wanted))
    torch.testing.assert_close(ranked - alone, ((own[0] - own[1]) - (wanted[0] - wanted[1])) ** 2)


def test_a_teacher_whose_numbers_mean_something_else_is_known_by_its_config() -> None:
    """Only where that is sure: other names may say the same, and what no config tells may be so."""
    student, teacher = stock("bert", "sequence"), stock("bert", "sequence")
    names = ("no", "perhaps", "yes")
    for order, fault in (
        (("NO", "Perhaps", "YES"), None),
        (("contradiction", "neutral", "entailment"), None),
        (("yes", "perhaps", "no"), "its labels are yes, perhaps, no, in another order"),
    ):
        student.config.id2label, teacher.config.id2label = dict(enumerate(names)), dict(enumerate(order))
        found = other_meaning(teacher, student)
        assert found is None if fault is None else str(found).startswith(fault)
    assert other_meaning(Pooled(), student) is None
    encoders = [model.bert for model in (teacher, student)]
    teacher.config.id2label = student.config.id2label
    encoders[0].config.pooling = "cls"
    assert other_meaning(*encoders) is None
    encoders[1].config.pooling = "mean"
    assert other_meaning(*encoders) == "its embeddings are pooled by cls, and the student's by mean"
    encoders[1].config.pooling = "cls"
    assert other_meaning(*encoders) is None
    encoders[0].config.hidden_size = 96
    assert other_meaning(*encoders) == "its embeddings have 96 numbers, and the student's 64"
