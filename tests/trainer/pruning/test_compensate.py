"""Compensated compaction, against closed forms: what can be recovered exactly is, and `none` changes
nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from inputs import logits, padded_batch
from matching import batch_of, save_checkpoint, trained_model
from pruned_ops.checkpoints.loading import load_model
from pruned_trainer import Decision, SizeBudget, Target, attached, compact, decide
from pruned_trainer.pruning import importance
from pruned_trainer.pruning.compensate import PARTS, calibration_batches, compensate
from pruned_trainer.pruning.decision import Kept, LayerDecision
from pruned_trainer.pruning.options import COMPENSATIONS_MADE

HEAD_DIM, LENGTHS = 16, (24, 9, 1, 17)


def calibration(model: Any, number: int = 4) -> list[dict[str, torch.Tensor]]:
    """Batches of random tokens, padded, without labels."""
    return [padded_batch(LENGTHS, pad_token_id=model.config.pad_token_id, seed=i) for i in range(number)]


def layers_of(model: Any) -> list[dict[str, Any]]:
    return [dict(layer.named_modules()) for layer in model.base_model.encoder.layer]


def kept(numbers: Any, value: float = 1.0) -> Kept:
    return Kept(tuple(numbers), (value,) * len(tuple(numbers)))


def without_first(model: Any, least: int = 1) -> Decision:
    """Every layer without its first head and its first FFN unit, where it has `least` of them or more."""

    def rest(number: int) -> Kept:
        return kept(range(int(number >= least), number))

    layers = [
        LayerDecision(
            rest(modules["attention.output.dense"].in_features // HEAD_DIM),
            rest(modules["output.dense"].in_features),
        )
        for modules in layers_of(model)
    ]
    return Decision(tuple(layers), 1, {}, {})


def close(narrow: Any, model: Any, atol: float) -> bool:
    batch = padded_batch(LENGTHS, pad_token_id=model.config.pad_token_id, seed=99)
    real = batch["attention_mask"].bool()
    return bool(torch.allclose(logits(narrow, batch)[real], logits(model, batch)[real], atol=atol, rtol=0))


@pytest.mark.parametrize("layer_by_layer", [False, True])
@pytest.mark.parametrize("method", COMPENSATIONS_MADE)
def test_constant_units_go_into_the_bias(model: Any, method: str, layer_by_layer: bool) -> None:
    """What is removed gives the same for every token: both ways recover it, compaction alone does not."""
    hidden = model.config.hidden_size
    with torch.no_grad():
        for modules in layers_of(model):
            if modules["output.dense"].in_features:
                modules["intermediate.dense"].weight[0] = 0
                modules["intermediate.dense"].bias[0] = 2.0
                modules["output.dense"].weight[:, 0] = 1.5 * torch.randn(hidden)
            if modules["attention.output.dense"].in_features:
                modules["attention.self.value"].weight[:HEAD_DIM] = 0
                modules["attention.self.value"].bias[:HEAD_DIM] = 1.0
                modules["attention.output.dense"].weight[:, :HEAD_DIM] = torch.randn(hidden, HEAD_DIM)
    decision = without_first(model)
    narrow = compact(model, decision, calibration(model), method, layer_by_layer)
    assert not close(compact(model, decision), model, 1e-2)
    assert close(narrow, model, 2e-4)


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_units_that_follow_from_others_go_into_the_matrix(model: Any, layer_by_layer: bool) -> None:
    """Each first head and unit is a copy of the second: least squares recover it, a bias cannot."""
    changed = 0
    with torch.no_grad():
        for modules in layers_of(model):
            for name, size in (("intermediate.dense", 1), ("attention.self.value", HEAD_DIM)):
                if modules[name].out_features >= 2 * size:
                    modules[name].weight[:size] = modules[name].weight[size : 2 * size]
                    modules[name].bias[:size] = modules[name].bias[size : 2 * size]
                    changed += 1
            for name in ("query", "key"):
                if modules["attention.self.query"].out_features >= 2 * HEAD_DIM:
                    module = modules[f"attention.self.{name}"]
                    module.weight[:HEAD_DIM] = module.weight[HEAD_DIM : 2 * HEAD_DIM]
                    module.bias[:HEAD_DIM] = module.bias[HEAD_DIM : 2 * HEAD_DIM]
            if modules["output.dense"].in_features:
                modules["output.dense"].weight[:, 0] += 20 * torch.randn(model.config.hidden_size)
    decision = without_first(model, least=2)
    batches = calibration(model, 12)
    solved = compact(model, decision)
    compensate(solved, model, decision, batches, "least-squares", layer_by_layer=layer_by_layer, ridge=1e-12)
    assert changed and close(solved, model, 2e-3)
    assert not close(compact(model, decision, batches, "bias"), model, 1e-2)


def test_least_squares_are_the_closed_form(model: Any) -> None:
    """The matrix and bias of one layer, by the normal equations on what the module takes and gives."""
    modules = layers_of(model)[0]
    width, ridge = modules["output.dense"].in_features, 0.05
    stay = list(range(0, width, 2))
    everything = [
        LayerDecision(kept(range(m["attention.output.dense"].in_features // HEAD_DIM)),
                      kept(range(m["output.dense"].in_features)))
        for m in layers_of(model)
    ]  # fmt: skip
    everything[0] = LayerDecision(everything[0].heads, kept(stay, 0.75))
    decision, batches = Decision(tuple(everything), 1, {}, {}), calibration(model)
    taken: list[torch.Tensor] = []
    hook = modules["output.dense"].register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    for batch in batches:
        logits(model, batch)
    hook.remove()
    x = torch.cat([t[b["attention_mask"].bool()] for t, b in zip(taken, batches, strict=True)]).double()
    weight, bias = (t.detach().double() for t in modules["output.dense"].parameters())
    left, small = x[:, stay], 0.75 * weight[:, stay]
    error = x @ weight.T - left @ small.T
    centred = left - left.mean(0)
    squares = centred.T @ centred / len(x)
    joint = centred.T @ (error - error.mean(0)) / len(x)
    penalty = ridge * squares.diagonal().mean() * torch.eye(len(stay))
    matrix = torch.linalg.solve(squares + penalty, joint).T
    narrow = compact(model, decision)
    compensate(narrow, model, decision, batches, "least-squares", ridge=ridge)
    solved = layers_of(narrow)[0]["output.dense"]
    torch.testing.assert_close(solved.weight.double(), small + matrix, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        solved.bias.double(), bias + error.mean(0) - matrix @ left.mean(0), atol=1e-6, rtol=1e-5
    )
    compensate(narrow := compact(model, decision), model, decision, batches, "bias")
    solved = layers_of(narrow)[0]["output.dense"]
    torch.testing.assert_close(solved.bias.double(), bias + error.mean(0), atol=1e-6, rtol=1e-5)
    assert torch.equal(solved.weight, layers_of(compact(model, decision))[0]["output.dense"].weight)


@pytest.mark.parametrize("method", [*COMPENSATIONS_MADE, "auto"])
def test_nothing_left_is_no_error(model: Any, method: str) -> None:
    """Without any head and unit, the biases take the means."""
    nothing = LayerDecision(Kept((), ()), Kept((), ()))
    decision = Decision((nothing,) * len(layers_of(model)), 8, {}, {})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    narrow = compact(model, decision, calibration(model), method)
    bare = compact(model, decision)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in narrow.state_dict().values())
    if method != "auto":
        assert not torch.equal(
            layers_of(narrow)[0]["output.dense"].bias, layers_of(bare)[0]["output.dense"].bias
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_none_is_plain_compaction(model: Any) -> None:
    decision = without_first(model)
    plain, batches = compact(model, decision).state_dict(), calibration(model)
    for narrow in (compact(model, decision, batches, "none"), compact(model, decision, None, "none")):
        assert all(torch.equal(tensor, plain[name]) for name, tensor in narrow.state_dict().items())
    with pytest.raises(ValueError, match="compensation by bias needs a calibration"):
        compact(model, decision, compensate="bias")
    for given, method in ((None, "auto"), (batches, "none")):
        with pytest.raises(ValueError, match="layer by layer is a way to compensate: give a calibration"):
            compact(model, decision, given, method, layer_by_layer=True)
    with pytest.raises(ValueError, match="one of auto, bias, least-squares, none"):
        compact(model, decision, batches, "magic")
    with pytest.raises(ValueError, match="1 calibration batches: auto needs 2"):
        compact(model, decision, batches[:1])


def test_dtype_and_training_mode_are_kept() -> None:
    model = trained_model(steps=1).bfloat16().train()
    decision = Decision((LayerDecision(kept([0, 2]), kept(range(20))),) * 2, 1, {}, {})
    batches = [batch_of(8, torch.Generator().manual_seed(i)) for i in range(2)]
    for method in (*COMPENSATIONS_MADE, "auto"):
        narrow = compact(model, decision, batches, method)
        assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
        assert narrow.training and model.training and all(p.requires_grad for p in narrow.parameters())


def test_gates_that_are_attached_act(model: Any) -> None:
    """What is removed is what the gated model computes, where a closed gate has nothing to remove."""
    with attached(model) as gates, torch.no_grad():
        for log_alpha in gates.locations():
            log_alpha.fill_(9.0)
        for log_alpha in (*gates.heads, *gates.ffn):
            if log_alpha.numel():
                log_alpha[0] = -9.0
        gates.train()
        model.train()
        decision, drawn = without_first(model), int(gates.draws)
        narrow, plain = (
            compact(model, decision, calibration(model), "least-squares"),
            compact(model, decision),
        )
        assert int(gates.draws) == drawn  # the training's noise is as it would be
        assert gates.training
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(narrow.state_dict()[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def trained() -> Any:
    return trained_model()


def halved(model: Any) -> Decision:
    """The decision of a random choice, which hurts."""
    budget = SizeBudget(importance.model_shape(model), "params")
    scores = importance.score("random", model, [], budget, ["heads", "ffn"], seed=3)
    return decide(scores, budget, Target(params=0.5), 1)


@pytest.mark.parametrize("labels", [True, False])
def test_auto_keeps_what_lowers_the_loss(trained: Any, labels: bool) -> None:
    batches = [batch_of(64, torch.Generator().manual_seed(i)) for i in range(6)]
    if not labels:
        batches = [importance.without_labels(batch) for batch in batches]
    decision = halved(trained)
    narrow = compact(trained, decision)
    done = compensate(narrow, trained, decision, batches[:4], "auto", batches[4:])
    assert done.loss_before is not None and done.loss_after is not None
    assert done.loss_after < done.loss_before and set(done.methods.values()) != {"none"}
    assert "loss" in str(done)
    fixed = {}
    for method in COMPENSATIONS_MADE:
        other = compact(trained, decision)
        assert compensate(other, trained, decision, batches[:4], method).methods == dict.fromkeys(
            PARTS, method
        )
        fixed[method] = other.state_dict()
    for part, name in (("ffn", "output.dense"), ("heads", "attention.output.dense")):
        key = f"bert.encoder.layer.0.{name}.bias"
        if done.methods[part] != "none":
            torch.testing.assert_close(narrow.state_dict()[key], fixed[done.methods[part]][key])


def test_auto_keeps_nothing_that_hurts(trained: Any) -> None:
    """Calibrated on tokens that say nothing of the task, both ways hurt on the task: neither is kept."""
    decision = Decision((LayerDecision(kept([0, 1, 2]), kept(range(40))),) * 2, 1, {}, {})
    foreign = [{"input_ids": torch.full((2, 8), 3), "attention_mask": torch.ones(2, 8, dtype=torch.long)}]
    task = [batch_of(64, torch.Generator().manual_seed(1))]
    narrow, plain = compact(trained, decision), compact(trained, decision).state_dict()
    done = compensate(narrow, trained, decision, foreign, "auto", task)
    for part, name in (("ffn", "output.dense"), ("heads", "attention.output.dense")):
        key = f"bert.encoder.layer.0.{name}.weight"
        assert torch.equal(narrow.state_dict()[key], plain[key]) or done.methods[part] == "least-squares"
    assert done.loss_after <= done.loss_before and "none" in done.methods.values()


def test_texts_are_a_calibration(trained: Any, tmp_path: Any) -> None:
    loaded = load_model(str(save_checkpoint(trained, tmp_path / "model")))
    texts = [" ".join(f"w{(7 * i + j) % 24}" for j in range(1 + i % 40)) for i in range(40)]
    batches = calibration_batches(loaded, texts)
    assert sum(len(batch["input_ids"]) for batch in batches) == 40
    assert max(batch["input_ids"].size(1) for batch in batches) == 32  # the longest that the model takes
    decision = halved(loaded)
    narrow, plain = compact(loaded, decision, texts, "bias"), compact(loaded, decision)
    assert not torch.equal(
        narrow.bert.encoder.layer[0].output.dense.bias, plain.bert.encoder.layer[0].output.dense.bias
    )


class Embedder(torch.nn.Module):
    """A model of one's own, which takes no token types."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.body = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": self.body(input_ids, attention_mask).last_hidden_state[:, 0]}


