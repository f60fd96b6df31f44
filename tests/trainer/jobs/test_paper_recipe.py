"""The paper's recipe as a whole job: its prices, its frozen weights, its threshold; and with a target, the
share of each part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from jobs import Killed, job_settings, same_end, variant
from matching import trained_model
from pruned_trainer import Decision, PerGate, Scores, Target
from pruned_trainer.jobs import choice
from pruned_trainer.jobs.choice import together
from pruned_trainer.jobs.job import start
from pruned_trainer.jobs.prune import prune, sweep
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.pruning.gates import INITIAL_LOG_ALPHA, one_probability, open_probability
from pruned_trainer.pruning.options import PENALTIES

HEADS, FFN = 2 * 4, 2 * 48  # of the model's two layers


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> PruneSettings:
    return job_settings(tmp_path_factory.mktemp("paper"), trained_model())


def left(decision: Decision) -> tuple[int, int]:
    """Heads and FFN units that stay in all layers."""
    shapes = [layer.shape for layer in decision.layers]
    return sum(shape.num_heads for shape in shapes), sum(shape.ffn_width for shape in shapes)


def test_prices(settings: PruneSettings) -> None:
    """Weights frozen, each part's gates alone, prices instead of a target: dearer heads are fewer heads. No
    teacher in either phase."""
    heads = []
    for multiple in (0.5, 30.0):
        one = variant(
            settings, f"paper-{multiple}", recipe="paper", targets=(), lambda_attention=multiple,
            lambda_ffn=0.0, gate_steps=100, retrain_steps=5,
        )  # fmt: skip
        report = prune(one)
        decision = Decision.load(one.out / "decision.json")
        assert decision.target == {} and set(decision.reached) == {"macs"}
        heads.append(left(decision)[0])
        assert all(layer.shape.ffn_width == 48 for layer in decision.layers)
        for phase in ("gates", "retrain"):
            names = {name for entry in report["training"][phase] for name in entry}
            assert "loss_task" in names and not names & {"loss_logits", "loss_hidden"}
    assert heads[1] < heads[0]


def test_weights_are_frozen_while_gates_train(
    settings: PruneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = choice.run, []

    def run(trainer: Any, *arguments: Any) -> Any:
        log = original(trainer, *arguments)
        state = trainer.model.state_dict()
        seen.append({key: value for key, value in state.items() if "pruning_gates" not in key})
        return log

    monkeypatch.setattr(choice, "run", run)
    one = variant(settings, "frozen", recipe="paper", targets=(), gate_steps=4, retrain_steps=0)
    prune(one)
    dense = start(one).dense.state_dict()
    assert len(seen) == 2
    for state in seen:
        assert state.keys() == dense.keys()
        assert all(torch.equal(value, dense[key]) for key, value in state.items())


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_penalty_counts_as_it_says(penalty: str, settings: PruneSettings) -> None:
    """By the share of open gates in the log of the first step, when all gates are as they start. What the
    page draws of each layer, after the step, is counted so, too."""
    one = variant(
        settings, f"penalty-{penalty}", recipe="paper", targets=(), penalty=penalty, gate_steps=2,
        retrain_steps=0,
    )  # fmt: skip
    first = next(entry for entry in prune(one)["training"]["gates"] if "open_heads" in entry)
    counted = open_probability if penalty == "open" else one_probability
    assert settings.penalty == "one"
    at_start = float(counted(torch.tensor(INITIAL_LOG_ALPHA)))
    assert first["open_heads"] == pytest.approx(at_start, abs=1e-4)
    in_layers = [value for name, value in first.items() if name.startswith("open_heads/")]
    assert sum(in_layers) / HEADS == pytest.approx(at_start, abs=0.02)


@pytest.mark.parametrize("taught", ["gates", "retrain"])
def test_the_teacher_teaches_in_the_phases_that_are_named(taught: str, settings: PruneSettings) -> None:
    one = variant(
        settings,
        f"taught-{taught}",
        recipe="paper",
        targets=(),
        distil_in=taught,
        gate_steps=2,
        retrain_steps=2,
    )
    training = prune(one)["training"]
    for phase in ("gates", "retrain"):
        assert any("loss_logits" in entry for entry in training[phase]) == (phase == taught)


def test_the_threshold_is_log_alpha_0(settings: PruneSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates at 0.1 stay and gates at -0.1 go, whatever the price."""

    def gates(job: Any, folder: Any, part: str, steps: int) -> Any:
        rank = PerGate.full(job.budget.dense, -0.1)
        for tensor in rank.of(part):
            tensor[::2] = 0.1
        return [Scores(rank, PerGate.full(job.budget.dense, 1.0))], []

    monkeypatch.setattr(choice, "paper_gates", gates)
    one = variant(settings, "threshold", recipe="paper", targets=(), gate_steps=2, retrain_steps=0, align=1)
    prune(one)
    for layer in Decision.load(one.out / "decision.json").layers:
        assert layer.heads.indices == (0, 2) and layer.ffn.indices == tuple(range(0, 48, 2))


