"""The mean of the last steps' weights: what it is, what a checkpoint keeps of it, and when a run takes it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from jobs import changed, job_settings, killed, same_end, variant
from matching import batch_of, trained_model
from pruned_trainer import Distillation, PruningTrainer
from pruned_trainer.jobs import prune as prune_module
from pruned_trainer.jobs.evaluation import validation_score
from pruned_trainer.jobs.examples import DatasetExamples
from pruned_trainer.jobs.prune import prune
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.tasks.task import Score
from pruned_trainer.training.averaging import FILE, WeightAverage
from pruned_trainer.training.batches import pad_batch
from pruned_trainer.training.phase import training_arguments
from pruned_trainer.training.trainer import last_checkpoint


class _Weights(TrainerCallback):
    """Every step's weights."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append({name: p.detach().clone() for name, p in model.named_parameters()})


def test_the_mean_of_the_last_steps(tmp_path: Path) -> None:
    """It is the mean; the model has it inside the block alone, and for good once it is kept."""
    model, seen, average = trained_model(steps=1), _Weights(), WeightAverage(3)
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    batch = batch_of(16, torch.Generator().manual_seed(0))
    trainer = PruningTrainer(
        model,
        training_arguments(tmp_path, 6, 8, 1e-2, 0),
        Distillation.none(),
        average=average,
        train_dataset=[{name: tensor[i].tolist() for name, tensor in batch.items()} for i in range(16)],
        data_collator=partial(pad_batch, pad_token_id=0),
    )
    trainer.add_callback(seen)
    trainer.train()
    last, name = seen.seen[-1], "bert.encoder.layer.0.output.dense.weight"
    mean = torch.stack([weights[name] for weights in seen.seen[3:]]).mean(0)
    assert (mean - last[name]).abs().max() > 1e-4
    with average.applied(model):
        torch.testing.assert_close(model.get_parameter(name).detach(), mean)
    for known, parameter in model.named_parameters():
        assert torch.equal(parameter, last[known]), known
    average.save(tmp_path)
    assert "bert.embeddings.word_embeddings.weight" not in load_file(tmp_path / FILE)
    average.keep(model)
    torch.testing.assert_close(model.get_parameter(name).detach(), mean)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PruneSettings:
    one = job_settings(tmp_path_factory.mktemp("averaged"), trained_model(steps=1))
    return changed(one, recipe="random", gate_steps=None, retrain_steps=20, average_steps=0.5, save_steps=7)


def _chosen(monkeypatch: pytest.MonkeyPatch, *scores: float) -> None:
    """Let the models score this on validation data, one after the other."""
    found = iter(scores)
    monkeypatch.setattr(prune_module, "validation_score", lambda job, model: next(found))


def test_the_better_weights_stay_and_a_resumed_run_has_the_same(
    settings: PruneSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outs = {}
    for name, scores in (("last", (2.0, 1.0)), ("mean", (1.0, 2.0))):
        _chosen(monkeypatch, *scores)
        one = variant(settings, name)
        prune(one)
        outs[name] = one.out
        assert f"the {name} stay" in capsys.readouterr().out
    weights = [load_file(out / "model.safetensors") for out in outs.values()]
    assert any(not torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    for step in (16, 20):  # after a checkpoint with a mean in it; after every step
        _chosen(monkeypatch, 1.0, 2.0)
        one = variant(settings, f"killed-{step}")
        killed(one, "retrain", step, monkeypatch)
        prune(replace(one, resume=True))
        same_end(one.out, outs["mean"])


def test_a_checkpoint_without_its_mean_is_refused(
    settings: PruneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = variant(settings, "spoilt")
    killed(one, "retrain", 16, monkeypatch)
    checkpoint = last_checkpoint(one.out.with_name("spoilt.partial") / "retrain")
    assert checkpoint is not None
    (checkpoint / FILE).unlink()
    with pytest.raises(ValueError, match=f"cannot be resumed: {FILE} is missing or broken"):
        prune(replace(one, resume=True))


def test_none_is_taken_where_none_is_asked_for(
    settings: PruneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _chosen(monkeypatch)
    prune(variant(settings, "without", average_steps=0.0))
    with pytest.raises(ValueError, match="average_steps is 1.5: it must lie in"):
        variant(settings, "refused", average_steps=1.5)


def test_models_of_a_call_are_chosen_between_by_their_agreement() -> None:
    """Of a caller's own metrics nobody knows whether more is better; a task's own ones count all."""

    def scored(**scores: float) -> float:
        prepared = SimpleNamespace(
            best_thresholds=lambda model: {}, score_lines=tuple(Score(name, name) for name in scores),
            evaluate=lambda model, thresholds: SimpleNamespace(scores=lambda: scores),
        )  # fmt: skip
        job: Any = SimpleNamespace(validation=prepared)
        return validation_score(job, cast(Any, None))

    def of_one_row(mse: float) -> float:
        """Of a call whose teacher says one number, which alone has no rank."""
        examples: Any = DatasetExamples.__new__(DatasetExamples)
        examples._names = ("mse",)
        examples.evaluate = lambda model, thresholds: SimpleNamespace(scores=lambda: {"mse": mse})
        job: Any = SimpleNamespace(validation=examples)
        return validation_score(job, cast(Any, None))

    assert scored(mse=0.5, agreement=90.0) > scored(mse=40.0, agreement=80.0)
    assert of_one_row(0.5) == of_one_row(40.0)
    assert scored(accuracy=80.0, f1=70.0) == 75.0
