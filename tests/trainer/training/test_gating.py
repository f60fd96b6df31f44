"""Gates in a loop of the caller's own, and in Trainers."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, Trainer, TrainingArguments

import pruned_ops
from calls import TwoTowers
from family_models import stock as family_stock
from head_models import SIZES, stock
from inputs import padded_batch, stock_model
from pruned_ops.measure.timing import Workload
from pruned_ops.models.stock import running_encoder
from pruned_trainer import Distillation, GatingTrainerMixin, PerGate, Scores, Target, compact, decide, gating
from pruned_trainer.pruning.budget import SizeBudget
from pruned_trainer.pruning.decision import decide_at
from pruned_trainer.training.gating import Gating
from tiny_tokenizers import word_tokenizer, words

BATCH = {**padded_batch((9, 3, 5), pad_token_id=1), "labels": torch.tensor([0, 2, 1])}


def loop(model: Any, steps: int, **more: Any) -> Any:
    with gating(model, Target(params=0.5), steps, **more) as gates:
        optimizer = torch.optim.AdamW(gates.parameters(), lr=1e-3)
        own = {id(parameter) for parameter in gates.phase.gates.parameters()}
        assert not own & {id(parameter) for parameter in gates.parameters()}
        for _ in range(steps):
            outputs = model(**BATCH)
            (outputs.loss + gates.loss(outputs, BATCH)).backward()
            optimizer.step()
            optimizer.zero_grad()
            gates.step()
        return gates, gates.decide()


def test_gates_in_a_loop_of_ones_own_come_to_the_target() -> None:
    model = stock("bert", "sequence").train()
    names = list(model.state_dict())
    gates, decision = loop(model, 60, teacher=copy.deepcopy(model))
    assert gates.facts["expected"] == pytest.approx(0.5, abs=0.15) and gates.facts["loss_logits"] >= 0
    assert decision.reached["params"] <= 0.5 and list(model.state_dict()) == names
    narrow = compact(model, decision)
    assert type(narrow).__name__ == "PrunedBertForSequenceClassification"
    budget = SizeBudget(gates.phase.gates.shape, "params")
    assert narrow.config.shape.parameters() == budget.cost(decision.shape(budget.dense))


def test_hidden_states_teach_in_a_loop_too() -> None:
    model = stock("bert", "token").train()
    labels = torch.zeros_like(BATCH["input_ids"])
    with gating(model, Target(params=0.5), 3, copy.deepcopy(model), Distillation(hidden=1.0)) as gates:
        outputs = model(**{**BATCH, "labels": labels})
        gates.loss(outputs, {**BATCH, "labels": labels}).backward()
    assert gates.facts["loss_hidden"] > 0 and "forward" not in vars(model.bert)
    with (
        pytest.raises(ValueError, match="need a teacher"),
        gating(model, Target(params=0.5), 3, None, Distillation()),
    ):
        pass
    with pytest.raises(ValueError, match="cannot be met"), gating(model, Target(params=1e-9), 3):
        pass


def test_of_a_teacher_with_several_encoders_the_one_of_that_name_teaches() -> None:
    teacher = TwoTowers()
    weights = Distillation(hidden=1.0)
    with gating(TwoTowers(), Target(params=0.5), 1, teacher, weights, encoder="passage"):
        assert running_encoder(teacher) is teacher.passage


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no target": ({"target": 0.5}, "target is a float, and a Target is needed"),
    "no steps": ({"steps": 0}, "steps is 0: at least 1"),
    "half a step": ({"steps": 2.5}, "steps is 2.5: an integer"),
    "batches that nothing is timed on": (
        {"workload": Workload.fixed(8, 2, 1)}, "a workload is for a target in time, and this one is 0.5",
    ),
    "no multiple": ({"align": 0}, "align is 0: at least 1"),
    "a teacher that nothing asks": (
        {"teacher": stock("bert", "sequence"), "distillation": Distillation.none()},
        "a teacher is given, and no loss of the distillation asks it",
    ),
    "itself": ({"teacher": "itself"}, "teacher has the model's own weights"),
    "half precision": ({"model": lambda: stock("bert", "sequence").bfloat16()}, "gates train in float32"),
    "optimised": ({"model": lambda: pruned_ops.optimize(stock("bert", "sequence"))}, "is optimised: prun"),
    "no weights": ({"model": lambda: stock("bert", "sequence").to("meta")}, "on the meta device"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_gated_is_refused(name: str) -> None:
    changes, message = REFUSED[name]
    call: dict[str, Any] = {
        "model": lambda: stock("bert", "sequence"),
        "target": Target(params=0.5),
        **changes,
    }
    call["model"] = call["model"]()
    if call.get("teacher") == "itself":
        call["teacher"] = call["model"]
    with pytest.raises(ValueError, match=message), gating(**call):
        pass
    assert not hasattr(call["model"], "pruning_gates")


def test_a_step_that_leaves_the_gates_as_they_are_is_an_error() -> None:
    """Gates of a model in evaluation mode have no price, and a model's own zero_grad clears theirs."""
    model = stock("bert", "sequence")
    with gating(model, Target(params=0.5), 2) as gates:
        outputs = model(**BATCH)
        (outputs.loss + gates.loss(outputs, BATCH)).backward()
        with pytest.raises(ValueError, match="in evaluation mode"):
            gates.step()
        model.train()
        outputs = model(**BATCH)
        (outputs.loss + gates.loss(outputs, BATCH)).backward()
        model.zero_grad()
        with pytest.raises(ValueError, match="no gradient reached the gates"):
            gates.step()
        outputs = model(**BATCH)
        (outputs.loss + gates.loss(outputs, BATCH)).backward()
        gates.step()