def test_texts_are_a_calibration_of_a_model_of_ones_own(trained: Any, tmp_path: Any) -> None:
    """The tokenizer is that of the encoder's checkpoint."""
    model = Embedder(load_model(str(save_checkpoint(trained, tmp_path / "model"))).bert)
    decision, texts = halved(model), [f"w{i} w{i + 1}" for i in range(16)]
    narrow, plain = compact(model, decision, texts, "bias"), compact(model, decision)
    assert not torch.equal(
        narrow.body.encoder.layer[0].output.dense.bias, plain.body.encoder.layer[0].output.dense.bias
    )


def test_a_calibration_that_cannot_be_run_is_refused(trained: Any) -> None:
    decision, batches = halved(trained), [batch_of(8, torch.Generator().manual_seed(i)) for i in range(2)]
    del batches[1]["attention_mask"]
    with pytest.raises(ValueError, match="batch to compensate on has no attention_mask .it has input_ids"):
        compact(trained, decision, batches, "bias")
    for one in ("texts.txt", Path("texts.txt"), batches[0]):  # of which letters or names would be the texts
        with pytest.raises(ValueError, match=f"calibration is a {type(one).__name__}: a list of texts, or"):
            compact(trained, decision, one)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a Sequential takes its inputs as one dictionary"):
        compact(torch.nn.Sequential(trained), decision, batches, "bias")


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_are_compared_as_they_are_pooled(pooling: str) -> None:
    """By the config of a bare encoder, or as the caller says: the loss is that of the pooled states."""
    model: Any = trained_model(steps=1).bert
    model.config.pooling = pooling
    drawn = [batch_of(16, torch.Generator().manual_seed(i)) for i in range(6)]
    decision, batches = halved(model), [importance.without_labels(batch) for batch in drawn]
    batches[4]["attention_mask"][:4, -3:] = 0
    narrow = compact(model, decision)
    done = compensate(narrow, model, decision, batches[:4], "auto", batches[4:], pooling=pooling)
    losses = []
    with torch.no_grad():
        for batch in batches[4:]:
            mask = batch["attention_mask"][:, :, None].float()
            states = [each(**batch).last_hidden_state for each in (compact(model, decision), model)]
            own, wanted = (x[:, 0] if pooling == "cls" else (x * mask).sum(1) / mask.sum(1) for x in states)
            away = 1 - torch.cosine_similarity(own, wanted)
            losses.append(away + (own - wanted).square().sum(1) / wanted.square().sum(1))
    assert done.loss_before == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
    by_config = compact(model, decision, [*batches[:3], batches[4]], "auto")
    asked = compact(model, decision)
    compensate(asked, model, decision, [*batches[:3], batches[4]], "auto", pooling=pooling)
    for name, tensor in by_config.state_dict().items():
        assert torch.equal(tensor, asked.state_dict()[name])
