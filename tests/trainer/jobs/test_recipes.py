"""Every way to prune, as a whole job: recipes, parts, targets in time, teachers, families."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, PreTrainedModel

from jobs import job_settings, variant
from matching import save_checkpoint, trained_model
from pruned_trainer import (
    Distillation,
    HoldTarget,
    SizeBudget,
    Target,
    attached,
)
from pruned_trainer.cli import main
from pruned_trainer.jobs import plan as planning
from pruned_trainer.jobs.finetune_settings import FineTuneSettings
from pruned_trainer.jobs.job import Job, start
from pruned_trainer.jobs.plan import GATE_SHARE, RESERVE, make_plan
from pruned_trainer.jobs.prune import prune, sweep
from pruned_trainer.jobs.settings import RECIPES, PruneSettings
from pruned_trainer.pruning.gate_phase import GatePhase
from pruned_trainer.tasks.options import STRIDE
from pruned_trainer.training.teacher_cache import TeacherCache
from thorough import EVERYTHING


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PruneSettings:
    return job_settings(tmp_path_factory.mktemp("recipes"), trained_model())


def targets_of(*macs: float) -> tuple[Target, ...]:
    return tuple(Target(macs=fraction) for fraction in macs)


@pytest.mark.parametrize("recipe", ["paper", "gain", "leave-one-out", "random"])
def test_other_recipes_meet_a_target(recipe: str, settings: PruneSettings) -> None:
    steps = None if recipe == "random" else 4
    one = variant(settings, recipe, recipe=recipe, gate_steps=steps, retrain_steps=0)
    report = prune(one)
    assert report["recipe"] == recipe and 0.3 < report["target"]["reached"]["macs"] <= 0.5
    assert report["training"]["retrain"] == []
    AutoModelForQuestionAnswering.from_pretrained(one.out)


def test_the_fast_recipe_trains_nothing_and_compensates(settings: PruneSettings) -> None:
    """Unless it is asked for something else."""
    one = variant(settings, "fast", recipe="fast", gate_steps=None, retrain_steps=None)
    report = prune(one)
    assert report["recipe"] == "fast" and report["plan"]["retrain_steps"] == 0
    assert report["training"]["retrain"] == [] == report["training"]["gates"]
    assert 0.3 < report["target"]["reached"]["macs"] <= 0.5
    decision = json.loads((one.out / "decision.json").read_text())
    assert decision["compensation"]["ffn"] in ("bias", "least-squares")
    again = variant(one, "fast-again", retrain_epochs=1.0, compensate="none")
    assert make_plan(start(again)).retrain_steps > 0 and again.compensation == "none"
    assert settings.compensation == "none" == settings.to_json()["compensate"]
    with pytest.raises(ValueError, match="leave hidden out"):
        variant(one, "fast-hidden", parts=("heads", "ffn", "hidden"))


def test_hidden_dimensions(settings: PruneSettings) -> None:
    """All three kinds at once; the narrow model learns through a projection onto what is left."""
    one = variant(
        settings, "hidden", parts=("heads", "ffn", "hidden"), targets=(Target(params=0.3),), align=1
    )
    report = prune(one)
    model = AutoModelForQuestionAnswering.from_pretrained(one.out)
    assert model.config.hidden_size == report["hidden_size"] < 32
    assert report["target"]["reached"]["params"] <= 0.3
    assert "loss_hidden" in report["training"]["retrain"][0]
    assert not any("projection" in name for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="hidden dimensions go with a target in params or macs"):
        replace(one, targets=(Target(speedup=2.0),))


def test_a_family_from_one_training(settings: PruneSettings, capsys: pytest.CaptureFixture[str]) -> None:
    one = variant(settings, "family", targets=targets_of(0.4, 0.8, 0.6), retrain_steps=10)
    found = sweep(one)
    assert capsys.readouterr().out.count("joint: 40 steps") == 1
    assert [point["folder"] for point in found["points"]] == ["macs-0.8", "macs-0.6", "macs-0.4"]
    assert json.loads(json.dumps(found)) == json.loads((one.out / "sweep.json").read_text())
    sizes = []
    for point in found["points"]:
        place = one.out / point["folder"]
        model = AutoModelForQuestionAnswering.from_pretrained(place)
        assert list(model.config.layer_shapes) == point["shape"] and (place / "tokenizer.json").is_file()
        assert point["f1"] == json.loads((place / "report.json").read_text())["pruned"]["f1"]
        sizes.append(point["macs"])
    assert sizes == sorted(sizes, reverse=True)
    assert (one.out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    left = {path.name for path in one.out.iterdir()}
    figures = {f"{name}.png" for name in ("sweep", "report-gates", "report-target", "report-speed")}
    assert left == {"macs-0.8", "macs-0.6", "macs-0.4", "sweep.json", "report.html", *figures}
    with pytest.raises(ValueError, match="asked for twice: macs-0.5, macs-0.5"):
        variant(settings, "twice", targets=targets_of(0.5, 0.50000001))
    with pytest.raises(ValueError, match="2 gate steps cannot pass 3 targets"):
        sweep(variant(settings, "few", gate_steps=2, targets=targets_of(0.8, 0.6, 0.4)))
    with pytest.raises(ValueError, match="all in one unit"):
        variant(settings, "mixed", targets=(Target(macs=0.4), Target(speedup=2.0)))
    with pytest.raises(ValueError, match="prune makes one model; sweep makes one for each of 2 targets"):
        prune(variant(settings, "several", targets=targets_of(0.8, 0.4)))
    with pytest.raises(ValueError, match="a sweep needs one or more targets"):
        sweep(variant(settings, "none", recipe="paper", targets=()))


def test_targets_are_passed_one_after_another() -> None:
    model = trained_model(steps=1)
    with attached(model) as gates:
        phase = HoldTarget(gates, SizeBudget(gates.shape, "params"), [0.8, 0.4], penalty="open")
        held = [phase.target_at(i / 20) for i in range(21)]
        with pytest.raises(ValueError, match="that fall"):
            HoldTarget(gates, SizeBudget(gates.shape, "params"), [0.4, 0.8])
    assert held == sorted(held, reverse=True)
    assert held[0] == phase.start < 1.0  # what the gates cost at the start
    assert held[6:10] == pytest.approx([0.8] * 4) and held[16:] == pytest.approx([0.4] * 5)


def test_a_cached_teacher_teaches_the_same(
    settings: PruneSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits read from disk give the run that the teacher gives, within the rounding of its batches; once
    they are all there it is not asked again."""
    losses, stored = [], []
    original = TeacherCache.store

    def counting(self: Any, *args: Any) -> None:
        stored.append(name)
        original(self, *args)

    monkeypatch.setattr(TeacherCache, "store", counting)
    logits_only = Distillation(hidden=0.0)
    for name, cache in (("plain", None), ("filling", tmp_path / "cache"), ("filled", tmp_path / "cache")):
        one = variant(settings, name, distillation=logits_only, cache_teacher=cache, gate_steps=10)
        log = prune(one)["training"]
        losses.append([entry["loss"] for entry in log["gates"] + log["retrain"] if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[2] == pytest.approx(losses[0], rel=1e-3)
    assert stored and set(stored) == {"filling"}
    with pytest.raises(ValueError, match="set --distil-hidden 0"):
        variant(settings, "both", cache_teacher=tmp_path / "cache")


def test_teachers_that_cannot_teach_are_refused(settings: PruneSettings, tmp_path: Path) -> None:
    short = save_checkpoint(trained_model(steps=1, max_position_embeddings=40), tmp_path / "short")
    with pytest.raises(ValueError, match="it takes 40 tokens, the student 32"):
        prune(variant(settings, "refused", teacher=str(short)))
    more = trained_model(steps=1, vocab_size=40)
    save_checkpoint(more, tmp_path / "words")
    with pytest.raises(ValueError, match="its vocabulary has 40 tokens and is not the student's"):
        prune(variant(settings, "refused", teacher=str(tmp_path / "words")))


def test_a_deeper_teacher_needs_a_layer_map(settings: PruneSettings, tmp_path: Path) -> None:
    deep = save_checkpoint(trained_model(steps=60, num_hidden_layers=4, hidden_size=48), tmp_path / "deep")
    one = variant(settings, "taught", teacher=str(deep), gate_steps=3, retrain_steps=3)
    with pytest.raises(ValueError, match="the student has 2 layers, the teacher 4: say which"):
        prune(one)
    mapped = Distillation(layers=((1, 2), (2, 4)))
    report = prune(replace(one, distillation=mapped))  # nothing was written before it was refused
    assert report["training"]["gates"][0]["loss_hidden"] > 0
    with pytest.raises(ValueError, match="layers 2:5 cannot be compared"):
        prune(variant(one, "wrong", distillation=Distillation(layers=((2, 5),)), recipe="gain"))


def test_tensorboard(settings: PruneSettings) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one = variant(settings, "board", tensorboard=True, gate_steps=8, retrain_steps=4)
    prune(one)
    events = EventAccumulator(str(one.out / "tensorboard" / "gates"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss_task", "train/loss_hidden", "train/expected", "train/wanted"} <= tags
    assert {"train/open_heads/layer_0", "train/open_ffn/layer_1"} <= tags
    assert (one.out / "tensorboard" / "retrain").is_dir()
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_autocast_and_compile(settings: PruneSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast rounds (a little) differently, the compiled narrow model computes the same; both were on.
    Inductor takes its time in `make test-all`."""
    curves = {}
    if not EVERYTHING:
        whole = torch.compile
        eager = {"backend": "aot_eager"}
        monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: whole(*args, **{**kwargs, **eager}))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for name, changes in (("plain", {}), ("bf16", {"precision": "bf16"}), ("compiled", {"compile": True})):
        one = variant(settings, f"faster-{name}", gate_steps=3, retrain_steps=4, **changes)
        log = prune(one)["training"]["retrain"]
        curves[name] = [entry["loss"] for entry in log if "loss" in entry]
    assert curves["bf16"] == pytest.approx(curves["plain"], rel=0.2) and curves["bf16"] != curves["plain"]
    assert curves["compiled"] == pytest.approx(curves["plain"], rel=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="fp16 needs a GPU"):
            replace(settings, precision="fp16")


def test_the_sweep_command(settings: PruneSettings, capsys: pytest.CaptureFixture[str]) -> None:
    one = variant(settings, "swept")
    argv = [
        "sweep", "--model", one.model, "--train-file", str(one.train_file), "--validation-file",
        str(one.validation_file), "--out", str(one.out), "--params", "0.7", "0.5", "--gate-steps", "6",
        "--retrain-steps", "2", "--max-length", "24", "--stride", "4",
    ]  # fmt: skip
    assert main(argv) == 0
    screen = capsys.readouterr().out
    for words in ("a model for each target", "params-0.7", "params-0.5", "sweep.png"):
        assert words in screen
    where = argv.index("--params")
    assert main([*argv[:where], "--speedup", "0.5", *argv[where + 3 :]]) == 2
    assert "target speedup is 0.5: more than 1 is needed" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", RECIPES)
def test_minutes_are_shared_out_in_every_recipe(recipe: str, settings: PruneSettings) -> None:
    """Both phases fit into the time, by the seconds a step that were measured; one phase's steps leave the
    other the rest; too little time is refused."""
    one = variant(settings, f"minutes-{recipe}", recipe=recipe, gate_steps=None, retrain_steps=None)
    job = start(replace(one, max_minutes=20))

    def planned(job: Job) -> tuple[float, float]:
        plan = make_plan(job)
        assert plan.gate_step_seconds is not None and plan.retrain_step_seconds is not None
        assert (plan.gate_steps >= 1) == (recipe != "random") and plan.retrain_steps >= 1
        return plan.gate_steps * plan.gate_step_seconds, plan.retrain_steps * plan.retrain_step_seconds

    gates, again = planned(job)
    assert 600 < gates + again <= 1200
    if recipe in ("joint", "paper"):
        assert gates / (gates + again) == pytest.approx(GATE_SHARE, abs=0.05)
        job = replace(job, settings=replace(job.settings, retrain_steps=10))
        gates, again = planned(job)
        assert 600 < gates + again <= 1200 and again < 100
    for earlier, timed in ((1300.0, False), (60 * 20 * (1 - RESERVE) - job.clock.seconds() - 0.2, True)):
        late = replace(job, clock=replace(job.clock, earlier=earlier))
        with (
            pytest.raises(ValueError, match=r"--max-minutes 20 is too little here: at least \d"),
            patch.object(planning, "_step_seconds", Mock(return_value=(10.0, 10.0))) as step_seconds,
        ):
            make_plan(late)
        assert step_seconds.called == timed  # what cannot fit is refused before any step is timed


def test_steps_that_are_given_have_to_fit_into_the_minutes(settings: PruneSettings) -> None:
    """Also where the recipe, or a decision, gives those of the other phase, and nothing is left to plan."""
    one = variant(settings, "given", recipe="fast", gate_steps=None, retrain_steps=100, max_minutes=20)
    job = start(one)
    for seconds, fits in ((1.0, True), (60.0, False)):
        with patch.object(planning, "_step_seconds", Mock(return_value=(0.1, seconds))):
            if fits:
                assert make_plan(job).retrain_steps == 100
                continue
            with pytest.raises(ValueError, match=r"--max-minutes 20 is too little here: at least 10\d"):
                make_plan(job)


def test_the_models_of_a_sweep_take_their_own_time(settings: PruneSettings) -> None:
    """A step of a larger one takes longer, and all of them have to fit into the minutes."""
    job = start(variant(settings, "sizes", targets=targets_of(0.8, 0.2)))
    sizes = []

    def seconds(job: Job, model: PreTrainedModel, teacher: PreTrainedModel, phase: GatePhase | None) -> float:
        if phase is not None:
            return 7.0
        sizes.append(model.num_parameters())
        return 10.0 * len(sizes)

    with patch.object(planning, "_time_steps", seconds):
        assert planning._step_seconds(job) == (7.0, 15.0)
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 2


def test_options_without_effect_are_refused(settings: PruneSettings) -> None:
    rates = {name: getattr(PruneSettings, name) for name in ("learning_rate", "retrain_learning_rate")}
    settings = replace(settings, batch_size=None, **rates)
    decided: dict[str, Any] = {"decision": Path("decision.json"), "targets": (), "gate_steps": None}
    embeds: dict[str, Any] = {"task": "embedding", "stride": STRIDE}
    untrained: dict[str, Any] = {
        "recipe": "random", "retrain_steps": 0, "teacher": "t", "texts": Path("t.txt"), "train_file": None,
        "task": "text-classification", "stride": STRIDE,
    }  # fmt: skip
    for changes, message in (
        ({"lambda_ffn": 2.0}, "prices of the paper's recipe"),
        ({"recipe": "gain", "penalty": "open"}, "penalty has no meaning there"),
        ({"recipe": "paper", "lambda_ffn": 2.0}, "the lambda multiples are for runs without"),
        ({"compensate": "magic"}, "compensate is 'magic'"),
        ({"distillation": Distillation(hidden=0.0, projection=True)}, "whose weight is 0"),
        ({"parts": ("heads", "heads")}, "each is said once"),
        ({"recipe": "fast", "retrain_steps": None, "average_steps": 0.5}, "average_steps: for the narrow"),
        ({"retrain_steps": 0, "masked_texts": 1.0, "compile": True}, "masked_texts, compile: for the narrow"),
        ({"retrain_steps": None, "retrain_epochs": 0.0, "compile": True}, "which has no steps here"),
        ({"distil_in": "none", "teacher": "t"}, "teacher is given, and no teacher teaches in any phase"),
        ({"recipe": "random", "retrain_steps": 0, "teacher": "t"}, "no teacher teaches in any phase"),
        ({"recipe": "random", "distil_in": "gates", "teacher": "t"}, "no teacher teaches in any phase"),
        ({"recipe": "paper", "targets": (), "teacher": "t"}, "no teacher teaches in any phase"),
        (untrained, "no teacher teaches in any phase"),  # and the files have labels
        (
            {"distil_in": "none", "cache_teacher": Path("c"), "distillation": Distillation(hidden=0.0)},
            "cache_teacher is given, and no teacher",
        ),
        ({"recipe": "gain", "gate_learning_rate": 0.2}, "which this run does not have"),
        ({"recipe": "gain", "learning_rate": 0.2}, "learning_rate: for the training of weights beside gates"),
        ({"recipe": "paper", "learning_rate": 0.2}, "learning_rate: for the training of weights beside"),
        ({"retrain_steps": 0, "retrain_learning_rate": 0.2}, "retrain_learning_rate: for the narrow model's"),
        ({"recipe": "fast", "retrain_steps": None, "dropout": 0.1}, "dropout: for a training, which this"),
        ({"recipe": "paper", "retrain_steps": 0, "train_embeddings": True}, "for a training of weights"),
        ({"recipe": "random", "gate_fraction": 0.5}, "gate_fraction: for a choice or a comp"),
        ({"recipe": "random", "retrain_steps": 0, "tensorboard": True}, "tensorboard: for a training, which"),
        ({"recipe": "random", "retrain_steps": 0, "save_steps": 5}, "save_steps: for a training, which"),
        ({"recipe": "gain", "retrain_steps": 0, "precision": "bf16"}, "precision: for a training, which"),
        ({"recipe": "random", "gate_steps": 4}, "gate_steps: for a choice by training windows, which this"),
        ({"recipe": "random", "gate_epochs": 1.0}, "gate_epochs: for a choice by training windows"),
        (
            {"recipe": "random", "retrain_steps": 0, "batch_size": 8},
            "batch_size: for a training, a choice or",
        ),
        (decided | {"retrain_steps": 0, "batch_size": 8}, "batch_size: for a training, a choice or"),
        ({"recipe": "paper", "targets": (), "lambda_hidden": 2.0}, "lambda_hidden: for gates on hidden"),
        (
            {"distillation": Distillation(logits=0.0, temperature=3.0)},
            "and the weight of the logits is 0: leave",
        ),
        (
            embeds | {"distillation": Distillation(temperature=3.0)},
            "the model gives embeddings or scores: leave",
        ),
        (
            embeds | {"task": "reranking", "distillation": Distillation(temperature=3.0)},
            "gives embeddings or",
        ),
        (
            {
                **embeds,
                "task": "text-classification",
                "scores": "s",
                "distillation": Distillation(temperature=3.0),
            },
            "a temperature softens distributions that are compared, and the model gives embeddings or scores",
        ),
        ({"recipe": "paper", "targets": (), "distillation": Distillation(logits=2.0)}, "distillation is"),
        ({"recipe": "gain", "retrain_steps": 0, "distillation": Distillation(task=1.0)}, "distillation is"),
    ):
        chance = {"gate_steps": None} if changes.get("recipe") == "random" else {}
        with pytest.raises(ValueError, match=message):
            replace(settings, **{**chance, **changes})  # type: ignore[arg-type]
    for effective in (
        {"recipe": "fast", "retrain_steps": None, "max_minutes": 5.0, "average_steps": 0.5},
        {"recipe": "fast", "retrain_steps": None, "retrain_epochs": 1.0, "teacher": "t"},
        {"recipe": "paper", "targets": (), "distillation": Distillation(logits=2.0), "distil_in": "retrain"},
        {"recipe": "gain", "retrain_steps": 0, "distillation": Distillation(pooling="cls")},
        {"recipe": "paper", "retrain_steps": 0, "dropout": 0.1},  # of the gates' training
        {"retrain_steps": 0, "learning_rate": 0.2, "train_embeddings": True},
        {"distillation": Distillation(logits=0.0, hidden=0.0)},  # no teacher, by the weights
        {"recipe": "gain", "gate_fraction": 0.5, "tensorboard": True},
        {"recipe": "gain", "gate_steps": 4, "save_steps": 5, "precision": "fp32"},  # the narrow model trains
        {"recipe": "joint", "retrain_steps": 0, "save_steps": 5, "precision": "bf16"},
        {"recipe": "random", "gate_fraction": 0.5, "compensate": "bias"},  # which is worked out on windows
        {"recipe": "random", "retrain_steps": 0, "batch_size": 8, "compensate": "bias"},
        {"recipe": "gain", "retrain_steps": 0, "batch_size": 8},
        embeds | {"task": "text-classification", "distillation": Distillation(temperature=3.0)},
        embeds | {"distillation": Distillation(logits=2.0)},
        decided | {"batch_size": 8},
        {
            **untrained,
            "validation_file": None,
            "eval_file": None,
        },  # the teacher is what they are compared with
    ):
        chance = {"gate_steps": None} if effective.get("recipe") == "random" else {}
        assert replace(settings, **{**chance, **effective})  # type: ignore[arg-type]


def test_numbers_that_are_none_are_refused(settings: PruneSettings) -> None:
    for name in ("max_minutes", "retrain_epochs", "learning_rate", "cross_pairs", "dropout"):
        steps = {"retrain_steps": None, name: float("nan")}
        with pytest.raises(ValueError, match=f"{name} is nan: a finite number is needed"):
            replace(settings, **steps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="logits is inf: a finite number is needed"):
        Distillation(logits=float("inf"))
    with pytest.raises(ValueError, match="epochs is inf: a finite number is needed"):
        FineTuneSettings("m", Path("t"), Path("o"), epochs=float("inf"))