def test_a_hidden_size_that_no_narrow_model_can_have_is_not_decided() -> None:
    """An ELECTRA of 48 dimensions has no projection of embeddings of 48, whose weights would be lost."""
    model = family_stock("Electra", "QuestionAnswering")
    with gating(model, Target(params=0.99), 1, parts=["hidden"]) as gates:
        budget = gates.budget
    rank = PerGate.full(budget.dense, float("inf"))
    rank.hidden = torch.arange(64.0)
    scores = Scores(rank, PerGate.full(budget.dense, 1.0))
    cost = budget.fraction(replace(budget.dense, hidden_size=48))
    decision = decide(scores, budget, Target(params=cost + 1e-9))
    assert decision.hidden is not None and len(decision.hidden.indices) == 40
    assert compact(model, decision).config.hidden_size == 40
    wide = decide_at(scores, budget, 30.0, align=48)  # where there is no smaller one
    assert wide.hidden is not None and len(wide.hidden.indices) == 64


def test_several_calls_in_a_step_and_gradient_checkpointing_are_refused() -> None:
    """Each call has gates of its own, and the layers of all would be computed anew with the last ones."""
    model = stock("bert", "sequence").train()
    with gating(model, Target(params=0.5), 4) as gates:
        model(**BATCH)
        gates.loss(model(**BATCH), BATCH)
        model.gradient_checkpointing_enable()
        gates.loss(model(**BATCH), BATCH)
        model(**BATCH)
        with pytest.raises(ValueError, match="the 2 calls of the model in this step"):
            gates.loss(model(**BATCH), BATCH)


def test_gates_that_go_back_to_a_state_go_on_as_from_it() -> None:
    """Also to the step that was the last one."""
    model = stock("bert", "sequence").train()
    with gating(model, Target(params=0.5), 4) as gates:
        gates.done, multipliers = 2, list[float]()
        state = copy.deepcopy(gates.state_dict())
        for _ in range(2):
            gates.load_state_dict(copy.deepcopy(state))
            gates.price()
            multipliers.append(gates.facts["multiplier"])
    assert multipliers[0] != 0 and multipliers[1] == multipliers[0]


class Pruner(GatingTrainerMixin, Trainer):
    pass