def test_a_target_is_held_in_shares(settings: PruneSettings) -> None:
    """Each part's gates are held to the share that the target allows, within 1% of them at the end, and the
    choice keeps that share of each part; retraining has its teacher."""
    one = variant(
        settings,
        "shares",
        recipe="paper",
        targets=(Target(macs=0.5),),
        gate_steps=150,
        retrain_steps=2,
        align=1,
    )
    report = prune(one)
    job = start(one)
    share = job.budget.even_share(["heads", "ffn"], 0.5)
    held = [entry for entry in report["training"]["gates"] if "expected" in entry]
    ends = [held[len(held) // 2 - 1], held[-1]]
    for end in ends:
        assert end["wanted"] == pytest.approx(share, abs=1e-3)
        assert end["expected"] == pytest.approx(share, abs=0.01)
    heads, units = left(Decision.load(one.out / "decision.json"))
    assert abs(heads - share * HEADS) <= 1 and abs(units - share * FFN) <= FFN / HEADS
    assert "loss_logits" in report["training"]["retrain"][0]
    assert report["target"]["reached"]["macs"] <= 0.5


def test_parts_are_not_ranked_on_one_scale(settings: PruneSettings) -> None:
    """Heads whose log_alphas are all far above the units' lose the same share, with a target."""
    job = start(variant(settings, "scales", recipe="paper"))
    scores = {}
    for part, offset in (("heads", 50.0), ("ffn", -50.0)):
        rank = PerGate.full(job.budget.dense, 0.0)
        generator = torch.Generator().manual_seed(1)
        for tensor in rank.of(part):
            tensor.copy_(offset + torch.randn(tensor.shape, generator=generator))
        scores[part] = Scores(rank, PerGate.full(job.budget.dense, 1.0))
    decision = choice.decide(together(job, scores), job.budget, job.settings.targets[0], 1)
    heads, units = left(decision)
    assert 0 < heads < HEADS and abs(heads / HEADS - units / FFN) <= 1 / HEADS
    for i, layer in enumerate(decision.layers):  # and within a part, the order is that of log_alpha
        ranks = scores["ffn"].rank.ffn[i]
        gone = [float(rank) for j, rank in enumerate(ranks) if j not in layer.ffn.indices]
        assert min(float(ranks[j]) for j in layer.ffn.indices) >= max(gone)


def test_a_family_has_its_scores_from_each_target_s_end(
    settings: PruneSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between training and decision, and resumed, it is the same family."""
    targets = (Target(macs=0.7), Target(macs=0.4))
    base = variant(
        settings,
        "shares-family",
        recipe="paper",
        targets=targets,
        gate_steps=20,
        retrain_steps=0,
        save_steps=4,
    )
    sweep(base)
    one = variant(base, "shares-killed")
    original, files = choice.paper_gates, []

    def dies(job: Any, folder: Any, part: str, steps: int) -> Any:
        scores = original(job, folder, part, steps)
        files.extend(sorted(file.name for file in folder.glob("scores-*")))
        if part == "ffn":
            raise Killed
        return scores

    with monkeypatch.context() as patch:
        patch.setattr(choice, "paper_gates", dies)
        with pytest.raises(Killed):
            sweep(one)
    assert files == ["scores-0.pt", "scores-1.pt"] * 2
    sweep(replace(one, resume=True))
    for target in targets:
        same_end(one.out / target.name, base.out / target.name)
    sizes = [left(Decision.load(one.out / target.name / "decision.json"))[1] for target in targets]
    assert sizes[1] < sizes[0] and not list(one.out.rglob("scores-*"))