def test_the_mixin_refuses_before_it_trains(tmp_path: Path) -> None:
    def of_args(**more: Any) -> TrainingArguments:
        return TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, **more)

    def pruner(gating: dict[str, Any], **more: Any) -> Any:
        return Pruner(stock("bert", "sequence"), of_args(**more), train_dataset=[BATCH], gating=gating)

    target = {"target": Target(params=0.5)}
    with pytest.raises(ValueError, match="gating has no option steps, teachers; its options are align"):
        pruner({**target, "teachers": None, "steps": 3})
    with pytest.raises(ValueError, match="gating needs a target"):
        pruner({})
    with pytest.raises(ValueError, match="load_best_model_at_end would take a step"):
        pruner(target, load_best_model_at_end=True, eval_strategy="no", save_strategy="no")
    with pytest.raises(ValueError, match="model_init makes another model when training begins"):
        Pruner(args=of_args(), model_init=lambda: stock("bert", "sequence"), gating=target)


def test_the_mixin_moves_the_teacher_to_the_trainer_s_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher is a copy from before the Trainer moved its model."""
    model, devices = stock("bert", "sequence"), list[torch.device]()
    teacher = copy.deepcopy(model)
    monkeypatch.setattr(teacher, "to", devices.append)
    args = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=3, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    data = [{name: tensor[i] for name, tensor in BATCH.items()} for i in range(3)]
    options = {"target": Target(params=0.5), "teacher": teacher}
    trainer = Pruner(model, args, train_dataset=data, gating=options)
    trainer.train()
    assert devices == [trainer.args.device]


def test_the_gates_of_a_trainer_have_all_its_steps(tmp_path: Path) -> None:
    """Of batches that gradient accumulation does not divide, the last ones are a step, too."""
    data = [{name: tensor[i] for name, tensor in BATCH.items()} for i in range(3)] * 4
    args = TrainingArguments(
        str(tmp_path), num_train_epochs=1.5, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Pruner(
        stock("bert", "sequence"), args, train_dataset=data, gating={"target": Target(params=0.5)}
    )
    planned = trainer._planned_steps()
    trainer.train()
    assert planned == trainer.state.global_step == 3


def test_the_mixin_prunes_in_a_trainer(tmp_path: Path) -> None:
    model = stock("bert", "sequence")
    data = [{name: tensor[i] for name, tensor in BATCH.items()} for i in range(3)] * 8
    args = TrainingArguments(
        str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    teacher = copy.deepcopy(model)
    trainer = Pruner(
        model, args, train_dataset=data, eval_dataset=data[:4],
        gating={"target": Target(params=0.5), "teacher": teacher, "distillation": Distillation(hidden=1.0)},
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.state.global_step == 6 and trainer.decision is not None
    assert trainer.decision.reached["params"] <= 0.5
    assert "forward" not in vars(model) and not hasattr(model, "pruning_gates")
    assert trainer.evaluate()["eval_loss"] != before
    assert compact(model, trainer.decision)(**BATCH).loss is not None


@pytest.mark.parametrize("head", ["classes", "answers", "own loss"])
def test_what_is_added_weighs_the_same_however_many_minibatches_a_step_has(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the Trainer averages their losses, as those of answers, whose labels it does not count, or adds
    them up; and in the last step of an epoch, which has fewer."""
    price = Gating.price

    def hundred(self: Gating) -> torch.Tensor:
        term = price(self)
        return 100.0 + term - term.detach()

    monkeypatch.setattr(Gating, "price", hundred)
    rows: list[dict[str, Any]] = [{name: t[i] for name, t in BATCH.items()} for i in range(3)] * 4
    model, more = stock("bert", "sequence"), dict[str, Any]()
    if head == "answers":
        model, places = stock_model(), {"start_positions": torch.tensor(1), "end_positions": torch.tensor(2)}
        rows = [{**{name: t for name, t in row.items() if name != "labels"}, **places} for row in rows]
    if head == "own loss":
        more["compute_loss_func"] = lambda outputs, labels, num_items_in_batch=None: (
            F.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch
        )
    args = TrainingArguments(
        str(tmp_path), num_train_epochs=1, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    steps: dict[int, float] = {}

    class Watching(Pruner):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            step = self.state.global_step
            steps[step] = steps.get(step, 0.0) + float(loss)
            return loss

    Watching(model, args, train_dataset=rows, gating={"target": Target(params=0.5)}, **more).train()
    assert len(steps) == 2 and all(100 < loss < 110 for loss in steps.values()), steps


def test_the_mixin_resumes_with_its_gates(tmp_path: Path) -> None:
    """From a checkpoint it comes to the same weights and the same gates, bit for bit; without the gates' own
    state it does not begin."""
    data = [{name: tensor[i] for name, tensor in BATCH.items()} for i in range(3)] * 8

    def pruner(folder: str) -> Any:
        args = TrainingArguments(
            str(tmp_path / folder), max_steps=6, per_device_train_batch_size=4, report_to=[], use_cpu=True,
            disable_tqdm=True, save_steps=3, learning_rate=1e-3,
        )  # fmt: skip
        return Pruner(stock("bert", "sequence"), args, train_dataset=data,
                      gating={"target": Target(params=0.5)})  # fmt: skip

    whole = pruner("whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    again = pruner("again")
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.decision == whole.decision
    expected = whole.model.state_dict()
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    (checkpoint / "gating.pt").unlink()
    with pytest.raises(ValueError, match="has no gating.pt, the state of the gates"):
        pruner("third").train(resume_from_checkpoint=str(checkpoint))


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    BertModel(BertConfig(**SIZES, **sizes)).save_pretrained(tmp_path / "model")
    word_tokenizer(90).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_mixin_prunes_in_sentence_transformers(encoder: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss

    pairs = {"first": [words(i + 1) for i in range(12)], "second": [words(12 - i) for i in range(12)]}
    data = datasets.Dataset.from_dict({**pairs, "label": [i / 12 for i in range(12)]})
    common = {"max_steps": 3, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True,
              "disable_tqdm": True, "save_strategy": "no"}  # fmt: skip
    seen: list[dict[str, float]] = []

    class Watching(GatingTrainerMixin):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            assert self._gating is not None
            seen.append(self._gating.facts)
            return loss

    class Embedding(Watching, library.SentenceTransformerTrainer):
        pass

    model = library.SentenceTransformer(str(encoder), device="cpu")
    options = {"target": Target(params=0.5), "teacher": copy.deepcopy(model)}
    options["distillation"] = Distillation(hidden=1.0)
    trainer = Embedding(
        model, library.SentenceTransformerTrainingArguments(str(tmp_path / "e"), **common),
        train_dataset=data, loss=CosineSimilarityLoss(model), gating=options,
    )  # fmt: skip
    trainer.train()
    assert len(seen) == 3 and all(facts["loss_hidden"] > 0 and facts["loss_logits"] > 0 for facts in seen)
    narrow = compact(model, trainer.decision)
    assert isinstance(narrow, library.SentenceTransformer) and narrow.encode(["w1 w2"]).shape == (1, 32)

    class Ranking(Watching, library.CrossEncoderTrainer):
        pass

    ranker = library.CrossEncoder(str(encoder), num_labels=1, device="cpu")
    seen.clear()
    trainer = Ranking(
        ranker, library.CrossEncoderTrainingArguments(str(tmp_path / "r"), **common), train_dataset=data,
        gating={"target": Target(params=0.5), "teacher": copy.deepcopy(ranker)},
    )  # fmt: skip
    trainer.train()
    assert len(seen) == 3 and all(facts["loss_logits"] >= 0 for facts in seen)
    narrow = compact(ranker, trainer.decision)
    assert isinstance(narrow, library.CrossEncoder) and len(narrow.predict([("w1", "w2")])) == 1
